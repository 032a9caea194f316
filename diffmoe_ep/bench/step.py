"""A whole training step of a model with experts beside that of the dense one, and how its cost goes with the number of
experts.

A step here is forward, loss, backward, fused AdamW and the averaged weights, on one device, without DeepSpeed and
without data.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from diffmoe_ep.bench.layer import Case, fill, our_layer
from diffmoe_ep.bench.timing import Timing, device_name, interleaved, load, settle
from diffmoe_ep.config import Config, EmaConfig, ModelConfig, PoolConfig
from diffmoe_ep.diffusion.objective import RectifiedFlow
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.planner.plan import plan
from diffmoe_ep.tables import table
from diffmoe_ep.train.ema import Ema

PARTS = ("forward and backward", "AdamW", "averaged weights")


@dataclass(frozen=True)
class StepBench:
    """Both models' steps."""

    device: str
    compute: str
    batch: int  # samples of a step
    turns: int
    load: tuple[float, float]
    timings: dict[str, Timing]  # dense, experts
    parts: dict[str, dict[str, float]]  # of each model the median seconds of each part
    flops: dict[str, float]  # of each model's step, by its plan
    peak: float  # FLOPs a second of a large matmul, the best of all turns

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As a table."""
        dense, ours = self.timings["dense"], self.timings["experts"]
        rows = [["", "dense ms", "experts ms", "ratio"]]
        for part in PARTS:
            one, two = self.parts["dense"][part], self.parts["experts"][part]
            rows.append([part, f"{1e3 * one:.1f}", f"{1e3 * two:.1f}", f"{two / one:.2f}"])
        rows.append(
            [
                "whole step, median",
                f"{1e3 * dense.median:.1f}",
                f"{1e3 * ours.median:.1f}",
                f"{ours.over(dense)[0]:.2f}",
            ]
        )
        rows.append(
            [
                "whole step, minimum",
                f"{1e3 * dense.minimum:.1f}",
                f"{1e3 * ours.minimum:.1f}",
                f"{ours.over(dense)[1]:.2f}",
            ]
        )
        rates = {name: self.flops[name] / timing.median for name, timing in self.timings.items()}
        of_peak = {name: f"{rate / self.peak:.2f}" for name, rate in rates.items()}
        rows.append(
            ["TFLOP/s", *(f"{rates[name] / 1e12:.3g}" for name in rates), f"{rates['experts'] / rates['dense']:.2f}"]
        )
        rows.append(["MFU, of the matmul peak", of_peak["dense"], of_peak["experts"], ""])
        rows.append(["spread", f"{dense.spread:.0%}", f"{ours.spread:.0%}", ""])
        head = f"one training step of {self.batch} samples, dense and with experts; {self.compute}, {self.device}"
        end = f"{self.turns} interleaved turns, medians; load {self.load[0]:.1f} to {self.load[1]:.1f}"
        return [head, *table(rows), f"matmul peak {self.peak / 1e12:.3g} TFLOP/s; {end}"]


def bench_step(
    model: ModelConfig, mesh: Mesh, batch: int = 4, turns: int = 20, compute: torch.dtype = torch.float32
) -> StepBench:
    """Measure a model with experts beside its dense twin (the same, family dense)."""
    before = load()
    models = {"dense": replace(model, family="dense"), "experts": model}
    parts: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in models}
    actions = {name: _step(kind, mesh, batch, compute, parts[name]) for name, kind in models.items()}
    side = 8192 if mesh.device.type == "cuda" else 1024
    square = torch.randn(side, side, device=mesh.device, dtype=compute)
    found = interleaved(actions | {"matmul": lambda: square @ square}, turns, mesh.device, lambda: None)
    peak = 2 * side**3 / found.pop("matmul").minimum
    flops = {name: batch * plan(replace(Config(), model=kind)).training for name, kind in models.items()}
    medians = {
        name: {part: Timing(tuple(values[1:])).median for part, values in own.items()} for name, own in parts.items()
    }
    kind = str(compute).removeprefix("torch.")
    return StepBench(device_name(mesh.device), kind, batch, turns, (before, load()), found, medians, flops, peak)


def _step(
    model: ModelConfig, mesh: Mesh, batch: int, compute: torch.dtype, parts: dict[str, list[float]]
) -> Callable[[], None]:
    device, objective = mesh.device, RectifiedFlow()
    net = DiT(model, PoolConfig(), None if compute == torch.float32 else compute, channels=model.in_channels)
    fill(net)
    net = net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    ema = Ema(net, EmaConfig())
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model.in_channels, model.input_size, model.input_size)
    latent, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    u, label = torch.rand(batch, generator=generator).to(device), torch.arange(batch, device=device) % model.num_classes
    count = 0

    def run() -> None:
        nonlocal count
        marks = [time.perf_counter()]
        noised = objective.noised(latent, noise, u)
        output = net(noised.x, noised.t, label)
        (objective.loss(output.prediction, noised) + output.auxiliary).backward()
        _mark(marks, device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _mark(marks, device)
        count += 1
        ema.update(count)
        _mark(marks, device)
        for part, begin, end in zip(PARTS, marks, marks[1:], strict=False):
            parts[part].append(end - begin)

    return run


def _mark(marks: list[float], device: torch.device) -> None:
    settle(device)
    marks.append(time.perf_counter())


@dataclass(frozen=True)
class ExpertsBench:
    """Cost of a token in our layer over the number of experts."""

    device: str
    compute: str
    hidden: int
    turns: int
    load: tuple[float, float]
    rows_each: int | None  # rows that every expert has; None: the number of tokens stays
    timings: dict[int, Timing]  # by the number of experts
    tokens: dict[int, int]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def per_token(self, experts: int) -> float:
        """Median seconds of a token."""
        return self.timings[experts].median / self.tokens[experts]

    def lines(self) -> list[str]:
        """As a table."""
        first = next(iter(self.timings))
        base = 8 if 8 in self.timings else first
        rows = [["experts", "tokens", "ms", "us a token", f"over N = {base}", "by minima", "spread"]]
        for number, timing in self.timings.items():
            least = timing.minimum / self.tokens[number] / (self.timings[base].minimum / self.tokens[base])
            rows.append([
                str(number), str(self.tokens[number]), f"{1e3 * timing.median:.1f}", f"{1e6 * self.per_token(number):.2f}",
                f"{self.per_token(number) / self.per_token(base):.2f}", f"{least:.2f}", f"{timing.spread:.0%}",
            ])  # fmt: skip
        what = (
            f"{self.rows_each} rows for each expert"
            if self.rows_each
            else "the same tokens, so equal activated compute"
        )
        head = f"one MoE layer of D {self.hidden} over the number of experts, {what}; {self.compute}, {self.device}"
        return [
            head,
            *table(rows),
            f"{self.turns} interleaved turns, medians; load {self.load[0]:.1f} to {self.load[1]:.1f}",
        ]


def bench_experts(
    mesh: Mesh, hidden: int = 384, numbers: Sequence[int] = (2, 4, 8, 16, 32, 64), rows_each: int | None = 512, tokens: int = 8192,
    turns: int = 20, compute: torch.dtype = torch.float32,
) -> ExpertsBench:  # fmt: skip
    """Measure our layer, forward and backward, for several numbers of experts. rows_each: None keeps `tokens` for all
    of them.
    """
    before = load()
    sizes = {number: number * rows_each if rows_each else tokens for number in numbers}
    actions = {str(number): _layer(Case(hidden, size, number), mesh, compute) for number, size in sizes.items()}
    found = interleaved(actions, turns, mesh.device, lambda: None)
    timings = {number: found[str(number)] for number in numbers}
    kind = str(compute).removeprefix("torch.")
    return ExpertsBench(device_name(mesh.device), kind, hidden, turns, (before, load()), rows_each, timings, sizes)


def _layer(case: Case, mesh: Mesh, compute: torch.dtype) -> Callable[[], None]:
    layer: nn.Module = our_layer(case, mesh).to(mesh.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, case.tokens, case.hidden, generator=generator).to(mesh.device, compute).requires_grad_()

    def run() -> None:
        with torch.autocast(x.device.type, compute, enabled=compute != torch.float32):
            mixed, loss = layer(x)
        (mixed.sum() + loss).backward()
        for parameter in (x, *layer.parameters()):
            parameter.grad = None

    return run
