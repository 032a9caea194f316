"""Rows to the experts and answers back: `prepare` says where rows go, `dispatch` brings them, `combine` brings the
answers back and adds them up.

Legend: S tokens on this rank, D hidden size, N experts (E = N / EP of them on this rank), R routed tokens at this
rank's experts, one row each.

Each chosen row moves once, in the compute type, to the copy of its expert in this rank's own expert group. The backward
of one verb is the other: what dispatch copies out, its backward adds up; what combine adds up, its backward copies out.
A token's answers are added in the order of the experts, so that sums are taken in the same order on every layout and in
every run.

`prepare` only starts to ask the other ranks how many rows come; the host waits in `dispatch`, so that work in between
(shared experts, the predictor's loss) hides the exchange. Where the choice itself says how many rows there are, nobody
is asked.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffmoe_ep.moe.handle import DispatchHandle
from diffmoe_ep.moe.permute import permute, unpermute
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.async_all_to_all import RowCounts, start_all_to_all
from diffmoe_ep.parallel.collectives import Group, all_to_all


class Dispatcher(Protocol):
    """The verbs that every dispatcher has."""

    def prepare(self, routing: Routing) -> Routing:
        """The routing with its handle; starts to ask the other ranks what comes, and does not wait."""

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, DispatchHandle]:
        """Bring tokens (S, D) to the experts that chose them: rows (R, D) grouped by local expert, and the handle."""

    def combine(self, rows: Tensor, handle: DispatchHandle, weight: Tensor) -> Tensor:
        """Bring the experts' answers (R, D) back and add them up by weight (S, N): (S, D); zero for a token that nobody
        chose.
        """


class LocalDispatch:
    """All experts are here: the reference."""

    def __init__(self) -> None:
        self.group = Group()  # of its own, so that its waits are counted apart

    def prepare(self, routing: Routing) -> Routing:
        """See `Dispatcher.prepare`."""
        known = routing.tokens_per_expert if routing.ranks == 1 else None
        processed = routing.chosen.sum(0)  # (N,)
        row_counts = RowCounts(processed, self.group, known)
        return replace(routing, handle=DispatchHandle(routing.chosen, processed, row_counts, self.group, known))

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.dispatch`."""
        handle = handle_of(routing)
        return permute(tokens, handle.permutation), handle

    def combine(self, rows: Tensor, handle: DispatchHandle, weight: Tensor) -> Tensor:
        """See `Dispatcher.combine`."""
        return unpermute(rows, weight, handle.permutation)


class AllToAllDispatch:
    """Experts are sharded over a group; rows travel by all-to-all with uneven splits, none included."""

    def __init__(self, group: Group, num_chunks: int = 1) -> None:
        self.group, self.num_chunks = group, num_chunks

    def prepare(self, routing: Routing) -> Routing:
        """See `Dispatcher.prepare`. Pools inside this rank say all splits, pools inside the expert group how many rows
        an expert gets.
        """
        known, ranks, size = routing.tokens_per_expert, routing.ranks, self.group.size
        processed = routing.chosen.sum(0)  # (N,)
        row_counts = RowCounts(processed, self.group, known if ranks == 1 else None)
        rows_per_expert = known * (size // ranks) if known is not None and size % ranks == 0 else None
        handle = DispatchHandle(routing.chosen, processed, row_counts, self.group, rows_per_expert, self.num_chunks)
        return replace(routing, handle=handle)

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, DispatchHandle]:
        """See `Dispatcher.dispatch`: permute, exchange, group by expert."""
        handle = handle_of(routing)
        leaving = permute(tokens, handle.permutation).split([sum(chunk.send) for chunk in handle.chunks])
        exchanged = [
            chunk.by_expert(all_to_all(rows, chunk.send, chunk.receive, self.group))
            for rows, chunk in zip(leaving, handle.chunks, strict=True)
        ]
        return concat(exchanged), handle

    def combine(self, rows: Tensor, handle: DispatchHandle, weight: Tensor) -> Tensor:
        """See `Dispatcher.combine`: group by rank, exchange, unpermute."""
        answers = rows.split([sum(chunk.receive) for chunk in handle.chunks])
        exchanged = [
            all_to_all(chunk.by_rank(rows), chunk.receive, chunk.send, self.group)
            for rows, chunk in zip(answers, handle.chunks, strict=True)
        ]
        return unpermute(concat(exchanged), weight, handle.permutation)


def overlapped(experts: nn.Module, tokens: Tensor, handle: DispatchHandle, weight: Tensor) -> Tensor:
    """What combine(experts(dispatch(tokens))) returns, in the handle's chunks: while one computes, the others' rows and
    answers travel.

    Autograd goes through the chunks in the opposite order, last started first waited for, so that the backward overlaps
    in the same way.
    """
    chunks = handle.chunks
    leaving = permute(tokens, handle.permutation).split([sum(chunk.send) for chunk in chunks])
    coming = [
        start_all_to_all(rows, chunk.send, chunk.receive, handle.group)
        for rows, chunk in zip(leaving, chunks, strict=True)
    ]
    sizes = [chunk.end - chunk.start for chunk in chunks]
    weights = {name: parameter.split(sizes) for name, parameter in experts.named_parameters()}  # one backward for all
    returning = []
    for number, (pending, chunk) in enumerate(zip(coming, chunks, strict=True)):
        rows, mine = chunk.by_expert(pending.wait()), {name: parts[number] for name, parts in weights.items()}
        answers = functional_call(experts, mine, (rows, handle.counts[chunk.start : chunk.end]))
        returning.append(start_all_to_all(chunk.by_rank(answers), chunk.receive, chunk.send, handle.group))
    return unpermute(concat([pending.wait() for pending in returning]), weight, handle.permutation)


def handle_of(routing: Routing) -> DispatchHandle:
    """The handle of a prepared routing."""
    assert routing.handle is not None, "a routing is prepared before its rows are dispatched"
    return routing.handle


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Parts one after the other, without a copy where there is one only."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
