"""How the cost of a token in our MoE layer goes with the number of experts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffmoe_ep.bench.layer import Case, our_layer, training
from diffmoe_ep.bench.timing import Timing, conditions, device_name, interleaved, load
from diffmoe_ep.parallel.allocator import keep_freed_memory
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.tables import table

NUMBERS = (2, 4, 8, 16, 32, 64)


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
        base = 8 if 8 in self.timings else next(iter(self.timings))
        rows = [("experts", "tokens", "ms", "us a token", f"over N = {base}", "by minima", "spread")]
        for number, timing in self.timings.items():
            tokens, each = self.tokens[number], self.per_token(number)
            least = timing.minimum / tokens / (self.timings[base].minimum / self.tokens[base])
            over = (f"{each / self.per_token(base):.2f}", f"{least:.2f}", f"{timing.spread:.0%}")
            rows.append((str(number), str(tokens), f"{1e3 * timing.median:.1f}", f"{1e6 * each:.2f}", *over))
        each_has = f"{self.rows_each} rows for each expert"
        what = each_has if self.rows_each else "the same tokens, so equal activated compute"
        return [
            f"one MoE layer of D {self.hidden} over the number of experts, {what}; {self.compute}",
            self.device,
            *table(rows),
            conditions(self.turns, *self.load),
        ]


def bench_experts(
    mesh: Mesh,
    hidden: int = 384,
    numbers: Sequence[int] = NUMBERS,
    rows_each: int | None = 512,
    tokens: int = 8192,
    turns: int = 20,
    compute: torch.dtype = torch.float32,
) -> ExpertsBench:
    """Measure our layer, forward and backward, for several numbers of experts. rows_each: None keeps `tokens` for all
    of them.
    """
    before = load()
    keep_freed_memory()
    sizes = {number: number * rows_each if rows_each else tokens for number in numbers}
    actions = {str(number): _layer(Case(hidden, size, number), mesh, compute) for number, size in sizes.items()}
    found = interleaved(actions, turns, mesh.device)
    timings = {number: found[str(number)] for number in numbers}
    kind = str(compute).removeprefix("torch.")
    return ExpertsBench(device_name(mesh.device), kind, hidden, turns, (before, load()), rows_each, timings, sizes)


def _layer(case: Case, mesh: Mesh, compute: torch.dtype) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.tokens, case.hidden)
    x, probe = (torch.randn(shape, generator=generator).to(mesh.device, compute) for _ in range(2))
    return training(our_layer(case, mesh).to(mesh.device), x.requires_grad_(), probe, compute)
