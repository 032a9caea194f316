"""Laws 1 and 2: choice, layer, dispatch and kernels against a sort and a few lines of tensor algebra that know of no
ranks.

Legend: S tokens on this rank, T of a sample, N experts, D hidden size, P tokens of a pool, k tokens that an expert
takes of one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import ComputeConfig, ModelConfig, PoolConfig, tokens_per_expert
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import shard_experts, widen_pools
from diffmoe_ep.moe.dispatch import AllToAllDispatch, LocalDispatch
from diffmoe_ep.moe.experts import Experts
from diffmoe_ep.moe.kernels.choose import Kernel
from diffmoe_ep.moe.kernels.plain import groups_wrongly
from diffmoe_ep.moe.pool import Pools, topk_per_expert
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.collectives import ALONE, all_sum
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.verify.difference import Difference, compare, largest, over_ranks

SAMPLES = 2  # of each rank
TOKENS = 16  # of a sample
HIDDEN = 8
PRECISIONS = {"": (torch.float32, 1e-5), ", bf16": (torch.bfloat16, 3e-2)}  # of kernels, and what may differ


def num_experts(ranks: int) -> int:
    """At least 8 and a multiple of the ranks, so that any of their expert parallelisms can be tried."""
    return ranks * -(-8 // ranks)


def spans(mesh: Mesh) -> list[int]:
    """Samples of a pool: one, those of a rank, and those of the ranks of the mesh's pool group."""
    return sorted({1, SAMPLES, SAMPLES * mesh.pool.size})


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- law 1: the choice -------------------------------------------------------------------------------------------------


def sorted_choice(scores: Tensor, k: int, pool: int) -> tuple[Tensor, Tensor]:
    """The first k of each pool and expert by (score descending, token ascending), and the k-th values: (S, N) bool,
    (pools, N).
    """
    pooled = scores.view(-1, pool, scores.shape[1])  # (pools, P, N)
    ordered = pooled.sort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(pooled, dtype=torch.bool).scatter_(1, ordered.indices[:, :k], True)
    return chosen.view_as(scores), ordered.values[:, k - 1]


