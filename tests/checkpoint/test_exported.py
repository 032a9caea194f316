"""The single-file form: what is saved is loaded, to the bit, in our convention; what does not fit is refused by
name.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffmoe_ep.checkpoint.exported import is_exported, load_exported, read_exported, reverse_clock, save_exported
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.config import Config, from_tree
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.model.dit import DiT, Output
from diffmoe_ep.model.parallelize import shard_experts
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh

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
    assert (single.clock, single.data_info, single.provenance) == ("forward", INFO, {"step": 3})
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


# ---- The clock ----


def test_a_reversed_clock_calls_at_one_minus_t_and_negates_the_velocity(tmp_path: Path) -> None:
    config = config_of()
    inner = busy(config)
    folder = save_exported(inner.state_dict(), config, DataInfo(), tmp_path / "single", clock="reversed")
    model = load_exported(folder)
    x, t, y = inputs()
    for training in (False, True):
        expected, output = run(inner.train(training), x, 1 - t, y), run(model.train(training), x, t, y)
        assert torch.equal(output.prediction[:, :2], -expected.prediction[:, :2])
        assert torch.equal(output.prediction[:, 2:], expected.prediction[:, 2:])  # no velocity: unused under flow
        assert torch.equal(output.auxiliary, expected.auxiliary)
    named = model(condition=y, x=x, t=t)
    assert torch.equal(named.prediction, run(model, x, t, y).prediction)
    assert run(model.eval(), *inputs(0)).prediction.shape == (0, 3, 4, 4)
    model.set_inference(InferenceRule("topk"))
    inner.eval().set_inference(InferenceRule("topk"))
    assert torch.equal(run(model, x, t, y).prediction[:, :2], -run(inner, x, 1 - t, y).prediction[:, :2])


def test_the_gradients_are_those_of_the_weights(tmp_path: Path) -> None:
    config = config_of()
    inner = busy(config).train()
    model = load_exported(
        save_exported(inner.state_dict(), config, DataInfo(), tmp_path / "single", clock="reversed")
    ).train()
    x, t, y = inputs()
    (run(model, x, t, y).prediction[:, :2] - x).square().mean().backward()
    (run(inner, x, 1 - t, y).prediction[:, :2] + x).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), inner.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == ("predictor" in name), name
        if ours.grad is not None and theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name


def test_a_loaded_model_is_saved_with_its_clock_and_positions(tmp_path: Path) -> None:
    config = config_of()
    inner = busy(config)
    positions = inner.positions + 1e-5
    first = save_exported(
        inner.state_dict() | {"positions": positions}, config, DataInfo(), tmp_path / "first", clock="reversed"
    )
    second = save_exported(load_exported(first), config, DataInfo(), tmp_path / "second")
    assert read_exported(second).clock == "reversed"
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(load_exported(second).positions, positions)
    with pytest.raises(CheckpointError, match="clock is reversed, it cannot be saved as forward"):
        save_exported(load_exported(first), config, DataInfo(), tmp_path / "third", clock="forward")
    with pytest.raises(CheckpointError, match="clock is forward, it cannot be saved as reversed"):
        save_exported(inner, config, DataInfo(), tmp_path / "third", clock="reversed")
    assert save_exported(reverse_clock(inner), config, DataInfo(), tmp_path / "third", clock="reversed").is_dir()


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
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read .*sound copy"):
        load_exported(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"does not hold config.json and model.safetensors"):
        load_exported(folder)


CONTENT: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 2}, "has format 2, this version reads up to 1"),
    "clock": ({"clock": "backwards"}, "clock is 'backwards'; it is forward or reversed"),
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
