"""The single-file form: what is saved is loaded, to the bit, in our convention; what does not fit is refused by
name.
"""

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffmoe_ep.checkpoint.export_published import export_published
from diffmoe_ep.checkpoint.exported import is_exported, load_exported, read_exported, save_exported
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.checkpoint.time_convention import REWRITTEN, reverse_time
from diffmoe_ep.config import Config, from_tree, override
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.model.dit import DiT, Output
from diffmoe_ep.model.parallelize import shard_experts
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from ranks import run as run_ranks

MODEL = {
    "input_size": 4,
    "in_channels": 2,
    "out_channels": 3,
    "hidden_size": 8,
    "num_heads": 2,
    "num_blocks": 2,
    "num_classes": 3,
    "num_experts": 4,
}
INFO = DataInfo(kind="pixels", shape=(2, 4, 4), scale=0.5, shift=-1.0, class_names=("a", "b", "c"))


def config_of(family: str = "diffmoe") -> Config:
    return from_tree(
        {"seed": 5, "model": MODEL | {"family": family}, "train": {"precision": "float32", "global_batch": 8}}
    )


def busy(config: Config, seed: int = 0) -> DiT:
    """A model whose tensors are all away from zero."""
    model = DiT(config.model, config.pool).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(
            torch.randn(tensor.shape, generator=generator) * 0.3 if tensor.is_floating_point() else torch.tensor(7)
        )
    return model


def sign(folder: Path) -> None:
    """Name the weights' sum anew in config.json, as whoever changes them on purpose would."""
    content = json.loads((folder / "config.json").read_text())
    content["sha256"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(content))


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x, t = torch.randn(batch, 2, 4, 4, generator=generator), torch.rand(batch, generator=generator)
    return x, t, torch.randint(0, 4, (batch,), generator=generator)


def run(model: DiT, x: Tensor, t: Tensor, condition: Tensor) -> Output:
    output = model(x, t, condition)
    assert isinstance(output, Output)
    return output


@pytest.mark.parametrize("family", ["dense", "diffmoe"])
def test_a_model_comes_back_to_the_bit(tmp_path: Path, family: str) -> None:
    config = config_of(family)
    model = busy(config)
    folder = save_exported(model, config, INFO, tmp_path / "a" / "single", provenance={"step": 3})
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert is_exported(folder) and not is_exported(tmp_path)
    loaded, single = load_exported(folder), read_exported(folder)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys() == load_file(folder / "model.safetensors").keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(run(loaded, *inputs()).prediction, run(model, *inputs()).prediction)
    assert (single.time_convention, single.data_info, single.provenance) == ("forward", INFO, {"step": 3})
    assert (single.config.model, single.config.pool, single.config.train, single.config.seed) == (
        config.model,
        config.pool,
        config.train,
        5,
    )


def test_tensors_by_name_are_a_model_too(tmp_path: Path) -> None:
    config = config_of()
    model = busy(config)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["label.table.weight"] = torch.randn(8, 4).T  # neither contiguous
    tensors["head.projection.bias"] = tensors["time.fc1.bias"] = torch.ones(30)[3:15]  # nor with memory of its own
    tensors["time.fc1.bias"] = tensors["time.fc1.bias"][:8]
    loaded = load_exported(save_exported(tensors, config, DataInfo(), tmp_path / "single")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_paths_and_ranks_stay_at_home(tmp_path: Path) -> None:
    config = dataclasses.replace(
        config_of(), folder="/home/somebody/run", data=dataclasses.replace(config_of().data, folder="/secret")
    )
    text = (save_exported(busy(config), config, DataInfo(), tmp_path / "single") / "config.json").read_text()
    assert "somebody" not in text and "secret" not in text


# ---- The time convention ----


def test_a_model_of_the_reversed_convention_answers_in_ours(tmp_path: Path) -> None:
    config = config_of()
    inner = busy(config)
    folder = save_exported(inner.state_dict(), config, DataInfo(), tmp_path / "single", time_convention="reversed")
    model = load_exported(folder)
    x, t, y = inputs()
    for training in (False, True):
        expected, output = run(inner.train(training), x, 1 - t, y), run(model.train(training), x, t, y)
        torch.testing.assert_close(output.prediction[:, :2], -expected.prediction[:, :2], rtol=0, atol=1e-5)
        # beyond the velocity nothing is negated: it is unused under flow
        torch.testing.assert_close(output.prediction[:, 2:], expected.prediction[:, 2:], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.auxiliary, expected.auxiliary, rtol=0, atol=1e-5)
    assert (run(model, x, t, y).prediction - run(inner, x, t, y).prediction)[:, :2].abs().max() > 0.1


def test_a_loaded_model_is_saved_in_our_convention_with_its_positions(tmp_path: Path) -> None:
    config = config_of()
    inner = busy(config)
    tensors = inner.state_dict() | {"positions": inner.positions + 1e-5}
    first = save_exported(tensors, config, DataInfo(), tmp_path / "first", time_convention="reversed")
    loaded = load_exported(first)
    second = save_exported(loaded, config, DataInfo(), tmp_path / "second")
    assert read_exported(first).time_convention == "reversed"
    assert read_exported(second).time_convention == "forward"
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert {name for name in one if not torch.equal(one[name], two[name])} == set(REWRITTEN)
    assert torch.equal(load_exported(second).positions, tensors["positions"])
    with pytest.raises(CheckpointError, match="in memory is of the time convention forward, not reversed"):
        save_exported(inner, config, DataInfo(), tmp_path / "third", time_convention="reversed")


def test_reversing_twice_gives_the_weights_back(tmp_path: Path) -> None:
    config = config_of()
    weights = {name: tensor.double() for name, tensor in busy(config).state_dict().items() if name in REWRITTEN}
    again = reverse_time(reverse_time(weights, config.model), config.model)
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-14)


