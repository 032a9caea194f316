"""What an MoE layer costs beside one dense FFN on the same tokens, beside its peers, and beside what its matmuls alone
would cost.

Legend: S tokens of this rank, D hidden size, N experts, k = S / N tokens that an expert takes.

All contenders run forward and backward on the same tokens; a token's FFN work is that of one dense FFN in each (C = 1).
Ours and the loop also have the capacity predictor and its loss, which DeepSpeed's top-1 layer has not.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ep.bench.timing import Timing, conditions, device_name, interleaved, load
from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig
from diffmoe_ep.model.parallelize import compile_layer, shard_layer
from diffmoe_ep.moe.experts import FeedForward
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.parallel.allocator import keep_freed_memory
from diffmoe_ep.parallel.collectives import all_sum
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.tables import table

CONTENDERS = ("dense", "ours", "deepspeed", "loop", "matmuls", "batched")
HEADS = {
    "ours": "ours", "deepspeed": "DeepSpeed top-1", "loop": "plain loop", "matmuls": "matmuls alone",
    "batched": "batched",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One size."""

    hidden: int  # D
    tokens: int  # S, of each rank
    experts: int  # N, over all ranks


# S, B and L of the paper; the first two of each width with the bars' sizes, the others where the weights' own traffic
# rules.
CASES = (
    Case(384, 1024, 16), Case(384, 4096, 16), Case(384, 8192, 8), Case(384, 8192, 16), Case(384, 8192, 64),
    Case(768, 1024, 16), Case(768, 4096, 16), Case(1024, 1024, 16), Case(1024, 4096, 16), Case(1024, 4096, 64),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One size, measured."""

    case: Case
    timings: dict[str, Timing]  # by contender
    limit: float  # the matmul FLOPs of experts, router and predictor over those of the dense FFN

    def ratio(self, name: str) -> float:
        """A contender's median over the dense FFN's."""
        return self.timings[name].over(self.timings["dense"])[0]

    @property
    def over_matmuls(self) -> float | None:
        """Our median over that of the same matmuls alone, one by one or batched, whichever is quicker."""
        alone = [self.timings[name] for name in ("matmuls", "batched") if name in self.timings]
        return max(self.timings["ours"].over(timing)[0] for timing in alone) if alone else None


@dataclass(frozen=True)
class LayerBench:
    """All sizes."""

    device: str
    compute: str  # type of the tokens
    ranks: int
    turns: int
    load: tuple[float, float]  # before and after
    rows: tuple[Row, ...]
    compiled: bool = False  # the dense FFN and our layer

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As a table: milliseconds of the dense FFN, then every contender as a multiple of it (median; minimum of ours
        beside).
        """
        names = [name for name in CONTENDERS[1:] if name in self.rows[0].timings]
        heads = ["D, tokens, N", "dense ms", "spread", *(HEADS[name] for name in names)]
        rows = [[*heads, "ours, by minima", "spread", "limit", "ours / matmuls"]]
        for row in self.rows:
            dense, ours = row.timings["dense"], row.timings["ours"]
            cells = [f"{row.case.hidden}, {row.case.tokens}, {row.case.experts}", f"{1e3 * dense.median:.1f}"]
            cells += [f"{dense.spread:.0%}", *(f"{row.ratio(name):.2f}" for name in names)]
            cells += [f"{ours.over(dense)[1]:.2f}", f"{ours.spread:.0%}", f"{row.limit:.2f}"]
            rows.append([*cells, "-" if row.over_matmuls is None else f"{row.over_matmuls:.2f}"])
        compiled = "; dense and ours compiled" if self.compiled else ""
        ranks = f"{self.ranks} ranks, each with its share of the experts; " if self.ranks > 1 else ""
        return [
            "one MoE layer, forward and backward, as a multiple of one dense FFN on the same tokens; "
            f"{self.compute}{compiled}",
            self.device,
            *table(rows),
            f"{ranks}{conditions(self.turns, *self.load)}",
        ]


def bench_layer(
    mesh: Mesh,
    cases: Sequence[Case] = CASES,
    turns: int = 20,
    compute: torch.dtype = torch.float32,
    peers: bool = True,
    compiled: bool = False,
) -> LayerBench:
    """Measure every case on the mesh's ranks. peers: also DeepSpeed's layer (which wants a process group) and the plain
    loop.

    compute: the tokens' type; with bfloat16 weights stay float32 and matmuls are autocast. compiled: the dense FFN and
    our layer use torch.compile, as with compute.compile. Raises ConfigError for sizes that do not divide.
    """
    before = load()
    keep_freed_memory()
    rows = []
    for case in cases:
        if case.experts % mesh.size or case.tokens % case.experts or case.hidden % 4:
            raise ConfigError(
                f"D {case.hidden}, {case.tokens} tokens, {case.experts} experts on {mesh.size} ranks: ranks must "
                "divide experts, experts tokens, and 4 the width; give such numbers"
            )
        rows.append(_measure(mesh, case, turns, compute, peers, compiled))
    kind = str(compute).removeprefix("torch.")
    return LayerBench(device_name(mesh.device), kind, mesh.size, turns, (before, load()), tuple(rows), compiled)


def _measure(mesh: Mesh, case: Case, turns: int, compute: torch.dtype, peers: bool, compiled: bool) -> Row:
    generator = torch.Generator().manual_seed(mesh.rank)
    x = torch.randn(1, case.tokens, case.hidden, generator=generator).to(mesh.device, compute).requires_grad_()
    probe = torch.randn(1, case.tokens, case.hidden, generator=generator).to(mesh.device, compute)
    dense, ours = FeedForward(case.hidden, 4 * case.hidden), our_layer(case, mesh)
    if compiled:
        dense.forward = torch.compile(dense.forward)  # type: ignore[method-assign]
        compile_layer(ours.layer)
    contenders: dict[str, nn.Module] = {"dense": dense, "ours": ours}
    if peers:
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it does where our table goes
            contenders["deepspeed"] = deepspeed_layer(case, mesh)
        if mesh.size == 1:
            contenders["loop"] = PlainLoop(case)
    actions = {name: training(module.to(mesh.device), x, probe, compute) for name, module in contenders.items()}
    if mesh.size == 1:
        actions |= matmuls(case, mesh.device, compute)
    ready = torch.zeros(1, device=mesh.device)
    found = interleaved(actions, turns, mesh.device, lambda: all_sum(ready, mesh.world))
    flops = 3 * 16 * case.hidden**2  # FLOPs of a token: two matmuls of 8 D^2, forward and twice backward
    extra = 4 * case.hidden**2 + 12 * case.hidden * case.experts  # predictor (its input gets no gradient) and router
    return Row(case, found, (flops + extra) / flops)


def training(module: nn.Module, x: Tensor, probe: Tensor, compute: torch.dtype) -> Callable[[], None]:
    """Forward and backward of a contender, with gradients by its weights and its input, which are then forgotten."""
    parameters = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def run() -> None:
        with torch.autocast(x.device.type, compute, enabled=compute != torch.float32):
            out = module(x)
        mixed, loss = out if isinstance(out, tuple) else (out, None)
        torch.autograd.backward(
            [mixed] if loss is None else [mixed, loss], [probe.to(mixed.dtype), None][: 1 if loss is None else 2]
        )
        for parameter in parameters:
            parameter.grad = None

    return run


class Ours(nn.Module):
    """Our layer, with the loss of its predictor beside the output."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), loss."""
        mixed, report = self.layer(x)
        return mixed, report.loss


def our_layer(case: Case, mesh: Mesh, seed: int = 0) -> Ours:
    """Our layer over the mesh's ranks, whose tokens are one pool."""
    model = ModelConfig(hidden_size=case.hidden, num_heads=1, num_experts=case.experts)
    layer = MoELayer(model, PoolConfig())
    fill(layer, seed)
    layer.pools = Pools(group=mesh.pool)
    shard_layer(layer, mesh)
    return Ours(layer.train())


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights of an ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class PlainLoop(nn.Module):
    """The layer written down from the paper's Algorithm 3, one expert after the other, on one device."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__()
        self.router = nn.Linear(case.hidden, case.experts, bias=False)
        self.predictor = nn.Sequential(
            nn.Linear(case.hidden, case.hidden), nn.SiLU(), nn.Linear(case.hidden, case.experts)
        )
        self.experts = nn.ModuleList(FeedForward(case.hidden, 4 * case.hidden) for _ in range(case.experts))
        fill(self, seed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), predictor's loss."""
        tokens = x.flatten(0, 1)  # (S, D)
        scores = self.router(tokens).float().softmax(dim=-1)  # (S, N)
        best, index = scores.topk(len(tokens) // scores.shape[1], dim=0)  # (k, N)
        chosen = torch.zeros_like(scores).scatter_(0, index, 1.0)
        loss = F.binary_cross_entropy_with_logits(self.predictor(tokens.detach()).float(), chosen)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            answer = expert(tokens[index[:, number]]) * best[:, number, None].to(tokens.dtype)
            mixed = mixed.index_add(0, index[:, number], answer.to(mixed.dtype))
        return mixed.view_as(x), loss


def deepspeed_layer(case: Case, mesh: Mesh) -> nn.Module:
    """DeepSpeed's own layer: top-1 of N experts at capacity factor 1 (tokens over it are dropped), over the same
    ranks.
    """
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes at first use
    deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", dist_init_required=False)

    class Top1(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(
                case.hidden, FeedForward(case.hidden, 4 * case.hidden), case.experts, ep_size=mesh.size, k=1,
                capacity_factor=1.0, min_capacity=1, use_rts=False,
            )  # fmt: skip
            self.moe.set_deepspeed_parallelism()
            fill(self, mesh.rank)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, loss, _ = self.moe(x)
            return out, loss

    return Top1()


def matmuls(case: Case, device: torch.device, compute: torch.dtype) -> dict[str, Callable[[], None]]:
    """The matmuls of experts, router and predictor, forward and backward, and nothing else: no autograd, no activation,
    no rows moved.

    Twice: the experts' one by one, and batched.
    """
    size, each, number = case.hidden, case.tokens // case.experts, case.experts

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=compute)

    x, hidden, w1, w2 = (
        made(number, each, size),
        made(number, each, 4 * size),
        made(number, size, 4 * size),
        made(number, 4 * size, size),
    )
    tokens, logits, router, wide = (
        made(case.tokens, size),
        made(case.tokens, number),
        made(size, number),
        made(size, size),
    )
    products = [(x, w1), (hidden, w2), (hidden, w1.mT), (x, w2.mT), (x.mT, hidden), (hidden.mT, x)]
    small = [(tokens, router), (logits, router.T), (tokens.T, logits)]
    outs = [made(a.shape[0], a.shape[1], b.shape[2]) for a, b in products]
    others = [(tokens, wide), (tokens.T, tokens), *small, *small]
    small_outs = [made(a.shape[0], b.shape[1]) for a, b in others]

    def each_expert(a: Tensor, b: Tensor, out: Tensor) -> None:
        for one, weight, into in zip(a, b, out, strict=True):
            torch.mm(one, weight, out=into)

    def batched(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.bmm(a, b, out=out)

    def run(multiply: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        for (a, b), out in zip(products, outs, strict=True):
            multiply(a, b, out)
        for (a, b), out in zip(others, small_outs, strict=True):
            torch.mm(a, b, out=out)

    return {"matmuls": partial(run, each_expert), "batched": partial(run, batched)}
