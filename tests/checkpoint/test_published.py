"""Reference checkpoints: what is imported computes what the reference computes, written here again from its formulas,
and comes back.
"""

import argparse
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.published import (
    ARGS,
    MUTATIONS,
    State,
    close,
    compare_count,
    compare_training,
    inputs,
    positions,
    reference,
    saved,
    state,
)
from diffmoe_ep.checkpoint.export_published import export_published
from diffmoe_ep.checkpoint.exported import load_exported, read_exported, save_exported
from diffmoe_ep.checkpoint.import_published import import_published
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.config import from_tree
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiT, State]:
    path = tmp_path_factory.mktemp("reference")
    w = state()
    return load_exported(import_published(saved(path, w), path / "out", heads=3)), w


def test_training_is_the_references(imported: tuple[DiT, State]) -> None:
    compare_training(*imported, heads=3)


def test_count_is_the_references(imported: tuple[DiT, State]) -> None:
    compare_count(*imported, heads=3)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("compare", [compare_training, compare_count], ids=["training", "count"])
def test_each_mistake_would_be_seen(imported: tuple[DiT, State], compare: Callable[..., None], mutation: str) -> None:
    if (compare, mutation) == (compare_training, "strict >"):  # training has no threshold
        compare(*imported, heads=3, mutation=mutation)
        return
    with pytest.raises(AssertionError, match="not close"):
        compare(*imported, heads=3, mutation=mutation)


SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "dense": ({"experts": 0}, 2),
    "dense, patch 1": ({"experts": 0, "patch": 1, "channels": 3, "blocks": 1}, 6),
    "every block": ({"every": True, "experts": 3, "hidden": 16, "blocks": 3}, 4),
    "three blocks": ({"blocks": 3, "experts": 2, "patch": 4, "channels": 1, "side": 2}, 1),
    "one block": ({"blocks": 1, "every": True, "experts": 2}, 3),
}


