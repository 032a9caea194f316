"""Law 10: a resume tells every changed recipe key, lets what changes no result pass, and knows data and ancestors that
moved. That it refuses every changed identity key is shown on a run's own way in, in `train/test_preflight.py`.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from config.other_values import two_configs
from diffmoe_ep.checkpoint.fragments import whole
from diffmoe_ep.checkpoint.same_run import RecipeChange, check_continues, check_same_data, recipe_changes
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.config import Config, Key, flat, keys, to_tree

pytestmark = pytest.mark.slow

PRINT = "1234567890abcdef"


def of_role(*roles: str) -> list[Key]:
    return [key for key in keys() if key.role in roles and not key.by_fingerprint]


def saved(folder: Path, config: Config, step: int = 7, recipe: tuple[RecipeChange, ...] = ()) -> Path:
    """A checkpoint of hardly any weights, with the meta that training writes."""
    meta = {
        "config": to_tree(config),
        "data": {},
        "fingerprint": PRINT,
        "recipe": [asdict(change) for change in recipe],
    }
    return save(folder / "checkpoints", step, [whole("model.x", torch.zeros(1))], meta)


@pytest.mark.parametrize("key", of_role("recipe"), ids=lambda key: key.name)
def test_a_changed_recipe_passes_and_is_kept_with_its_step(tmp_path: Path, key: Key) -> None:
    before, now = two_configs(key)
    older = RecipeChange("train.steps", 3, 50, 100)
    checkpoint = saved(tmp_path, before, 7, (older,))
    check_continues(checkpoint, now)
    there, here = (flat(to_tree(config))[key.name] for config in (before, now))
    assert recipe_changes(checkpoint, now) == (older, RecipeChange(key.name, 7, there, here))
    assert recipe_changes(checkpoint, before) == (older,)
    later = saved(tmp_path, now, 9, recipe_changes(checkpoint, now))
    assert recipe_changes(later, now) == (older, RecipeChange(key.name, 7, there, here))


@pytest.mark.parametrize("key", of_role("execution", "reporting"), ids=lambda key: key.name)
def test_how_it_is_computed_and_reported_passes_in_silence(tmp_path: Path, key: Key) -> None:
    before, now = two_configs(key)
    checkpoint = saved(tmp_path, before)
    check_continues(checkpoint, now)
    assert recipe_changes(checkpoint, now) == ()


@pytest.mark.parametrize("name", ["data.folder", "data.mixture"])
def test_data_may_move_but_not_change(tmp_path: Path, name: str) -> None:
    before, now = two_configs(next(key for key in keys() if key.name == name))
    checkpoint = saved(tmp_path, before)
    check_continues(checkpoint, now)
    check_same_data(checkpoint, now, PRINT)
    with pytest.raises(CheckpointError, match=rf"trained on other data than {name}.* it had data.folder data, "):
        check_same_data(checkpoint, now, "another")


def test_a_run_without_a_checkpoint_has_changed_nothing() -> None:
    assert recipe_changes(None, Config()) == ()
