"""A reference checkpoint made of shapes, and what the reference computes, written here again from its formulas in
float64.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.checkpoint.time_convention import REWRITTEN, reverse_time
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
        made
        | linear("final_layer.linear", patch**2 * 2 * channels, hidden)
        | linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    )


ARGS = argparse.Namespace(image_size=256, lr=1e-4, ema=None, model="a name", betas=[0.9, 0.999], flag=True)


def saved(path: Path, ema: State | None = None, model: State | None = None, **more: Any) -> Path:
    file = path / "reference.pt"
    ema = state() if ema is None else ema
    content = {
        "model": model if model is not None else state(seed=1),
        "ema": ema,
        "opt": {"state": {0: {"step": 3}}},
        "args": ARGS,
    } | more
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
    return linear(
        w, f"{name}.fc2", 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    )


def mixture(w: State, name: str, x: Tensor, training: bool, mutation: str) -> tuple[Tensor, Tensor]:
    """Tokens of the whole batch (P, D) -> mixed tokens, and the predictor's loss."""
    experts = len(w[f"{name}.gate_weight"])
    p = torch.softmax(x @ w[f"{name}.gate_weight"].T, dim=0 if mutation == "softmax axis" else 1)
    likely = torch.sigmoid(
        linear(w, f"{name}.capacity_predictor.2", silu(linear(w, f"{name}.capacity_predictor.0", x.detach())))
    )
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


def reference(
    w: State, heads: int, x: Tensor, t: Tensor, y: Tensor, training: bool, mutation: str = ""
) -> tuple[Tensor, Tensor]:
    """What the reference predicts at its own clock t, and the sum of its predictors' losses."""
    weight, patch = w["x_embedder.proj.weight"], w["x_embedder.proj.weight"].shape[-1]
    d, side = len(weight), x.shape[-1] // patch
    cuts = [x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] for i in range(side) for j in range(side)]
    h = torch.stack([torch.einsum("bcij,dcij->bd", cut, weight) for cut in cuts], dim=1) + w["x_embedder.proj.bias"]
    table = w["pos_embed"]
    h = h + (torch.cat(table.split(d // 2, dim=2)[::-1], dim=2) if mutation == "position halves" else table)
    angles = (t * 1000 if mutation == "scale of t" else t)[:, None] * torch.exp(
        -math.log(10000) * torch.arange(128, dtype=t.dtype) / 128
    )
    c = linear(
        w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1)))
    )
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    total = torch.zeros((), dtype=x.dtype)
    for block in range(sum(name.endswith("attn.proj.bias") for name in w)):
        name = f"blocks.{block}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(w, f"{name}.adaLN_modulation.1", c)[:, None].split(
            d, dim=2
        )
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
                number = (
                    (channel * patch + i) * patch + j
                    if mutation == "unpatchify order"
                    else (i * patch + j) * channels + channel
                )
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
    torch.testing.assert_close(
        ours.double(), theirs.detach(), rtol=0, atol=5e-6 * max(1.0, float(theirs.detach().abs().max()))
    )


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
        w,
        heads,
        at * latent + (1 - at) * noise,
        1 - clock if mutation == "clock" else clock,
        given["y"],
        True,
        mutation,
    )
    channels = latent.shape[1]
    (((prediction[:, :channels] - (latent - noise)) ** 2).mean() + predictors).backward()
    flow = ((prediction[:, :channels] - (latent - noise)) ** 2).mean()

    close(output.prediction[:, :channels], -prediction[:, :channels])
    close(output.prediction[:, channels:], prediction[:, channels:])
    close(RectifiedFlow().loss(output.prediction, noised), flow)
    close(output.auxiliary, predictors)
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    # Three weights were rewritten by a map that is linear, symmetric and its own inverse: so are their gradients.
    gradients |= reverse_time({name: gradients[name] for name in REWRITTEN}, model.config)
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
    prediction, _ = reference(
        w, heads, given["latent"].double(), 1 - clock if mutation == "clock" else clock, given["y"], False, mutation
    )
    channels = model.config.in_channels
    for threshold in ("raw", "dynamic"):
        model.eval().set_inference(InferenceRule("count", threshold))
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
