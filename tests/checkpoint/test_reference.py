"""Reference checkpoints: what is imported computes what the reference computes, written here again from its formulas, and comes back."""

import argparse
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ep.checkpoint.reference import export_reference, import_reference
from diffmoe_ep.checkpoint.single import load_single, read_single, save_single
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.config import from_tree
from diffmoe_ep.diffusion.objective import RectifiedFlow
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule

State = dict[str, Tensor]

# ---- A reference file, made of shapes ----


def positions(hidden: int, side: int) -> Tensor:
    """The reference's fixed table (1, T, D): first half the column, second half the row, each sines then cosines."""
    rows = []
    for row in range(side):
        for column in range(side):
            values: list[float] = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / (hidden // 4)) for i in range(hidden // 4)]
                values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(values)
    return torch.from_numpy(np.array(rows, dtype=np.float32))[None]


def state(
    hidden: int = 24,
    blocks: int = 2,
    experts: int = 4,
    patch: int = 2,
    channels: int = 4,
    side: int = 3,
    seed: int = 0,
    every: bool = False,
) -> State:
    """A reference state with all weights away from zero; 0 experts: dense; every: MoE in all blocks."""
    generator = torch.Generator().manual_seed(seed)

    def linear(name: str, outs: int, ins: int, size: float = 1.0) -> State:
        weight = torch.randn(outs, ins, generator=generator) * size / math.sqrt(ins)
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(outs, generator=generator) * 0.3}

    made = {"pos_embed": positions(hidden, side)}
    made["x_embedder.proj.weight"] = torch.randn(hidden, channels, patch, patch, generator=generator) * 0.3
    made["x_embedder.proj.bias"] = torch.randn(hidden, generator=generator) * 0.3
    made |= linear("t_embedder.mlp.0", hidden, 256) | linear("t_embedder.mlp.2", hidden, hidden)
    made["y_embedder.embedding_table.weight"] = torch.randn(6, hidden, generator=generator)
    for block in range(blocks):
        name = f"blocks.{block}"
        made |= linear(f"{name}.attn.qkv", 3 * hidden, hidden, 2.0) | linear(f"{name}.attn.proj", hidden, hidden)
        if experts and (every or block % 2):
            made[f"{name}.mlp.gate_weight"] = torch.randn(experts, hidden, generator=generator) / math.sqrt(hidden)
            made[f"{name}.mlp.expert_threshold"] = 0.2 + 0.5 * torch.rand(experts, generator=generator)
            made[f"{name}.mlp.ema_decay"] = torch.tensor(0.95)
            for expert in range(experts):
                made |= linear(f"{name}.mlp.experts.{expert}.fc1", 4 * hidden, hidden)
                made |= linear(f"{name}.mlp.experts.{expert}.fc2", hidden, 4 * hidden)
            made |= linear(f"{name}.mlp.capacity_predictor.0", hidden, hidden)
            made |= linear(f"{name}.mlp.capacity_predictor.2", experts, hidden)
            # Expert 1 finds all tokens exactly at its threshold: sigmoid(0) = 0.5, so it takes none.
            made[f"{name}.mlp.capacity_predictor.2.weight"][1] = 0
            made[f"{name}.mlp.capacity_predictor.2.bias"][1] = 0
            made[f"{name}.mlp.expert_threshold"][1] = 0.5
        else:
            made |= linear(f"{name}.mlp.fc1", 4 * hidden, hidden) | linear(f"{name}.mlp.fc2", hidden, 4 * hidden)
        made |= linear(f"{name}.adaLN_modulation.1", 6 * hidden, hidden)
    return (
        made | linear("final_layer.linear", patch**2 * 2 * channels, hidden) | linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    )


ARGS = argparse.Namespace(image_size=256, lr=1e-4, ema=None, model="a name", betas=[0.9, 0.999], flag=True)


def saved(path: Path, ema: State | None = None, model: State | None = None, **more: Any) -> Path:
    file = path / "reference.pt"
    ema = state() if ema is None else ema
    content = {"model": model if model is not None else state(seed=1), "ema": ema, "opt": {"state": {0: {"step": 3}}}, "args": ARGS} | more
    torch.save({key: value for key, value in content.items() if value is not None}, file)
    return file


# ---- The reference's formulas, in float64, on its own state; each mutation is one mistake in them ----