@pytest.mark.parametrize(("shape", "heads"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_shapes_tell_the_size(tmp_path: Path, shape: dict[str, Any], heads: int, weights: Any) -> None:
    w = state(**shape)
    file = saved(
        tmp_path,
        **(
            {"ema": state(**shape, seed=1)}
            | {weights: w}
            | ({"model": state(**shape, seed=1)} if weights == "ema" else {})
        ),
    )
    single = read_exported(import_published(file, tmp_path / "out", heads=heads, weights=weights))
    config = single.config.model
    full: dict[str, Any] = {
        "hidden": 24,
        "blocks": 2,
        "experts": 4,
        "patch": 2,
        "channels": 4,
        "side": 3,
        "every": False,
    } | shape
    assert (config.hidden_size, config.num_blocks, config.patch, config.num_heads) == (
        full["hidden"],
        full["blocks"],
        full["patch"],
        heads,
    )
    assert (config.in_channels, config.out_channels, config.num_classes) == (full["channels"], 2 * full["channels"], 5)
    assert config.input_size == full["side"] * full["patch"]
    assert config.family == ("diffmoe" if full["experts"] else "dense")
    if full["experts"]:
        assert (config.num_experts, config.interleave) == (full["experts"], not full["every"])
        assert (single.config.sample.selection, single.config.sample.threshold) == ("count", "raw")
    assert (single.time_convention, single.config.sample.weights, single.provenance["file"]) == (
        "reversed",
        weights,
        "reference.pt",
    )
    model = load_exported(tmp_path / "out")
    compare_training(model, w, heads)
    compare_count(model, w, heads)


# ---- The way back ----


def same_bits(one: State, two: State) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name].dtype, two[name].shape) == (tensor.dtype, tensor.shape), name
        assert two[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


def open_reference(file: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize("experts", [0, 4])
def test_import_and_export_are_inverse_to_the_bit(tmp_path: Path, weights: Any, experts: int) -> None:
    ema, model = state(experts=experts), state(experts=experts, seed=1)
    ema["pos_embed"] = ema["pos_embed"] * (1 + 3e-6)  # averaging moves constants a little
    ema["final_layer.linear.bias"][:3] = torch.tensor([-0.0, 1e-42, 3e38])
    if experts:
        ema["blocks.1.mlp.ema_decay"] = torch.tensor([0.9500003])
        ema["blocks.1.mlp.experts.2.fc1.weight"] = torch.randn(24, 96).T  # not contiguous in the file
    file = saved(tmp_path, ema, {f"module._orig_mod.{name}": tensor for name, tensor in model.items()})
    folder = import_published(file, tmp_path / "out", heads=3, weights=weights)
    export_published(folder, tmp_path / "back" / "back.pt")
    content = open_reference(tmp_path / "back" / "back.pt")
    assert content.keys() == {"model", "ema", "args"}  # the optimiser's state is not carried
    assert content["args"] == ARGS
    same_bits(ema, content["ema"])
    same_bits({f"module._orig_mod.{name}": tensor for name, tensor in model.items()}, content["model"])
    assert read_exported(folder).provenance["left_out"] == ["opt"]
    if weights == "ema":
        assert torch.equal(load_exported(folder).positions, ema["pos_embed"][0])


def test_one_set_alone_can_be_kept(tmp_path: Path) -> None:
    file = saved(tmp_path, model=state(seed=1), args=None)
    folder = import_published(file, tmp_path / "out", heads=3, weights="model", both=False)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 0.6 * file.stat().st_size
    export_published(folder, tmp_path / "back.pt")
    content = open_reference(tmp_path / "back.pt")
    assert content.keys() == {"model", "ema"}
    for which in content:
        same_bits(state(seed=1), content[which])


def test_a_file_without_positions_and_decay_asks_for_the_size(tmp_path: Path) -> None:
    w = {name: tensor for name, tensor in state().items() if name != "pos_embed" and not name.endswith("ema_decay")}
    file = saved(tmp_path, w, w)
    with pytest.raises(CheckpointError, match="do not tell --heads and --input-size; give --heads and --input-size"):
        import_published(file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="do not tell --input-size; give --input-size"):
        import_published(file, tmp_path / "out", heads=3)
    folder = import_published(file, tmp_path / "out", heads=3, input_size=6)
    compare_training(load_exported(folder), w | {"pos_embed": positions(24, 3)}, 3)
    export_published(folder, tmp_path / "back.pt")
    same_bits(w, open_reference(tmp_path / "back.pt")["ema"])


def test_the_old_format_of_torch_is_read_too(tmp_path: Path) -> None:
    torch.save({"ema": state(), "args": ARGS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    folder = import_published(tmp_path / "old.pt", tmp_path / "out", heads=3)
    compare_count(load_exported(folder), state(), 3)


def test_thresholds_need_no_correction(imported: tuple[DiT, State]) -> None:
    model, w = imported
    predictor = model.moe_layers()[0].predictor
    assert predictor is not None
    assert torch.equal(predictor.threshold_for(InferenceRule()), w["blocks.1.mlp.expert_threshold"])
    assert Fraction(0.95) ** int(predictor.updates) < Fraction(1, 2**60)


# ---- A model of ours, in the reference's form ----


@pytest.mark.parametrize("experts", [0, 4])
def test_a_flow_model_of_ours_is_turned_exactly(tmp_path: Path, experts: int) -> None:
    """Sign and clock differ: the head's velocity rows are negated, and the first map of the time takes the reflected
    features.
    """
    folder = import_published(
        saved(tmp_path, state(experts=experts), state(experts=experts)), tmp_path / "out", heads=3
    )
    inner = {name: tensor.clone() for name, tensor in load_exported(folder).state_dict().items()}
    if experts:
        inner["blocks.1.ffn.predictor.updates"] = torch.tensor(3)
    config = read_exported(folder).config
    own = save_exported(inner, config, DataInfo(), tmp_path / "own", time_convention="forward")
    export_published(own, tmp_path / "own.pt")
    content = open_reference(tmp_path / "own.pt")
    same_bits(content["ema"], content["model"])
    assert content["ema"].keys() == state(experts=experts).keys()
    assert vars(content["args"])["hidden_size"] == 24
    assert torch.equal(content["ema"]["pos_embed"], positions(24, 3))
    if experts:  # what dynamic sampling uses after three moves
        stored = state()["blocks.1.mlp.expert_threshold"]
        torch.testing.assert_close(content["ema"]["blocks.1.mlp.expert_threshold"], stored / (1 - 0.95**3))
    back = import_published(tmp_path / "own.pt", tmp_path / "again", heads=3)
    given, w = inputs(6, 4), {name: tensor.double() for name, tensor in content["ema"].items()}
    clock = 1 - given["u"].double()
    for training in (True, False):
        expected, _ = reference(w, 3, given["latent"].double(), clock, given["y"], training)
        for model in (load_exported(own), load_exported(back)):
            model.train(training).set_inference(InferenceRule("count"))
            prediction = model(given["latent"], given["u"], given["y"]).prediction
            close(prediction[:, :4], -expected[:, :4])
            close(prediction[:, 4:], expected[:, 4:])
    assert not torch.equal(content["ema"]["t_embedder.mlp.0.weight"], inner["time.fc1.weight"])
    assert torch.equal(content["ema"]["t_embedder.mlp.2.weight"], inner["time.fc2.weight"])


def test_a_ddpm_model_has_the_same_convention(tmp_path: Path) -> None:
    folder = import_published(saved(tmp_path), tmp_path / "out", heads=3, objective="ddpm")
    assert read_exported(folder).time_convention == "forward"
    given, w = inputs(6, 4), {name: tensor.double() for name, tensor in state().items()}
    t = torch.tensor([0.0, 5.0, 10.0, 31.0, 7.0])
    model = load_exported(folder).train()
    close(
        model(given["latent"], t, given["y"]).prediction,
        reference(w, 3, given["latent"].double(), t.double(), given["y"], True)[0],
    )
    export_published(folder, tmp_path / "back.pt")
    same_bits(state(), open_reference(tmp_path / "back.pt")["ema"])


def test_other_families_are_not_the_references(tmp_path: Path) -> None:
    for key, value in (("family", "tc"), ("granularity", 2), ("shared_experts", 1)):
        tree = {
            "model": {"input_size": 4, "hidden_size": 8, "num_heads": 2, "num_blocks": 2, "num_experts": 4, key: value}
        }
        config = from_tree(tree)
        folder = save_exported(DiT(config.model), config, DataInfo(), tmp_path / key)
        with pytest.raises(CheckpointError, match=f"model.{key} {value}, which the reference"):
            export_published(folder, tmp_path / "file.pt")
    assert not (tmp_path / "file.pt").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = saved(tmp_path)
    folder = import_published(file, tmp_path / "out", heads=3)
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        import_published(file, folder, heads=3)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="exists: give the name of a new file"):
        export_published(folder, file)
    assert file.read_bytes() == before
    (tmp_path / "blocker").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_published(folder, tmp_path / "blocker" / "file.pt")
