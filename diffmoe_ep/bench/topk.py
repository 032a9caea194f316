"""How long ranks take to find the exact top-k together, by each algorithm; and what a cost model says of rank counts
not at hand.

`measure` runs gather, owner and radix on the ranks that were started, on the same scores, one after the other in every
repetition, and beside them the dispatch that follows. `predict` tabulates the cost model from few ranks to thousands.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ep.bench.timing import conditions, device_name, interleaved, load
from diffmoe_ep.config import ConfigError, tokens_per_expert
from diffmoe_ep.moe.pool import Pools, TopK, topk_per_expert
from diffmoe_ep.moe.topk.cost import (
    ALGORITHMS,
    NETWORK,
    NVLINK,
    Algorithm,
    Link,
    SearchCost,
    cheapest,
    dispatch_bytes,
    link_between,
    search_cost,
)
from diffmoe_ep.parallel.collectives import Group, Traffic, all_sum, all_to_all, all_to_all_even, gather_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.tables import table

MOVE = "dispatch"
RANKS = tuple(2**power for power in range(3, 13))  # 8 to 4096
Compute = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Work:
    """One MoE layer's choice."""

    tokens: int = 1024  # of each rank
    experts: int = 16
    hidden: int = 384
    predictor: bool = True  # whether a capacity predictor's scores ride in the same search, one column for each expert
    capacity: float = 1.0
    compute: Compute = "float32"  # in which rows are dispatched; scores are float32 always

    @property
    def columns(self) -> int:
        """Columns that are searched."""
        return self.experts * (2 if self.predictor else 1)

    @property
    def width(self) -> int:
        """Bytes of a number of a dispatched row."""
        return 2 if self.compute == "bfloat16" else 4


@dataclass(frozen=True)
class Timed:
    """One operation on all ranks: a repetition lasts as long as on its slowest rank."""

    # an algorithm; or dispatch: a row for each chosen pair to its expert and back; or here: a rank alone searches
    name: str
    received: int  # bytes, by the busiest rank
    rounds: int
    minimum: float  # seconds
    median: float
    largest: float
    predicted: SearchCost | None  # None for what is no search


@dataclass(frozen=True)
class Measured:
    """What the ranks at hand take."""

    work: Work
    ranks: int
    nodes: int
    device: str
    repetitions: int
    load: tuple[float, float]  # the machine's average load of a minute, before and after
    identical: bool  # whether all algorithms gave the same bits
    picked: Algorithm  # by auto
    rows: tuple[Timed, ...]

    def lines(self) -> list[str]:
        """A table for the terminal."""
        work, machines = self.work, f"machine{'s' * (self.nodes > 1)}"
        head = [
            f"{self.ranks} ranks on {self.nodes} {machines}; {work.tokens} tokens a rank, {work.experts} experts, "
            f"{work.columns} columns, D {work.hidden}, rows in {work.compute}",
            self.device,
        ]
        rows = [("", "bytes", "expected", "rounds", "min ms", "median", "largest", "predicted")]
        for row in self.rows:
            expected, seconds = (
                ("-", "-") if row.predicted is None else (f"{row.predicted.received:,}", _ms(row.predicted.seconds))
            )
            times = (_ms(row.minimum), _ms(row.median), _ms(row.largest))
            rows.append((row.name, f"{row.received:,}", expected, str(row.rounds), *times, seconds))
        verdict = "the same bits by every algorithm" if self.identical else "THE ALGORITHMS DISAGREE"
        return [
            *head,
            *table(rows),
            f"each turn as long as its slowest rank; {conditions(self.repetitions, *self.load)}",
            f"{verdict}; auto picks {self.picked}"
            if self.ranks > 1
            else "a rank that is alone searches by itself, whatever the algorithm",
        ]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """The cost model for one number of ranks."""

    ranks: int
    nodes: int
    costs: tuple[SearchCost, ...]  # in the order of ALGORITHMS
    dispatch: int  # bytes that a rank receives when its rows go to experts over all these ranks, and back
    picked: Algorithm


@dataclass(frozen=True)
class Predictions:
    """The cost model over rank counts."""

    work: Work
    per_node: int  # ranks of one machine
    inside: Link  # used while all ranks stand on one machine
    across: Link
    rows: tuple[Prediction, ...]

    def lines(self) -> list[str]:
        """A table for the terminal."""
        rows = [
            (
                "ranks",
                "nodes",
                *(part for name in ALGORITHMS for part in (f"{name} MB", "rounds", "ms")),
                "dispatch MB",
                "auto",
            )
        ]
        for row in self.rows:
            parts = [
                part
                for cost in row.costs
                for part in (f"{cost.received / 1e6:.2f}", str(cost.rounds), _ms(cost.seconds))
            ]
            rows.append((str(row.ranks), str(row.nodes), *parts, f"{row.dispatch / 1e6:.1f}", row.picked))
        work = self.work
        return [
            f"one layer's search, {work.tokens} tokens a rank, {work.columns} columns for {work.experts} experts; "
            "MB received by the busiest rank;",
            f"dispatch: rows of D {work.hidden} in {work.compute} to all ranks and back",
            *(
                f"{name}: {_described(link)}"
                for name, link in (("inside a machine", self.inside), ("across machines", self.across))
            ),
            *table(rows),
        ]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


