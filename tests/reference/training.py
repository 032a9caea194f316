"""Law 9: training once more, in float64, plainly, on one device, from the equations and not from the package.

Only a config, the initial weights by name, and the stored arrays come from there. Legend: B samples of a micro-step, T
tokens of a sample, D hidden size, N experts, P tokens of a pool; `w` the weights by name.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import Config
from reference.samples import drawn, epoch

Weights = dict[str, Tensor]


@dataclass
class Layer:
    """What an MoE layer says of a micro-step."""

    loss: Tensor  # the predictor's
    quantile: Tensor  # (N,) k-th largest prediction, mean over pools
    capacity: Tensor  # (N,) that the thresholds would spend


@dataclass
class Trace:
    """What happened, step by step."""

    diffusion_loss: list[float] = field(default_factory=list)
    predictor_loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    capacity: list[Tensor] = field(default_factory=list)  # of each step (layers, N)
    thresholds: list[Weights] = field(default_factory=list)
    ema: list[Weights] = field(default_factory=list)
    ties: int = 0  # how often an expert's last token in a pool and its first one out had equal scores
    margin: float = math.inf  # how near any choice came to another: least difference of scores or predictions, if not 0


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in linear(w, f"{name}.qkv", x).chunk(3, dim=2))
    mixed = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3) @ v
    return linear(w, f"{name}.projection", mixed.transpose(1, 2).flatten(2))


def feed_forward(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x), approximate="tanh"))


def moe(w: Weights, name: str, x: Tensor, tau: Tensor, config: Config, trace: Trace) -> tuple[Tensor, Layer]:
    """x (B, T, D): every expert takes the k best tokens of every pool, the first of equal ones."""
    model, span, tokens = config.model, config.pool.span, x.flatten(0, 1)
    num_experts, size = model.num_experts, len(tokens) if span == "all" else span * x.shape[1]  # N, P
    scores = torch.softmax(tokens @ w[f"{name}.router.weight"].T, dim=1)  # (S, N)
    hidden = F.silu(linear(w, f"{name}.predictor.fc1", tokens.detach()))
    logits = linear(w, f"{name}.predictor.fc2", hidden)
    k, chosen, quantiles = int(size * config.pool.capacity * model.granularity / num_experts), scores > 2, []
    for first in range(0, len(tokens), size):
        for expert in range(num_experts):
            best, place = scores[first : first + size, expert].detach().sort(descending=True, stable=True)
            chosen[first + place[:k], expert] = True
            gap = (best[k - 1] - best[k]).item()
            trace.ties += gap == 0
            trace.margin = min(trace.margin, gap or math.inf)
        quantiles.append(torch.sigmoid(logits[first : first + size].detach().sort(0, descending=True).values[k - 1]))
    mixed = torch.zeros_like(tokens)
    for expert in range(num_experts):
        rows = chosen[:, expert].nonzero()[:, 0]
        mine = {key: w[f"{name}.experts.{key}"][expert] for key in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")}
        inner = F.gelu(tokens[rows] @ mine["fc1_weight"] + mine["fc1_bias"], approximate="tanh")
        answer = inner @ mine["fc2_weight"] + mine["fc2_bias"]
        mixed = mixed.index_add(0, rows, scores[rows, expert, None] * answer)
    if model.shared_experts:
        mixed = mixed + feed_forward(w, f"{name}.shared", tokens)
    target, over = chosen.double(), torch.sigmoid(logits.detach()) - tau
    loss = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    trace.margin = min(trace.margin, over.abs().min().item())
    capacity = (over > 0).sum(0) * num_experts / model.granularity / len(tokens)
    return mixed.view_as(x), Layer(loss, torch.stack(quantiles).mean(0), capacity)


def forward(
    w: Weights, x: Tensor, t: Tensor, label: Tensor, taus: Weights, config: Config, trace: Trace
) -> tuple[Tensor, list[Layer]]:
    """x (B, C, H, W) at t (B,) -> the velocity, and what each MoE layer says."""
    model, (_, channels, side, _) = config.model, x.shape
    width, rows, p = model.hidden_size, side // model.patch, model.patch
    angle = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(width // 4).double() / (width // 4))
    place = torch.cat([angle.sin(), angle.cos()], dim=1)  # (H / p, D / 2): of the columns first, then of the rows
    place = torch.cat([place.repeat(rows, 1), place.repeat_interleave(rows, 0)], dim=1)  # (T, D)
    patches = F.conv2d(x, w["patches.projection.weight"], w["patches.projection.bias"], stride=p)
    tokens = patches.flatten(2).transpose(1, 2) + place  # (B, T, D)
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    time = linear(w, "time.fc2", F.silu(linear(w, "time.fc1", torch.cat([angle.cos(), angle.sin()], dim=1))))
    c, layers = F.silu(time + w["label.table.weight"][label]), []
    for block in range(model.num_blocks):
        name = f"blocks.{block}"
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = linear(w, f"{name}.modulation", c)[:, None].chunk(6, dim=2)
        inner = norm(tokens) * (1 + scale_a) + shift_a
        tokens = tokens + gate_a * attention(w, f"{name}.attention", inner, model.num_heads)
        inner = norm(tokens) * (1 + scale_f) + shift_f
        if f"{name}.ffn.router.weight" in w:
            mixed, layer = moe(w, f"{name}.ffn", inner, taus[f"{name}.ffn.predictor.threshold"], config, trace)
            layers.append(layer)
        else:
            mixed = feed_forward(w, f"{name}.ffn", inner)
        tokens = tokens + gate_f * mixed
    shift, scale = linear(w, "head.modulation", c)[:, None].chunk(2, dim=2)
    patches = linear(w, "head.projection", norm(tokens) * (1 + scale) + shift)  # (B, T, p * p * out_channels)
    image = patches.view(-1, rows, rows, p, p, model.out_channels)[..., :channels]
    return image.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), layers


def learning_rate(config: Config, step: int) -> float:
    """Of step `step` (from 0): warm-up, then a cosine."""
    peak, schedule = config.train.optimizer.lr, config.train.schedule
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    turn = math.pi * (step - schedule.warmup) / (config.train.steps - schedule.warmup)
    return peak * (schedule.final + (1 - schedule.final) * (1 + math.cos(turn)) / 2)


def train(
    config: Config, start: Weights, moments: np.ndarray, labels: list[int], sizes: list[int], scale: float, shift: float
) -> Trace:
    """Train from the weights `start` on stored moments (samples, 2, 2C, H, W), in shards of these sizes."""
    model, recipe, data = config.model, config.train, config.data
    opt, micro, trace = recipe.optimizer, recipe.global_batch // recipe.grad_accumulation, Trace()
    w = {name: tensor.double().requires_grad_() for name, tensor in start.items()}
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in w.items()} for _ in range(2))
    layers_at = [block for block in range(model.num_blocks) if block % 2 or not model.interleave]
    raw = {f"blocks.{block}.ffn.predictor.threshold": torch.zeros(model.num_experts).double() for block in layers_at}
    averaged = raw if recipe.ema.thresholds == "averaged" else {}
    ema = {name: tensor.detach().clone() for name, tensor in (w | averaged).items()}
    order: list[int] = []
    for step in range(recipe.steps):
        taus = {name: tau / (1 - model.threshold_decay ** max(step, 1)) for name, tau in raw.items()}
        losses, layers = [], []
        for number in range(recipe.grad_accumulation):
            positions = range(begin := step * recipe.global_batch + number * micro, begin + micro)
            while len(order) < positions.stop:
                order += epoch(len(order) // len(labels), sizes, config.seed, data.shuffle_block, data.lanes, micro)
            rows = [drawn(config.seed, at, moments[order[at]], data.flip, data.condition_dropout) for at in positions]
            latent, noise = (torch.from_numpy(np.stack(part)) for part in list(zip(*rows, strict=True))[:2])
            latent, t = latent * scale + shift, torch.tensor([row[2] for row in rows]).double()
            dropped, own = [row[3] for row in rows], [labels[order[at]] for at in positions]
            label = [model.num_classes if drop else one for drop, one in zip(dropped, own, strict=True)]
            x = (1 - t[:, None, None, None]) * latent + t[:, None, None, None] * noise
            velocity, said = forward(w, x, t, torch.tensor(label), taus, config, trace)
            diffusion, each = (velocity - (noise - latent)).square().mean(), torch.stack([layer.loss for layer in said])
            predictor = (each.sum() if model.predictor_reduction == "sum" else each.mean()) * model.predictor_weight
            ((diffusion + predictor) / recipe.grad_accumulation).backward()
            losses.append((diffusion.item(), predictor.item()))
            layers.append(said)
        gradients = {name: tensor.grad for name, tensor in w.items() if tensor.grad is not None}
        total = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        clip, lr = min(1.0, recipe.max_grad_norm / (total + 1e-6)), learning_rate(config, step)
        for name, tensor in w.items():
            gradient, (beta1, beta2) = gradients[name] * clip, opt.betas
            rate = lr * (opt.expert_lr_scale if ".experts." in name else 1)
            rate *= opt.router_lr_scale if ".router." in name else 1
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient.square()
            mean, square = first[name] / (1 - beta1 ** (step + 1)), second[name] / (1 - beta2 ** (step + 1))
            with torch.no_grad():
                tensor.copy_(tensor * (1 - rate * opt.weight_decay) - rate * mean / (square.sqrt() + opt.eps))
            tensor.grad = None
        by_layer = list(zip(*layers, strict=True))
        quantiles = [torch.stack([said.quantile for said in layer]).mean(0) for layer in by_layer]
        for tau, quantile in zip(raw.values(), quantiles, strict=True):
            tau.copy_(model.threshold_decay * tau + (1 - model.threshold_decay) * quantile)
        decay = min(recipe.ema.decay, (2 + step) / (11 + step)) if recipe.ema.ramp else recipe.ema.decay
        ema = {name: decay * old + (1 - decay) * (w | averaged)[name].detach() for name, old in ema.items()}
        for found, value in zip((trace.diffusion_loss, trace.predictor_loss), np.mean(losses, axis=0), strict=True):
            found.append(float(value))
        trace.grad_norm.append(total)
        trace.lr.append(lr)
        capacities = [torch.stack([said.capacity for said in layer]).mean(0) for layer in by_layer]
        trace.capacity.append(torch.stack(capacities))
        trace.thresholds.append({name: tau.clone() for name, tau in raw.items()})
        trace.ema.append(ema)
    return trace
