"""Law 10: a run's own way in refuses every changed identity key by its name, with both values and a command that mends
it, and before anything that is wrong with the data.
"""

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.test_same_run import of_role, saved
from config.other_values import two_configs
from diffmoe_ep.checkpoint.fragments import whole
from diffmoe_ep.checkpoint.same_run import shown
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.config import Config, ConfigError, Key, flat, from_tree, override, to_tree
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.preflight import prepare
from diffmoe_ep.train.warm_start import ancestry_of
from train.runs import config

NOWHERE = "data.folder=/nowhere/at/all"


def refusal(given: Config) -> str:
    with pytest.raises(ConfigError) as refused:
        prepare(given, Mesh())
    return str(refused.value)


IDENTITY = [key for key in of_role("identity") if key.name != "model.size"]  # a name of three others


@pytest.mark.parametrize("key", IDENTITY, ids=lambda key: key.name)
def test_a_changed_identity_is_refused_by_name_before_the_data_are_opened(tmp_path: Path, key: Key) -> None:
    here = [f"folder={tmp_path}", *([] if key.name == "data.mode" else [NOWHERE])]
    before, now = two_configs(key, *here)
    saved(tmp_path, before)
    assert "/nowhere/at/all" in refusal(override(before, [NOWHERE]))  # the keys are the same, so the data come next
    found, there, here = refusal(now), flat(to_tree(before))[key.name], flat(to_tree(now))[key.name]
    assert f" {key.name} " in found
    assert f" {shown(there)}" in found and f" {shown(here)}" in found
    remedy = next(word for word in shlex.split(found.rpartition(" set ")[2]) if word.startswith(f"{key.name}="))
    assert override(now, [remedy.removesuffix(",")]) == before  # what is printed can be pasted


def test_a_size_is_the_numbers_that_it_stands_for(tmp_path: Path) -> None:
    saved(tmp_path, from_tree({}, [f"folder={tmp_path}", NOWHERE, "model.size=S"]))
    assert "/nowhere/at/all" in refusal(from_tree({}, [f"folder={tmp_path}", NOWHERE, "model.num_blocks=12"]))
    larger = from_tree({}, [f"folder={tmp_path}", NOWHERE, "model.size=B"])
    assert "model.hidden_size is 384 there and 768 here" in refusal(larger)


def kept(folder: Path, given: Config, fingerprint: str, ancestry: tuple[dict[str, Any], ...] = ()) -> Path:
    """A checkpoint of hardly any weights that knows its data and its ancestors."""
    meta = {"config": to_tree(given), "data": {}, "fingerprint": fingerprint, "ancestry": ancestry}
    return save(folder / "checkpoints", 3, [whole("model.x", torch.zeros(1))], meta)


def test_data_may_move_but_not_change(digits: Path, tmp_path: Path) -> None:
    given = config(digits / "train", tmp_path / "run")
    kept(tmp_path / "run", given, Dataset.open(digits / "train").fingerprint)
    moved = shutil.copytree(digits / "train", tmp_path / "moved")
    assert prepare(override(given, [f"data.folder={moved}"]), Mesh())[1] is not None
    assert "was trained on other data than" in refusal(override(given, [f"data.folder={digits / 'heldout'}"]))
    mixed = ["data.folder=data", f"data.mixture=[{{folder: {digits / 'train'}}}, {{folder: {moved}}}]"]
    assert "was trained on other data than data.mixture" in refusal(override(given, mixed))


def test_what_a_run_started_from_may_move_and_is_no_other_of_the_same_name(digits: Path, tmp_path: Path) -> None:
    source, other = tmp_path / "one" / "source", tmp_path / "other" / "source"
    given = config(digits / "train", tmp_path / "run", f"init_from={source}")
    ancestor = kept(source, config(digits / "train", source), "0")
    kept(other, config(digits / "train", other, "seed=1"), "0")
    kept(tmp_path / "run", given, Dataset.open(digits / "train").fingerprint, ancestry_of(ancestor, "ema"))

    def goes_on(name: str) -> bool:
        return prepare(override(given, [f"init_from={name}"]), Mesh())[1] is not None

    assert goes_on(f"{source}/") and goes_on(str(ancestor))
    moved = shutil.copytree(source, tmp_path / "moved")
    save(
        moved / "checkpoints",
        9,
        [whole("model.x", torch.ones(1))],
        {"config": to_tree(given), "data": {}, "fingerprint": "0"},
    )
    assert goes_on(str(moved))  # though it was trained on
    for wrong in (other, tmp_path / "gone", "null"):
        found = refusal(override(given, [f"init_from={wrong}"]))
        assert f"was trained with init_from {source}, this run has {wrong}" in found
        assert f"set init_from={source}, or" in found
    shutil.rmtree(tmp_path / "one")
    assert goes_on(str(source)) and goes_on(str(moved))  # nothing of it is read again


def test_remedies_are_quoted(tmp_path: Path) -> None:
    given = from_tree({}, [f"folder={tmp_path}", "init_from=runs/my run"])
    saved(tmp_path, given)
    assert "set 'init_from=runs/my run', or" in refusal(override(given, ["init_from=null"]))