MUTATIONS = ("scale of t", "qkv order", "unpatchify order", "position halves", "clock", "strict >", "softmax axis")


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def feed_forward(w: State, name: str, x: Tensor) -> Tensor:
    inner = linear(w, f"{name}.fc1", x)
    return linear(w, f"{name}.fc2", 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))))


def mixture(w: State, name: str, x: Tensor, training: bool, mutation: str) -> tuple[Tensor, Tensor]:
    """Tokens of the whole batch (P, D) -> mixed tokens, and the predictor's loss."""
    experts = len(w[f"{name}.gate_weight"])
    p = torch.softmax(x @ w[f"{name}.gate_weight"].T, dim=0 if mutation == "softmax axis" else 1)
    likely = torch.sigmoid(linear(w, f"{name}.capacity_predictor.2", silu(linear(w, f"{name}.capacity_predictor.0", x.detach()))))
    threshold = w[f"{name}.expert_threshold"]
    over = likely >= threshold if mutation == "strict >" else likely > threshold
    mixed, loss = torch.zeros_like(x), torch.zeros((), dtype=x.dtype)
    for expert in range(experts):
        k = len(x) // experts if training else int(over[:, expert].sum())
        taken = p[:, expert].argsort(descending=True)[:k]
        answer = feed_forward(w, f"{name}.experts.{expert}", x[taken])
        mixed = mixed.index_add(0, taken, p[taken, expert, None] * answer)
        chosen = torch.zeros(len(x), dtype=torch.bool)
        chosen[taken] = True
        q = likely[:, expert]
        loss = loss - torch.where(chosen, q, 1 - q).log().sum() / (len(x) * experts)
    return mixed, loss


def reference(w: State, heads: int, x: Tensor, t: Tensor, y: Tensor, training: bool, mutation: str = "") -> tuple[Tensor, Tensor]:
    """What the reference predicts at its own clock t, and the sum of its predictors' losses."""
    weight, patch = w["x_embedder.proj.weight"], w["x_embedder.proj.weight"].shape[-1]
    d, side = len(weight), x.shape[-1] // patch
    cuts = [x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] for i in range(side) for j in range(side)]
    h = torch.stack([torch.einsum("bcij,dcij->bd", cut, weight) for cut in cuts], dim=1) + w["x_embedder.proj.bias"]
    table = w["pos_embed"]
    h = h + (torch.cat(table.split(d // 2, dim=2)[::-1], dim=2) if mutation == "position halves" else table)
    angles = (t * 1000 if mutation == "scale of t" else t)[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=t.dtype) / 128)
    c = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    total = torch.zeros((), dtype=x.dtype)
    for block in range(sum(name.endswith("attn.proj.bias") for name in w)):
        name = f"blocks.{block}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(w, f"{name}.adaLN_modulation.1", c)[:, None].split(d, dim=2)
        parts = linear(w, f"{name}.attn.qkv", norm(h) * (1 + scale_a) + shift_a).split(d, dim=2)
        q, k, v = (parts[1], parts[2], parts[0]) if mutation == "qkv order" else parts
        mixed = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            attention = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(d / heads), dim=2)
            mixed.append(attention @ v[..., part])
        h = h + gate_a * linear(w, f"{name}.attn.proj", torch.cat(mixed, dim=2))
        z = norm(h) * (1 + scale_m) + shift_m
        if f"{name}.mlp.gate_weight" in w:
            out, loss = mixture(w, f"{name}.mlp", z.flatten(0, 1), training, mutation)
            total, z = total + loss, out.view_as(z)
        else:
            z = feed_forward(w, f"{name}.mlp", z)
        h = h + gate_m * z
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c)[:, None].split(d, dim=2)
    out = linear(w, "final_layer.linear", norm(h) * (1 + scale) + shift)
    channels = out.shape[2] // patch**2
    image = torch.zeros(len(x), channels, side * patch, side * patch, dtype=x.dtype)
    for i in range(patch):
        for j in range(patch):
            for channel in range(channels):
                number = (channel * patch + i) * patch + j if mutation == "unpatchify order" else (i * patch + j) * channels + channel
                image[:, channel, i::patch, j::patch] = out[:, :, number].view(len(x), side, side)
    return image, total


# ---- What is compared ----


