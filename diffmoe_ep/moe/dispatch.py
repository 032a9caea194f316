"""Rows to the experts and answers back: `route` says where, `dispatch` brings the rows, `combine` brings the answers
and adds them up.

Legend: S tokens on this rank, D hidden size, N experts (E = N / EP of them on this rank), R chosen (token, expert)
pairs.

Each chosen row moves once, in the compute type, to the copy of its expert in this rank's own expert group. The backward
of one verb is the
other: what dispatch copies out, its backward adds up; what combine adds up, its backward copies out. A token's answers
are added in the order of the experts, so that sums are taken in the same order on every layout and in every run.

A route is made as soon as the choice is known and only starts to ask the other ranks; the host waits for numbers in the
first verb, so that work in between (shared experts, the predictor's loss) hides the exchange. Where the choice itself
says how many rows there are, nobody is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffmoe_ep.moe.permute import Pairs, add_up, copy_out, pairs_of
from diffmoe_ep.moe.routing import Assignment
from diffmoe_ep.moe.rows import permute_rows
from diffmoe_ep.parallel.async_all_to_all import Counts, start_all_to_all
from diffmoe_ep.parallel.collectives import Group, all_to_all


@dataclass(frozen=True)
class Part:
    """Local experts [start, end) whose rows travel together: all of them, or one of the chunks that overlap."""

    start: int
    end: int
    send: Sequence[int]  # rows that go to each rank of the expert group
    receive: Sequence[int]  # rows that come from each rank
    order: (
        Tensor | None
    )  # rows come ordered by (rank, expert): rows[order] is ordered by (expert, rank); None where that is the same
    back: Tensor | None  # the inverse of order

    def by_expert(self, rows: Tensor) -> Tensor:
        """Rows as they came (R, D), grouped by expert."""
        return rows if self.order is None or self.back is None else permute_rows(rows, self.order, self.back)

    def by_rank(self, rows: Tensor) -> Tensor:
        """Rows grouped by expert (R, D), as they go back."""
        return rows if self.order is None or self.back is None else permute_rows(rows, self.back, self.order)


@dataclass(frozen=True)
class Route:
    """Where this rank's chosen rows go and what comes here. No gradient, and frozen, so that a recomputed forward uses
    the same.
    """

    chosen: Tensor  # (S, N) bool
    processed: Tensor  # (N,) rows that each expert of the layer takes from this rank's tokens
    numbers: Counts  # rows to and from each expert and rank; the host waits when it first reads them
    group: Group  # the ranks that rows travel over
    per_expert: int | None = None  # rows that each local expert gets from all ranks, where that is known without asking
    chunks: int = 1  # parts in which rows travel
    compiled: bool = False  # whether `add_up` may use torch.compile

    @cached_property
    def counts(self) -> Sequence[int]:
        """Rows of each local expert, (E,)."""
        if self.per_expert is not None:
            return [self.per_expert] * (len(self.processed) // self.group.size)
        return [sum(column) for column in zip(*self.numbers.arriving, strict=True)]

    @cached_property
    def pairs(self) -> Pairs:
        """This rank's chosen pairs, ordered by (chunk, expert, token), as their rows travel."""
        total, experts = sum(self.numbers.sent), torch.arange(len(self.processed), device=self.chosen.device)
        return pairs_of(self.chosen, total, None if len(self.cuts) == 1 else self._by_cut(experts))

    @cached_property
    def parts(self) -> Sequence[Part]:
        """What travels together, one part for each chunk."""
        ranks, here = self.group.size, len(self.processed) // self.group.size
        arriving = self.numbers.tensor[1].view(ranks, here)
        parts = []
        for start, end in self.cuts:
            send = [sum(self.numbers.sent[rank * here + start : rank * here + end]) for rank in range(ranks)]
            receive = [sum(numbers[start:end]) for numbers in self.numbers.arriving]
            order, back = (
                _expert_major(arriving[:, start:end], sum(receive)) if end - start > 1 and ranks > 1 else (None, None)
            )
            parts.append(Part(start, end, send, receive, order, back))
        return parts

    @property
    def cuts(self) -> Sequence[tuple[int, int]]:
        """Local experts [start, end) of each chunk, as even as they come."""
        here = len(self.processed) // self.group.size
        chunks = min(self.chunks, here)
        return [(here * chunk // chunks, here * (chunk + 1) // chunks) for chunk in range(chunks)]

    def _by_cut(self, experts: Tensor) -> Tensor:
        by_rank = experts.view(self.group.size, -1)
        return torch.cat([by_rank[:, start:end].flatten() for start, end in self.cuts])


class Dispatch(Protocol):
    """The verbs that every dispatcher has."""

    compiled: bool  # whether torch.compile may be used on a CPU

    def route(self, assignment: Assignment) -> Route:
        """Say where the chosen rows go; starts to ask the other ranks what comes, and does not wait."""

    def dispatch(self, tokens: Tensor, route: Route) -> Tensor:
        """Bring tokens (S, D) to the experts that chose them: rows (rows here, D) grouped by local expert."""

    def combine(self, rows: Tensor, route: Route, weight: Tensor) -> Tensor:
        """Bring the experts' answers back and add them up by weight (S, N): (S, D); zero for a token that nobody
        chose.
        """


class LocalDispatch:
    """All experts are here: the reference."""

    def __init__(self) -> None:
        self.group = Group()  # of its own, so that its waits are counted apart
        self.compiled = False

    def route(self, assignment: Assignment) -> Route:
        """See `Dispatch.route`."""
        known = assignment.taken if assignment.ranks == 1 else None
        processed = assignment.chosen.sum(0)  # (N,)
        numbers = Counts(processed, self.group, known)
        return Route(assignment.chosen, processed, numbers, self.group, known, compiled=self.compiled)

    def dispatch(self, tokens: Tensor, route: Route) -> Tensor:
        """See `Dispatch.dispatch`."""
        return copy_out(tokens, route.pairs)

    def combine(self, rows: Tensor, route: Route, weight: Tensor) -> Tensor:
        """See `Dispatch.combine`."""
        return add_up(rows, weight, route.pairs, route.compiled)


class AllToAllDispatch:
    """Experts are sharded over a group; rows travel by all-to-all with uneven splits, none included."""

    def __init__(self, group: Group, chunks: int = 1) -> None:
        self.group, self.chunks, self.compiled = group, chunks, False

    def route(self, assignment: Assignment) -> Route:
        """See `Dispatch.route`. Pools inside this rank say all splits, pools inside the expert group how many rows an
        expert gets.
        """
        taken, ranks = assignment.taken, assignment.ranks
        inside = taken is not None and self.group.size % ranks == 0
        processed = assignment.chosen.sum(0)  # (N,)
        numbers = Counts(processed, self.group, taken if ranks == 1 else None)
        per_expert = taken * (self.group.size // ranks) if taken is not None and inside else None
        return Route(assignment.chosen, processed, numbers, self.group, per_expert, self.chunks, self.compiled)

    def dispatch(self, tokens: Tensor, route: Route) -> Tensor:
        """See `Dispatch.dispatch`: 1. permute locally, 2. exchange, 3. permute locally."""
        leaving = copy_out(tokens, route.pairs).split([sum(part.send) for part in route.parts])
        exchanged = [
            all_to_all(rows, part.send, part.receive, self.group)
            for rows, part in zip(leaving, route.parts, strict=True)
        ]
        return joined([part.by_expert(rows) for rows, part in zip(exchanged, route.parts, strict=True)])

    def combine(self, rows: Tensor, route: Route, weight: Tensor) -> Tensor:
        """See `Dispatch.combine`."""
        answers = rows.split([sum(part.receive) for part in route.parts])
        leaving = [part.by_rank(rows) for rows, part in zip(answers, route.parts, strict=True)]
        exchanged = [
            all_to_all(rows, part.receive, part.send, self.group)
            for rows, part in zip(leaving, route.parts, strict=True)
        ]
        return add_up(joined(exchanged), weight, route.pairs, route.compiled)


def overlapped(experts: nn.Module, tokens: Tensor, route: Route, weight: Tensor) -> Tensor:
    """What combine(experts(dispatch(tokens))) gives, in the route's parts: while one computes, the others' rows and
    answers travel.

    Autograd goes through the parts in the opposite order, last started first landed, so that the backward overlaps in
    the same way.
    """
    leaving = copy_out(tokens, route.pairs).split([sum(part.send) for part in route.parts])
    flights = [
        start_all_to_all(rows, part.send, part.receive, route.group)
        for rows, part in zip(leaving, route.parts, strict=True)
    ]
    sizes = [part.end - part.start for part in route.parts]
    weights = {
        name: parameter.split(sizes) for name, parameter in experts.named_parameters()
    }  # one backward for all parts
    returning = []
    for number, (flight, part) in enumerate(zip(flights, route.parts, strict=True)):
        rows, mine = part.by_expert(flight.land()), {name: parts[number] for name, parts in weights.items()}
        answers = functional_call(experts, mine, (rows, route.counts[part.start : part.end]))
        returning.append(start_all_to_all(part.by_rank(answers), part.receive, part.send, route.group))
    return add_up(joined([flight.land() for flight in returning]), weight, route.pairs, route.compiled)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts one after the other, without a copy where there is one only."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _expert_major(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order that takes rows grouped by (rank, expert), counts (EP, E), to grouped by (expert, rank), and its
    inverse.
    """
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()  # where each run lies now
    lengths = counts.T.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    place = torch.arange(total, device=counts.device)
    order = place + shift.repeat_interleave(lengths, output_size=total)
    return order, torch.empty_like(order).scatter_(0, order, place)