def test_a_folder_of_the_first_format_is_read(tmp_path: Path) -> None:
    """It said clock, and keys by their names of then."""
    config = config_of()
    path = (
        save_exported(busy(config).state_dict(), config, INFO, tmp_path / "a", time_convention="reversed")
        / "config.json"
    )
    content = json.loads(path.read_text())
    content["clock"] = content.pop("time_convention")
    content["config"]["model"]["hidden"] = content["config"]["model"].pop("hidden_size")
    content["config"]["train"]["optimizer"]["rate"] = content["config"]["train"]["optimizer"].pop("lr")
    del content["sha256"]
    path.write_text(json.dumps(content | {"format": 1}))
    exported = read_exported(path.parent)
    assert exported.time_convention == "reversed" and exported.config.model == config.model
    assert load_exported(path.parent) is not None


def test_the_text_encoder_goes_with_the_model(tmp_path: Path) -> None:
    config = override(config_of(), ["text.encoder=clip", "train.optimizer.lr=0.5", "data.folder=/secret"])
    exported = read_exported(save_exported(busy(config), config, INFO, tmp_path / "a"))
    assert (exported.config.text.encoder, exported.config.train.optimizer.lr) == ("clip", 0.5)


# ---- What is refused ----


def dropped(tensors: dict[str, Tensor]) -> None:
    del tensors["time.fc2.bias"]


def added(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.7.attention.qkv.bias"] = torch.zeros(2)


def reshaped(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.ffn.router.weight"] = torch.zeros(5, 8)


def retyped(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.ffn.fc1.weight"] = tensors["blocks.0.ffn.fc1.weight"].half()


def moved(tensors: dict[str, Tensor]) -> None:
    tensors["positions"] = torch.zeros(4, 8)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (dropped, r"has no tensor time.fc2.bias, of shape \(8,\)"),
    "extra": (added, "holds blocks.7.attention.qkv.bias, which"),
    "shape": (reshaped, r"blocks.1.ffn.router.weight has shape \(5, 8\) there and \(4, 8\)"),
    "type": (retyped, "blocks.0.ffn.fc1.weight has type F16 there and F32"),
    "positions": (moved, "positions are not the fixed sine-cosine positions"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_other_tensors_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    config = config_of()
    folder = save_exported(busy(config), config, DataInfo(), tmp_path / "single")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    sign(folder)
    with pytest.raises(CheckpointError, match=message):
        load_exported(folder)


def test_a_ranks_slice_is_no_whole_model(tmp_path: Path) -> None:
    config = config_of()
    mesh = Mesh(device=torch.device("cpu"), expert=Group(size=2, rank=1))
    with pytest.raises(CheckpointError, match=r"experts.fc1_weight has shape \(2, 8, 32\) there and \(4, 8, 32\)"):
        save_exported(shard_experts(busy(config), mesh), config, DataInfo(), tmp_path / "single")
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    config = config_of()
    folder = save_exported(busy(config), config, DataInfo(), tmp_path / "single")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-9], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: it has not the SHA-256 .*sound copy"):
            load_exported(folder)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
            export_published(folder, tmp_path / "published.pt")
    file.write_bytes(content[:-9])
    sign(folder)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read .*sound copy"):
        load_exported(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"does not hold config.json and model.safetensors"):
        load_exported(folder)


def loaded_over_ranks(rank: int, folder: Path) -> str:
    try:
        load_exported(folder, mesh=init_mesh(1, 1, 1.0))
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_first_rank_looks_at_the_sum_for_all(tmp_path: Path, world: int) -> None:
    folder = save_exported(busy(config_of()), config_of(), DataInfo(), tmp_path / "single")
    assert run_ranks(world, loaded_over_ranks, folder) == ["loaded"] * world
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    answers = run_ranks(world, loaded_over_ranks, folder)
    assert len(set(answers)) == 1 and "model.safetensors is damaged" in answers[0]


def test_others_may_read_what_is_exported(tmp_path: Path) -> None:
    folder = save_exported(busy(config_of()), config_of(), DataInfo(), tmp_path / "single")
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


CONTENT: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 4}, "has format 4, this version reads up to 3"),
    "sums": ({"sha256": {}}, "sha256 has no sum of model.safetensors"),
    "no sums": ({"sha256": None}, "lacks sha256"),
    "convention": ({"time_convention": "backwards"}, "time_convention is 'backwards'; it is forward or reversed"),
    "section": ({"data": None}, "lacks data"),
    "data": ({"data": {"kind": "pixel"}}, "kind of the data is 'pixel', expected pixels or moments"),
    "key": ({"config": {"model": {"hiden": 8}}}, "unknown key model.hiden; did you mean model.hidden_size"),
    "numbers": (
        {"config": {"model": {"hidden_size": 8, "num_heads": 3}}},
        "model.hidden_size 8 must be a multiple of model.num_heads",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONTENT.values(), ids=CONTENT.keys())
def test_what_config_json_says_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = config_of()
    path = save_exported(busy(config), config, DataInfo(), tmp_path / "single") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        load_exported(path.parent)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    config = config_of()
    path = save_exported(busy(config), config, DataInfo(), tmp_path / "single") / "config.json"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(CheckpointError, match="config.json is no JSON"):
        read_exported(path.parent)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    config = config_of()
    (tmp_path / "empty").mkdir()
    folder = save_exported(busy(config), config, DataInfo(), tmp_path / "empty")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is not an empty folder: give another one"):
        save_exported(busy(config, seed=1), config, DataInfo(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_exported(busy(config), config, DataInfo(), tmp_path / "file" / "below")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}