def inputs(size: int, channels: int, batch: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (batch, channels, size, size)
    latent, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    u = torch.randint(0, 1024, (batch,), generator=generator) / 1024  # 1 - u is exact
    return {"latent": latent, "noise": noise, "u": u, "y": torch.randint(0, 6, (batch,), generator=generator)}


def close(ours: Tensor, theirs: Tensor) -> None:
    """To float32 rounding: of the largest value, through a few layers."""
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=0, atol=5e-6 * max(1.0, float(theirs.detach().abs().max())))


def compare_training(model: DiT, w: State, heads: int, mutation: str = "") -> None:
    """Predictions, losses and gradients of one training step."""
    given = inputs(model.config.input_size, model.config.in_channels)
    noised = RectifiedFlow().noised(given["latent"], given["noise"], given["u"])
    output = model.train()(noised.x, noised.t, given["y"])
    loss = RectifiedFlow().loss(output.prediction, noised) + output.auxiliary
    model.zero_grad()
    loss.backward()

    w = {name: tensor.double().requires_grad_(name != "pos_embed") for name, tensor in w.items()}
    latent, noise, clock = given["latent"].double(), given["noise"].double(), 1 - given["u"].double()
    at = clock[:, None, None, None]
    prediction, predictors = reference(
        w, heads, at * latent + (1 - at) * noise, 1 - clock if mutation == "clock" else clock, given["y"], True, mutation
    )
    channels = latent.shape[1]
    (((prediction[:, :channels] - (latent - noise)) ** 2).mean() + predictors).backward()
    flow = ((prediction[:, :channels] - (latent - noise)) ** 2).mean()

    close(output.prediction[:, :channels], -prediction[:, :channels])
    close(output.prediction[:, channels:], prediction[:, channels:])
    close(RectifiedFlow().loss(output.prediction, noised), flow)
    close(output.auxiliary, predictors)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, tensor in w.items():
        if name != "pos_embed" and not name.endswith(("expert_threshold", "ema_decay")):
            ours = part(gradients, name)
            close(
                ours if ours is not None else torch.zeros(tensor.shape),
                tensor.grad if tensor.grad is not None else torch.zeros_like(tensor),
            )


def compare_count(model: DiT, w: State, heads: int, mutation: str = "") -> None:
    """Predictions of `count` inference with the raw thresholds, and with the corrected ones, which are the same."""
    given = inputs(model.config.input_size, model.config.in_channels)
    clock = 1 - given["u"].double()
    w = {name: tensor.double() for name, tensor in w.items()}
    prediction, _ = reference(w, heads, given["latent"].double(), 1 - clock if mutation == "clock" else clock, given["y"], False, mutation)
    channels = model.config.in_channels
    for threshold in ("raw", "dynamic"):
        model.eval().set_inference(InferenceRule("count", threshold))  # type: ignore[arg-type]
        with torch.no_grad():
            output = model(given["latent"], given["u"], given["y"])
        close(output.prediction[:, :channels], -prediction[:, :channels])
        close(output.prediction[:, channels:], prediction[:, channels:])


PLACES = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "adaLN_modulation.1": "modulation",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
    "mlp.capacity_predictor.0": "ffn.predictor.fc1",
    "mlp.capacity_predictor.2": "ffn.predictor.fc2",
    "x_embedder.proj": "patches.projection",
    "t_embedder.mlp.0": "time.fc1",
    "t_embedder.mlp.2": "time.fc2",
    "y_embedder.embedding_table": "label.table",
    "final_layer.linear": "head.projection",
    "final_layer.adaLN_modulation.1": "head.modulation",
}