def check_choice(mesh: Mesh) -> Iterator[tuple[str, Difference]]:
    """Every algorithm, over pools of every span, with scores that differ and with scores of which most are equal."""
    experts, local = num_experts(mesh.size), SAMPLES * TOKENS
    scores, also = draw(1, local * mesh.size, experts).float(), draw(2, local * mesh.size, experts).float()
    cases = {"": (scores, also), " with ties": ((scores * 1.5).round() / 7, (also * 1.5).round() / 7)}
    mine = slice(mesh.rank * local, (mesh.rank + 1) * local)
    for algorithm in get_args(get_type_hints(ComputeConfig)["topk"]):
        found = []
        for span in spans(mesh):
            pool = span * TOKENS
            group = mesh.pool if span > SAMPLES else ALONE
            for case, (one, other) in cases.items():
                for k in {1, max(1, pool // experts), pool - 1, pool}:
                    chosen, _ = sorted_choice(one, k, pool)
                    _, kth = sorted_choice(other, k, pool)
                    of_mine = slice(mine.start // pool, max(mine.start // pool + 1, mine.stop // pool))
                    given = one[mine].to(mesh.device), other[mine].to(mesh.device)
                    selection = topk_per_expert(given[0], k, Pools(pool, group, algorithm), extra=given[1])
                    name = f"pools of {span} samples{case}, k {k}: "
                    found.append(compare(f"{name}whether token and expert are chosen,", selection.chosen, chosen[mine]))
                    assert selection.kth_value is not None
                    found.append(compare(f"{name}k-th value of pool and expert", selection.kth_value, kth[of_mine]))
        yield algorithm, over_ranks(largest(found), mesh)


# -- law 1: the layer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """What a layer makes of tokens, and the gradients of one sum of all of it."""

    output: Tensor  # (S, D)
    quantile: Tensor  # (N,) mean over pools
    loss: Tensor  # scalar, the predictor's
    gradients: dict[str, Tensor]  # of the input ("input") and of every parameter


def plain_layer(weights: dict[str, Tensor], x: Tensor, span: int, k: int, probe: Tensor) -> Computed:
    """Algorithm 3 on all tokens of all ranks x (S, D): every expert computes every token, and what it did not choose
    counts nothing.
    """
    w = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    x = x.clone().requires_grad_()
    scores = torch.softmax(x @ w["router.weight"].T, dim=1)
    hidden = F.silu(x.detach() @ w["predictor.fc1.weight"].T + w["predictor.fc1.bias"])
    logits = hidden @ w["predictor.fc2.weight"].T + w["predictor.fc2.bias"]
    chosen, _ = sorted_choice(scores.detach(), k, span * TOKENS)
    _, kth = sorted_choice(torch.sigmoid(logits.detach()), k, span * TOKENS)
    output = torch.zeros_like(x)
    for e in range(scores.shape[1]):
        inner = F.gelu(x @ w["experts.fc1_weight"][e] + w["experts.fc1_bias"][e], approximate="tanh")
        output = output + (scores * chosen)[:, e, None] * (
            inner @ w["experts.fc2_weight"][e] + w["experts.fc2_bias"][e]
        )
    loss = F.binary_cross_entropy(torch.sigmoid(logits), chosen.double())
    gradients = torch.autograd.grad((output * probe).sum() + loss, [x, *w.values()])
    return Computed(output.detach(), kth.mean(0), loss.detach(), dict(zip(["input", *w], gradients, strict=True)))


def check_layer(mesh: Mesh) -> Iterator[tuple[str, Difference]]:
    """Outputs, thresholds and losses, and the gradients of input, experts and what all ranks share.

    For pools of every span, and for rows that travel at once or in parts.
    """
    experts, total = num_experts(mesh.size), SAMPLES * TOKENS * mesh.size
    x, probe = draw(3, total, HIDDEN), draw(4, total, HIDDEN)
    mine = slice(mesh.rank * SAMPLES * TOKENS, (mesh.rank + 1) * SAMPLES * TOKENS)
    found: dict[str, list[Difference]] = {"layer outputs": [], "layer gradients": [], "expert gradients": []}
    for span, parts in itertools.product(spans(mesh), (1, 2) if mesh.expert.size > 1 else (1,)):
        capacity = max(1.0, experts / TOKENS)
        model = DiT(_model(experts), PoolConfig(span=span, capacity=capacity)).double()
        (layer,) = model.moe_layers()
        for seed, parameter in enumerate(layer.parameters()):
            parameter.data = draw(10 + seed, *parameter.shape) * 0.4
        weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        expected = plain_layer(weights, x, span, tokens_per_expert(span * TOKENS, capacity, experts), probe)
        shard_experts(model, mesh, overlap=parts)
        if span > SAMPLES:
            widen_pools(model, mesh)
        layer.to(mesh.device)
        here = x[mine].to(mesh.device).requires_grad_()
        output, report = layer(here.view(SAMPLES, TOKENS, HIDDEN))
        assert report.loss is not None and report.quantile is not None
        names = ["input", *(name for name, _ in layer.named_parameters())]
        total_loss = (output.flatten(0, 1) * probe[mine].to(mesh.device)).sum() + report.loss / mesh.size
        gradients = dict(zip(names, torch.autograd.grad(total_loss, [here, *layer.parameters()]), strict=True))

        name = f"pools of {span} samples{', rows in 2 parts' * (parts > 1)}: "
        mean = all_sum(torch.cat([report.quantile.detach(), report.loss.detach()[None]]), mesh.world) / mesh.size
        found["layer outputs"] += [
            compare(f"{name}token of this rank, column", output.flatten(0, 1), expected.output[mine]),
            compare(f"{name}mean k-th prediction of expert", mean[:-1], expected.quantile),
            compare(f"{name}predictor's loss", mean[-1], expected.loss),
        ]
        first, last = layer.experts.first, layer.experts.first + experts // mesh.expert.size
        for parameter_name, gradient in gradients.items():
            label, full = f"{name}gradient of {parameter_name}", expected.gradients[parameter_name]
            if parameter_name == "input":
                found["layer gradients"].append(compare(label, gradient, full[mine]))
            elif parameter_name.startswith("experts."):
                summed = all_sum(gradient, mesh.replicas)
                found["expert gradients"].append(compare(label, summed, full[first:last], first=first))
            else:
                found["layer gradients"].append(compare(label, all_sum(gradient, mesh.world), full))
    for name, differences in found.items():
        yield name, over_ranks(largest(differences), mesh)


def _model(experts: int) -> ModelConfig:
    return ModelConfig(
        input_size=8, in_channels=1, out_channels=1, patch=2, hidden_size=HIDDEN, num_heads=2, num_blocks=1,
        num_classes=2, num_experts=experts, interleave=False,
    )  # fmt: skip


# -- law 2 -------------------------------------------------------------------------------------------------------------


def check_dispatch(mesh: Mesh) -> Difference:
    """Experts that give back what they get: the mixture is the token times the sum of its gates, and so are the
    gradients.
    """
    experts, found = num_experts(mesh.size), []
    dispatchers: dict[str, Any] = {
        f"{chunks} part{'s' * (chunks > 1)}": AllToAllDispatch(mesh.expert, chunks) for chunks in (1, 2)
    }
    if mesh.expert.size == 1:
        dispatchers = {"local": LocalDispatch()}
    patterns = {"some": 0.3, "all": 1.0, "none": 0.0, "one expert takes all": 0.0, "a rank without tokens": 0.5}
    for (how, dispatcher), (number, (pattern, density)) in (
        (one, other) for one in dispatchers.items() for other in enumerate(patterns.items())
    ):
        size = 0 if pattern == "a rank without tokens" and mesh.rank == mesh.size - 1 else 24
        seed = 100 * number + mesh.rank
        tokens, weight = draw(seed, size, HIDDEN).to(mesh.device), draw(seed + 1, size, experts).abs().to(mesh.device)
        chosen = torch.rand(size, experts, generator=torch.Generator().manual_seed(seed)).to(mesh.device) < density
        if pattern == "one expert takes all":
            chosen[:, experts - 1] = True
        tokens.requires_grad_()
        weight.requires_grad_()
        rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(Routing(chosen)))
        mixed = dispatcher.combine(rows, handle, weight)
        expected = tokens * (weight * chosen).sum(1, keepdim=True)
        name = f"{pattern}, {how}: "
        found.append(compare(f"{name}token of this rank, column", mixed, expected))
        given = torch.autograd.grad(mixed.square().sum(), [tokens, weight])
        plain = torch.autograd.grad(expected.square().sum(), [tokens, weight])
        found.append(compare(f"{name}gradient of token, column", given[0], plain[0]))
        found.append(compare(f"{name}gradient of the gate of token, expert", given[1], plain[1]))
    return over_ranks(largest(found), mesh)


def check_kernels(mesh: Mesh) -> Iterator[tuple[str, Difference, float]]:
    """Every kernel, for experts with equally many rows, with ragged ones and with none, in float32 and by autocast in
    bfloat16, as training computes; but for the grouped one on GPUs where it is refused.
    """
    for kernel, (name, (dtype, tolerance)) in itertools.product(get_args(Kernel), PRECISIONS.items()):
        if kernel == "grouped" and groups_wrongly(mesh.device):
            continue
        found = []
        for counts in ([32] * 4, [5, 0, 70, 17], [0, 0, 64, 0], [0, 0, 0, 0]):
            module = Experts(4, 64, kernel).to(mesh.device)
            for seed, parameter in enumerate(module.parameters()):
                parameter.data = (draw(30 + seed, *parameter.shape) * 0.2).float().to(mesh.device)
            rows = draw(40, sum(counts), 64).float().to(mesh.device).requires_grad_()
            probe = draw(41, sum(counts), 64).float().to(mesh.device)
            with torch.autocast(mesh.device.type, dtype, enabled=dtype != torch.float32):
                output = module(rows, counts)
            names = ["rows", *(name for name, _ in module.named_parameters())]
            gradients = torch.autograd.grad((output * probe).sum(), [rows, *module.parameters()])
            expected, plain = _one_by_one(module, rows, counts, probe)
            found.append(compare(f"rows {counts}: output at row, column", output, expected, relative=True))
            for label, one, other in zip(names, gradients, plain, strict=True):
                first = None if label == "rows" else 0
                found.append(
                    compare(f"rows {counts}: gradient of {label}", one, other, first=first, relative=bool(other.any()))
                )
        yield f"{kernel}{name}", over_ranks(largest(found), mesh), tolerance


def _one_by_one(module: Experts, rows: Tensor, counts: list[int], probe: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of plain FFNs, in float64."""
    x = rows.detach().double().requires_grad_()
    weights = [parameter.detach().double().requires_grad_() for parameter in module.parameters()]
    w1, b1, w2, b2 = (weights[[name for name, _ in module.named_parameters()].index(key)] for key in _KEYS)
    parts = [F.gelu(part @ w1[e] + b1[e], approximate="tanh") @ w2[e] + b2[e] for e, part in enumerate(x.split(counts))]
    output = torch.cat(parts)
    return output.detach(), list(torch.autograd.grad((output * probe.double()).sum(), [x, *weights]))


_KEYS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
