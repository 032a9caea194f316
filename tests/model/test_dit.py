"""The transformer against the formulas, written again in plain float64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import ModelConfig
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.embed import sine_positions
from diffmoe_ep.model.initialize import initialize

SMALL = ModelConfig(
    family="dense",
    input_size=6,
    in_channels=2,
    out_channels=3,
    patch=2,
    hidden_size=8,
    num_heads=2,
    num_blocks=2,
    num_classes=4,
)


def busy(model: ModelConfig, seed: int = 0) -> DiT:
    """A model in float64 whose weights are all away from zero."""
    made = DiT(model).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    return made


def inputs(model: ModelConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(
        batch, model.in_channels, model.input_size, model.input_size, generator=generator, dtype=torch.float64
    )
    return (
        x,
        torch.rand(batch, generator=generator, dtype=torch.float64),
        torch.randint(0, model.num_classes + 1, (batch,), generator=generator),
    )


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def formula(m: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The dense forward for one sample at a time, tokens and heads in loops."""
    w, c = dict(m.named_parameters()), m.config
    side, d, heads = c.input_size // c.patch, c.hidden_size, c.num_heads
    images = []
    for image, time, label in zip(x, t, y, strict=True):
        tokens = []
        for row in range(side):
            for column in range(side):
                cut = image[:, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2]
                token = (w["patches.projection.weight"] * cut).sum((1, 2, 3)) + w["patches.projection.bias"]
                tokens.append(token + sine_positions(d, side)[row * side + column])
        h = torch.stack(tokens)
        angles = torch.tensor([time * math.exp(-math.log(10000) * j / 128) for j in range(128)], dtype=torch.float64)
        e = torch.cat([angles.cos(), angles.sin()])
        e = w["time.fc2.weight"] @ F.silu(w["time.fc1.weight"] @ e + w["time.fc1.bias"]) + w["time.fc2.bias"]
        cond = F.silu(e + w["label.table.weight"][label])
        for i in range(c.num_blocks):
            b = f"blocks.{i}."
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
                w[b + "modulation.weight"] @ cond + w[b + "modulation.bias"]
            ).split(d)
            z = norm(h) * (1 + scale_a) + shift_a
            q, k, v = (z @ w[b + "attention.qkv.weight"].T + w[b + "attention.qkv.bias"]).split(d, dim=1)
            mixed = []
            for head in range(heads):
                part = slice(head * d // heads, (head + 1) * d // heads)
                mixed.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d / heads), dim=1) @ v[:, part])
            h = h + gate_a * (
                torch.cat(mixed, dim=1) @ w[b + "attention.projection.weight"].T + w[b + "attention.projection.bias"]
            )
            z = norm(h) * (1 + scale_m) + shift_m
            inner = z @ w[b + "ffn.fc1.weight"].T + w[b + "ffn.fc1.bias"]
            gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            h = h + gate_m * (gelu @ w[b + "ffn.fc2.weight"].T + w[b + "ffn.fc2.bias"])
        shift, scale = (w["head.modulation.weight"] @ cond + w["head.modulation.bias"]).split(d)
        out = (norm(h) * (1 + scale) + shift) @ w["head.projection.weight"].T + w["head.projection.bias"]
        picture = torch.zeros(c.out_channels, c.input_size, c.input_size, dtype=torch.float64)
        for token, features in enumerate(out):
            for number, value in enumerate(features):
                row, column, channel = (
                    number // (2 * c.out_channels),
                    number // c.out_channels % 2,
                    number % c.out_channels,
                )
                picture[channel, token // side * 2 + row, token % side * 2 + column] = value
        images.append(picture)
    return torch.stack(images)


def test_the_dense_forward_is_the_formula() -> None:
    model = busy(SMALL)
    output = model(*inputs(SMALL))
    torch.testing.assert_close(output.prediction, formula(model, *inputs(SMALL)), rtol=0, atol=1e-9)
    assert output.auxiliary.item() == 0
    assert output.layers == ()


def test_positions_are_sines_then_cosines_of_each_coordinate() -> None:
    table = sine_positions(8, 3)  # D/4 = 2 frequencies: 1 and 1/100
    row, column = 2, 1
    expected = [
        f(coordinate * omega) for coordinate in (column, row) for f in (math.sin, math.cos) for omega in (1.0, 0.01)
    ]
    assert table[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("interleave", [True, False])
def test_the_start_is_the_identity(interleave: bool) -> None:
    """adaLN-Zero: the output is zero, and only the head's last map and the predictors get gradients."""
    config = dataclasses.replace(SMALL, family="diffmoe", num_experts=4, num_blocks=4, interleave=interleave)
    model = initialize(DiT(config), 0)
    x, t, y = inputs(config, 8)
    output = model(x.float(), t.float(), y)
    assert output.prediction.abs().max() == 0
    ((output.prediction - 1).square().mean() + output.auxiliary).backward()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert moved == {"head.projection.weight", "head.projection.bias"} | {
        name for name, _ in model.named_parameters() if "predictor" in name
    }
    assert len(output.layers) == (2 if interleave else 4)


@pytest.mark.parametrize(("reduction", "weight"), [("sum", 1.0), ("mean", 0.5)])
def test_the_auxiliary_is_the_predictors_loss(reduction: str, weight: float) -> None:
    config = dataclasses.replace(
        SMALL, family="diffmoe", num_experts=4, num_blocks=4, predictor_reduction=reduction, predictor_weight=weight
    )
    output = busy(config)(*inputs(config, 8))
    losses = torch.stack([report.loss for report in output.layers])
    assert output.auxiliary.item() == pytest.approx(
        weight * (losses.sum() if reduction == "sum" else losses.mean()).item(), rel=1e-12
    )


def test_initial_weights_have_their_distributions() -> None:
    config = ModelConfig(hidden_size=64, num_heads=4, num_blocks=2, num_experts=8)
    weights = dict(initialize(DiT(config), 0).named_parameters())
    for name, parameter in weights.items():
        if name.endswith("bias") or "modulation" in name or name == "head.projection.weight":
            assert parameter.abs().max() == 0, name
    for name, std in {
        "label.table.weight": 0.02,
        "time.fc1.weight": 0.02,
        "time.fc2.weight": 0.02,
        "blocks.1.ffn.router.weight": 0.006,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.1), name
    bounds = {
        "blocks.0.ffn.fc1.weight": 64 + 256,
        "blocks.0.attention.qkv.weight": 64 + 192,
        "patches.projection.weight": 16 + 64,
    }
    for name, fans in bounds.items():
        assert weights[name].abs().max().item() == pytest.approx(math.sqrt(6 / fans), rel=0.05), name
    for expert in weights["blocks.1.ffn.experts.fc1_weight"]:  # each expert by itself, not the stack
        assert expert.abs().max().item() == pytest.approx(math.sqrt(6 / 320), rel=0.05)


def test_times_are_told_apart_in_bf16() -> None:
    """Steps of 1/1000, in float32's own numbers: rounded to bfloat16, neighbours would be one."""
    model = initialize(DiT(SMALL), 0)
    t, label = torch.arange(1000) / 1000, torch.zeros(1000, dtype=torch.int64)
    with torch.no_grad():
        wanted, _ = model.embed(t, label)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = model.embed(t, label)
    assert torch.equal(found, wanted)
    assert len(found.unique(dim=0)) == 1000


@pytest.mark.parametrize("condition", ["class", "text"])
def test_no_samples_never_reach_the_kernels_of_attention(monkeypatch: pytest.MonkeyPatch, condition: str) -> None:
    def refuses(query: Tensor, *others: object, **more: object) -> Tensor:
        raise AssertionError(f"attention over {tuple(query.shape)}")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuses)
    size = dataclasses.replace(SMALL, condition=condition, text_width=4, text_length=3)
    x, t, label = inputs(size, 0)
    captions = CaptionFeatures(torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64))
    assert busy(size)(x, t, captions if condition == "text" else label).prediction.shape == (0, 3, 6, 6)
    with pytest.raises(AssertionError, match="attention over"):
        busy(SMALL)(*inputs(SMALL, 1))