def part(ours: dict[str, Tensor | None], name: str) -> Tensor | None:
    """What the reference calls `name`, among our tensors."""
    block = re.match(r"(blocks\.\d+\.)(.*)", name)
    start, rest = (block[1], block[2]) if block else ("", name)
    if rest == "mlp.gate_weight":
        return ours[f"{start}ffn.router.weight"]
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(fc\d)\.(weight|bias)", rest)
    if expert:
        stack = ours[f"{start}ffn.experts.{expert[2]}_{expert[3]}"]
        assert stack is not None
        return stack[int(expert[1])].T if expert[3] == "weight" else stack[int(expert[1])]
    place, _, kind = rest.rpartition(".")
    return ours[f"{start}{PLACES[place]}.{kind}"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiT, State]:
    path = tmp_path_factory.mktemp("reference")
    w = state()
    return load_single(import_reference(saved(path, w), path / "out", heads=3)), w


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
        tmp_path, **({"ema": state(**shape, seed=1)} | {weights: w} | ({"model": state(**shape, seed=1)} if weights == "ema" else {}))
    )
    single = read_single(import_reference(file, tmp_path / "out", heads=heads, weights=weights))
    config = single.config.model
    full: dict[str, Any] = {"hidden": 24, "blocks": 2, "experts": 4, "patch": 2, "channels": 4, "side": 3, "every": False} | shape
    assert (config.hidden, config.blocks, config.patch, config.heads) == (full["hidden"], full["blocks"], full["patch"], heads)
    assert (config.in_channels, config.out_channels, config.num_classes) == (full["channels"], 2 * full["channels"], 5)
    assert config.input_size == full["side"] * full["patch"]
    assert config.family == ("diffmoe" if full["experts"] else "dense")
    if full["experts"]:
        assert (config.num_experts, config.interleave) == (full["experts"], not full["every"])
        assert (single.config.sample.selection, single.config.sample.threshold) == ("count", "raw")
    assert (single.clock, single.config.sample.weights, single.provenance["file"]) == ("reversed", weights, "reference.pt")
    model = load_single(tmp_path / "out")
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
    ema["final_layer.linear.bias"][:3] = torch.tensor([-0.0, 1e-42, math.nan])
    if experts:
        ema["blocks.1.mlp.ema_decay"] = torch.tensor([0.9500003])
        ema["blocks.1.mlp.experts.2.fc1.weight"] = torch.randn(24, 96).T  # not contiguous in the file
    file = saved(tmp_path, ema, {f"module._orig_mod.{name}": tensor for name, tensor in model.items()})
    folder = import_reference(file, tmp_path / "out", heads=3, weights=weights)
    export_reference(folder, tmp_path / "back" / "back.pt")
    content = open_reference(tmp_path / "back" / "back.pt")
    assert content.keys() == {"model", "ema", "args"}  # the optimiser's state is not carried
    assert content["args"] == ARGS
    same_bits(ema, content["ema"])
    same_bits({f"module._orig_mod.{name}": tensor for name, tensor in model.items()}, content["model"])
    assert read_single(folder).provenance["left_out"] == ["opt"]
    if weights == "ema":
        assert torch.equal(load_single(folder).positions, ema["pos_embed"][0])


def test_one_set_alone_can_be_kept(tmp_path: Path) -> None:
    file = saved(tmp_path, model=state(seed=1), args=None)
    folder = import_reference(file, tmp_path / "out", heads=3, weights="model", both=False)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 0.6 * file.stat().st_size
    export_reference(folder, tmp_path / "back.pt")
    content = open_reference(tmp_path / "back.pt")
    assert content.keys() == {"model", "ema"}
    for which in content:
        same_bits(state(seed=1), content[which])


def test_a_file_without_positions_and_decay_asks_for_the_size(tmp_path: Path) -> None:
    w = {name: tensor for name, tensor in state().items() if name != "pos_embed" and not name.endswith("ema_decay")}
    file = saved(tmp_path, w, w)
    with pytest.raises(CheckpointError, match="do not tell --heads and --input-size; give --heads and --input-size"):
        import_reference(file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="do not tell --input-size; give --input-size"):
        import_reference(file, tmp_path / "out", heads=3)
    folder = import_reference(file, tmp_path / "out", heads=3, input_size=6)
    compare_training(load_single(folder), w | {"pos_embed": positions(24, 3)}, 3)
    export_reference(folder, tmp_path / "back.pt")
    same_bits(w, open_reference(tmp_path / "back.pt")["ema"])