def measure(mesh: Mesh, work: Work, repetitions: int = 20) -> Measured | None:
    """Time the algorithms, and dispatch, over all ranks of the mesh; None on all ranks but the first.

    Raises ConfigError when the experts do not divide over the ranks.
    """
    if work.experts % mesh.size:
        raise ConfigError(
            f"{work.experts} experts do not divide over {mesh.size} ranks, so that nothing can be dispatched; "
            "give a multiple"
        )
    scores, logits = _drawn(work, mesh)
    k = tokens_per_expert(work.tokens * mesh.size, work.capacity, work.experts)
    found: dict[str, TopK] = {}

    def searching(algorithm: Algorithm, group: Group) -> Callable[[], None]:
        def run() -> None:
            found[algorithm] = topk_per_expert(scores, k, Pools(group=group, algorithm=algorithm), extra=logits)

        return run

    groups = {name: replace(mesh.world, traffic=Traffic()) for name in (*ALGORITHMS, MOVE)}
    names = ALGORITHMS if mesh.size > 1 else ALGORITHMS[:1]
    runs = {str(name): searching(name, groups[name]) for name in names}
    for run in runs.values():
        run()
    if mesh.size > 1:
        runs[MOVE] = _moving(found[names[0]].chosen, work, groups[MOVE])
    before = load()
    flag, together = torch.zeros(1, device=mesh.device), replace(mesh.world, traffic=Traffic())
    for group in groups.values():
        group.traffic.reset()
    timings = interleaved(runs, repetitions, mesh.device, lambda: all_sum(flag, together))
    times = {name: timing.seconds for name, timing in timings.items()}
    sent = {name: groups[name].traffic for name in runs}
    calls = repetitions + 1  # the one that warms up sends the same
    counts = {name: (traffic.received // calls, traffic.rounds // calls) for name, traffic in sent.items()}
    same = all(_equal(found[name], found[names[0]]) for name in names)
    reports = gather_objects((times, counts, same), mesh.world)
    if not mesh.is_first:
        return None
    link = link_between(mesh.device.type, mesh.world.nodes)
    costs = {
        str(name): search_cost(name, work.tokens, work.columns, mesh.size, link, experts=work.experts) for name in names
    }
    rows = tuple(_row(name, reports, costs.get(name), alone=mesh.size == 1) for name in runs)
    return Measured(
        work=work,
        ranks=mesh.size,
        nodes=mesh.world.nodes,
        device=device_name(mesh.device),
        repetitions=repetitions,
        load=(before, load()),
        identical=all(same for _, _, same in reports),
        picked=cheapest(work.tokens, work.columns, mesh.size, link, experts=work.experts),
        rows=rows,
    )


def predict(
    work: Work,
    ranks: Sequence[int] = RANKS,
    *,
    per_node: int = 8,
    inside: Link = NVLINK,
    across: Link = NETWORK,
    width: int = 4,
) -> Predictions:
    """Tabulate the cost model: links `inside` a machine of `per_node` ranks and `across` machines; width: bytes of a
    score.
    """
    rows = []
    for number in ranks:
        link = inside if number <= per_node else across
        costs = tuple(
            search_cost(name, work.tokens, work.columns, number, link, experts=work.experts, width=width)
            for name in ALGORITHMS
        )
        picked = cheapest(work.tokens, work.columns, number, link, experts=work.experts, width=width)
        moved = dispatch_bytes(work.capacity * work.tokens, work.hidden, number, work.width)
        rows.append(Prediction(number, -(-number // per_node), costs, round(moved), picked))
    return Predictions(work, per_node, inside, across, tuple(rows))


def _drawn(work: Work, mesh: Mesh) -> tuple[Tensor, Tensor | None]:
    """Scores (S, N) and the predictor's logits (S, N) of this rank."""
    generator = torch.Generator().manual_seed(mesh.rank)
    scores = torch.randn(work.tokens, work.experts, generator=generator).softmax(1).to(mesh.device)
    logits = torch.randn(work.tokens, work.experts, generator=generator).to(mesh.device) if work.predictor else None
    return scores, logits


def _moving(chosen: Tensor, work: Work, group: Group) -> Callable[[], None]:
    """What brings a row for each chosen pair to its expert's rank and back, and nothing else; splits are known
    beforehand.
    """
    leaving = chosen.sum(0).view(group.size, -1).sum(1)  # (W,) rows to each rank
    send, receive = leaving.tolist(), all_to_all_even(leaving, group).tolist()
    rows = torch.zeros(sum(send), work.hidden, dtype=getattr(torch, work.compute), device=chosen.device)

    def move() -> None:
        all_to_all(all_to_all(rows, send, receive, group), receive, send, group)

    return move


def _row(name: str, reports: list[Any], cost: SearchCost | None, alone: bool) -> Timed:
    seconds = [max(values) for values in zip(*(times[name] for times, _, _ in reports), strict=True)]
    received, rounds = max(counts[name] for _, counts, _ in reports)
    shown = "here" if alone else name
    return Timed(shown, received, rounds, min(seconds), statistics.median(seconds), max(seconds), cost)


def _equal(one: TopK, other: TopK) -> bool:
    if not torch.equal(one.chosen, other.chosen):
        return False
    return one.kth_value is None or other.kth_value is None or torch.equal(one.kth_value, other.kth_value)


def _described(link: Link) -> str:
    return (
        f"{link.latency * 1e6:g} us a round and tree level, {link.message * 1e6:g} us a message of an all-to-all, "
        f"{link.bandwidth / 1e9:g} GB/s, {link.rate / 1e9:g} G scores/s searched"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