def test_the_old_format_of_torch_is_read_too(tmp_path: Path) -> None:
    torch.save({"ema": state(), "args": ARGS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    folder = import_reference(tmp_path / "old.pt", tmp_path / "out", heads=3)
    compare_count(load_single(folder), state(), 3)


def test_thresholds_need_no_correction(imported: tuple[DiT, State]) -> None:
    model, w = imported
    predictor = model.moe_layers()[0].predictor
    assert predictor is not None
    assert torch.equal(predictor.bound(InferenceRule()), w["blocks.1.mlp.expert_threshold"])
    assert Fraction(0.95) ** int(predictor.updates) < Fraction(1, 2**60)


# ---- A model of ours, in the reference's form ----


@pytest.mark.parametrize("experts", [0, 4])
def test_a_flow_model_of_ours_is_turned_exactly(tmp_path: Path, experts: int) -> None:
    """Sign and clock differ: the head's velocity rows are negated, and the first map of the time takes the reflected features."""
    folder = import_reference(saved(tmp_path, state(experts=experts), state(experts=experts)), tmp_path / "out", heads=3)
    inner = {name: tensor.clone() for name, tensor in load_single(folder).state_dict().items()}
    if experts:
        inner["blocks.1.ffn.predictor.updates"] = torch.tensor(3)
    config = read_single(folder).config
    own = save_single(inner, config, {}, tmp_path / "own", clock="forward")
    export_reference(own, tmp_path / "own.pt")
    content = open_reference(tmp_path / "own.pt")
    same_bits(content["ema"], content["model"])
    assert content["ema"].keys() == state(experts=experts).keys()
    assert vars(content["args"])["hidden"] == 24
    assert torch.equal(content["ema"]["pos_embed"], positions(24, 3))
    if experts:  # what dynamic sampling uses after three moves
        stored = state()["blocks.1.mlp.expert_threshold"]
        torch.testing.assert_close(content["ema"]["blocks.1.mlp.expert_threshold"], stored / (1 - 0.95**3))
    back = import_reference(tmp_path / "own.pt", tmp_path / "again", heads=3)
    given, w = inputs(6, 4), {name: tensor.double() for name, tensor in content["ema"].items()}
    clock = 1 - given["u"].double()
    for training in (True, False):
        expected, _ = reference(w, 3, given["latent"].double(), clock, given["y"], training)
        for model in (load_single(own), load_single(back)):
            model.train(training).set_inference(InferenceRule("count"))
            prediction = model(given["latent"], given["u"], given["y"]).prediction
            close(prediction[:, :4], -expected[:, :4])
            close(prediction[:, 4:], expected[:, 4:])
    assert not torch.equal(content["ema"]["t_embedder.mlp.0.weight"], inner["time.fc1.weight"])
    assert torch.equal(content["ema"]["t_embedder.mlp.2.weight"], inner["time.fc2.weight"])


def test_a_ddpm_model_has_the_same_convention(tmp_path: Path) -> None:
    folder = import_reference(saved(tmp_path), tmp_path / "out", heads=3, objective="ddpm")
    assert read_single(folder).clock == "forward"
    given, w = inputs(6, 4), {name: tensor.double() for name, tensor in state().items()}
    t = torch.tensor([0.0, 5.0, 10.0, 31.0, 7.0])
    model = load_single(folder).train()
    close(model(given["latent"], t, given["y"]).prediction, reference(w, 3, given["latent"].double(), t.double(), given["y"], True)[0])
    export_reference(folder, tmp_path / "back.pt")
    same_bits(state(), open_reference(tmp_path / "back.pt")["ema"])


def test_other_families_are_not_the_references(tmp_path: Path) -> None:
    for key, value in (("family", "tc"), ("granularity", 2), ("shared_experts", 1)):
        tree = {"model": {"input_size": 4, "hidden": 8, "heads": 2, "blocks": 2, "num_experts": 4, key: value}}
        config = from_tree(tree)
        folder = save_single(DiT(config.model), config, {}, tmp_path / key)
        with pytest.raises(CheckpointError, match=f"model.{key} {value}, which the reference"):
            export_reference(folder, tmp_path / "file.pt")
    assert not (tmp_path / "file.pt").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = saved(tmp_path)
    folder = import_reference(file, tmp_path / "out", heads=3)
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        import_reference(file, folder, heads=3)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="exists: give the name of a new file"):
        export_reference(folder, file)
    assert file.read_bytes() == before
    (tmp_path / "blocker").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_reference(folder, tmp_path / "blocker" / "file.pt")


# ---- What is refused ----


class Attack:
    """Runs something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class Allowed:
    """A class that some other library told torch to trust."""


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["args", "ema", "opt", "inside args"])
def test_a_file_that_would_run_something_is_refused(tmp_path: Path, place: str, old: bool) -> None:
    target = tmp_path / "it ran"
    for function, arguments, name in (
        (os.mkdir, (str(target),), "posix.mkdir"),
        (eval, (f"open({str(target)!r}, 'w')",), "eval"),
        (getattr, (argparse.Namespace, "__init__"), "getattr"),
    ):
        attack = Attack(function, *arguments)
        value = {"args": attack, "ema": {"a": attack}, "opt": [attack], "inside args": argparse.Namespace(lr=attack)}[place]
        content = {"model": {}, "ema": state(), "args": ARGS} | {place.removeprefix("inside "): value}
        torch.save(content, tmp_path / "forged.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(
            CheckpointError, match=f"holds more than tensors and plain arguments: it asks for {name}.*It was not run"
        ) as info:
            import_reference(tmp_path / "forged.pt", tmp_path / "out", heads=3)
        assert "weights_only" not in str(info.value)  # torch's own message advises to open the file without protection
        assert not target.exists() and not (tmp_path / "out").exists()


def test_what_others_allowed_is_refused_too(tmp_path: Path) -> None:
    torch.save({"ema": state(), "args": Allowed()}, tmp_path / "file.pt")
    with torch.serialization.safe_globals([Allowed]):
        before = torch.serialization.get_safe_globals()
        with pytest.raises(CheckpointError, match=r"it asks for .*Allowed"):
            import_reference(tmp_path / "file.pt", tmp_path / "out", heads=3)
        assert set(torch.serialization.get_safe_globals()) == set(before) >= {Allowed}


def without(*names: str) -> Callable[[State], None]:
    return lambda w: [w.pop(name) for name in names] and None


def put(name: str, value: Any) -> Callable[[State], None]:
    return lambda w: w.update({name: value(w) if callable(value) else value})


def shift_blocks(w: State) -> None:
    for name in [name for name in w if name.startswith("blocks.1.")]:
        w[name.replace("blocks.1.", "blocks.2.")] = w.pop(name)


def swap_blocks(w: State) -> None:
    for name in [name for name in w if name.startswith("blocks.")]:
        w[name.replace("blocks.0.", "blocks.x.").replace("blocks.1.", "blocks.0.").replace("blocks.x.", "blocks.1.")] = w.pop(name)


BAD: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (without("blocks.1.mlp.experts.3.fc2.bias"), r"ema has no tensor blocks.1.mlp.experts.3.fc2.bias, of shape \(24,\)"),
    "no patches": (without("x_embedder.proj.weight"), "has no tensor x_embedder.proj.weight: it is no checkpoint of the reference"),
    "unknown": (put("blocks.0.norm1.weight", torch.ones(24)), "ema holds blocks.0.norm1.weight, which"),
    "more experts": (put("blocks.1.mlp.experts.4.fc1.bias", torch.ones(96)), "holds blocks.1.mlp.experts.4.fc1.bias"),
    "shape": (
        put("blocks.1.mlp.experts.0.fc1.weight", torch.ones(48, 24)),
        r"fc1.weight has shape \(48, 24\) there and \(96, 24\)",
    ),
    "type": (put("t_embedder.mlp.0.bias", torch.ones(24).bfloat16()), "t_embedder.mlp.0.bias has type torch.bfloat16 there and F32"),
    "dimensions": (put("final_layer.linear.weight", torch.ones(32)), r"final_layer.linear.weight has shape \(32,\); it has 2 dimensions"),
    "head": (put("final_layer.linear.weight", torch.ones(31, 24)), "final_layer.linear.weight has 31 rows, no multiple of the patch's"),
    "value": (put("x_embedder.proj.bias", [1.0]), "x_embedder.proj.bias is no plain tensor"),
    "expanded": (put("x_embedder.proj.bias", torch.ones(1).expand(10**12)), "x_embedder.proj.bias is no plain tensor"),
    "sparse": (put("x_embedder.proj.bias", torch.ones(24).to_sparse()), "x_embedder.proj.bias is no plain tensor"),
    "no square": (put("pos_embed", lambda w: w["pos_embed"][:, :8]), r"pos_embed has shape \(1, 8, 24\); it is \(1, T, D\) of a square"),
    "position halves": (put("pos_embed", lambda w: w["pos_embed"].roll(12, 2)), "pos_embed are not the fixed sine-cosine positions"),
    "trained positions": (put("pos_embed", lambda w: w["pos_embed"] + 0.01), r"differ by 0.01\): there the first half of D codes"),
    "unknown positions": (put("pos_embed", lambda w: w["pos_embed"] * math.nan), "pos_embed are not the fixed sine-cosine positions"),
    "wide positions": (put("pos_embed", torch.ones(1, 9, 26)), r"pos_embed is \(1, 9, 26\)"),
    "decay": (put("blocks.1.mlp.ema_decay", torch.tensor(1.5)), "blocks.1.mlp.ema_decay is 1.5; it is one number between 0 and 1"),
    "no predictor": (
        without(*(name for name in state() if "capacity_predictor" in name)),
        "has no blocks.1.mlp.capacity_predictor.0.weight, so its experts are not DiffMoE's .*DiffMoE and Dense can be imported",
    ),
    "gap": (shift_blocks, "blocks are not numbered 0, 1, 2"),
    "other blocks": (swap_blocks, "blocks 0 are MoE; only every odd block, every block or none"),
    "prefix": (put("module.x_embedder.proj.bias", torch.ones(24)), "ema holds module.x_embedder.proj.bias"),
    "mixed prefix": (lambda w: (w.update(OrderedDict({"module.a": w.pop("pos_embed")} | w)), w.move_to_end("module.a", last=False)),
                     "x_embedder.proj.weight does not begin with 'module.'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_other_tensors_are_refused_by_name(tmp_path: Path, change: Callable[[State], Any], message: str) -> None:
    w = OrderedDict(state())
    change(w)
    file = saved(tmp_path, w)
    with pytest.raises(CheckpointError, match=message):
        import_reference(file, tmp_path / "out", heads=3)
    assert not (tmp_path / "out").exists()


def test_the_other_set_is_checked_as_well(tmp_path: Path) -> None:
    file = saved(tmp_path, state(), state(experts=2))
    with pytest.raises(CheckpointError, match=r"model: blocks.1.mlp.gate_weight has shape \(2, 24\) there and \(4, 24\)"):
        import_reference(file, tmp_path / "out", heads=3)


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    file = saved(tmp_path)
    with pytest.raises(CheckpointError, match="do not tell --heads; give --heads$"):
        import_reference(file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--heads 5 does not divide the hidden size 24"):
        import_reference(file, tmp_path / "out", heads=5)
    with pytest.raises(CheckpointError, match="is of --input-size 6 by its pos_embed, not 32"):
        import_reference(file, tmp_path / "out", heads=3, input_size=32)
    assert import_reference(file, tmp_path / "out", heads=3, input_size=6).is_dir()


def test_a_published_width_comes_with_a_hint(tmp_path: Path) -> None:
    file = saved(tmp_path, state(hidden=384, blocks=1, experts=0, side=1))
    with pytest.raises(CheckpointError, match=r"give --heads \(of the published models, the one of hidden size 384 has 6 heads\)"):
        import_reference(file, tmp_path / "out")


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refused(content: Any, message: str, **options: Any) -> None:
        if isinstance(content, bytes):
            (tmp_path / "file.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match=message):
            import_reference(tmp_path / "file.pt", tmp_path / "out", heads=3, **options)

    with pytest.raises(CheckpointError, match="nowhere.pt is not a file"):
        import_reference(tmp_path / "nowhere.pt", tmp_path / "out", heads=3)
    refused(b"", "cannot be read")
    refused(b"some text that is no checkpoint", "holds more than tensors|cannot be read")
    refused(saved(tmp_path).read_bytes()[:5000], "cannot be read|holds more than tensors")
    refused(state(), "is no dictionary with model, ema and args")
    refused([state()], "is no dictionary with model, ema and args")
    refused({"model": state(), "args": ARGS}, r"holds no ema \(it holds model, args\); ask for what it has with --weights")
    refused({"ema": {}}, "ema is no state of a model")
    refused({"ema": state()["pos_embed"]}, "ema is no state of a model")


def test_arguments_that_are_no_plain_data_are_kept_as_text(tmp_path: Path) -> None:
    args = argparse.Namespace(decays=(0.9, 0.99), inner=argparse.Namespace(a=1), worst=math.inf)
    folder = import_reference(saved(tmp_path, args=args), tmp_path / "out", heads=3)
    kept = json.loads((folder / "config.json").read_text())["provenance"]["args"]
    assert kept == {"decays": [0.9, 0.99], "inner": "Namespace(a=1)", "worst": "inf"}
