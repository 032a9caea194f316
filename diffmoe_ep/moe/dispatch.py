"""Rows to the experts and answers back: `dispatch(tokens, assignment) -> rows, handle` and `combine(rows, handle) -> mixed`.

Legend: S tokens on this rank, D hidden size, N experts (E = N / EP of them on this rank), R chosen (token, expert) pairs.

Each chosen row moves once, in the compute type, to the copy of its expert in this rank's own expert group. The backward of one verb is the
other: what dispatch copies out, its backward adds up; what combine adds up, its backward copies out. Rows are ordered by (expert, token),
so sums are taken in the same order on every layout and in every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from diffmoe_ep.moe.routing import Assignment
from diffmoe_ep.parallel.collectives import Group, all_to_all, all_to_all_even


@dataclass(frozen=True)
class Handle:
    """What combine must know of a dispatch; frozen, so that a recomputed forward uses the same."""

    counts: Sequence[int]  # rows of each local expert, (E,) on the host
    processed: Tensor  # (N,) rows that each expert of the layer takes from this rank's tokens
    token: Tensor  # (R,) token of each of this rank's chosen pairs, ordered by (expert, token)
    weight: Tensor  # (R,) weight of each pair, with gradient
    num_tokens: int  # S
    send: Sequence[int] = ()  # rows that go to each rank of the expert group
    receive: Sequence[int] = ()  # rows that come from each rank
    order: Tensor | None = None  # received rows are ordered by (rank, expert): rows[order] is ordered by (expert, rank)
    back: Tensor | None = None  # the inverse of order


class Dispatch(Protocol):
    """The two verbs that every dispatcher has."""

    def dispatch(self, tokens: Tensor, assignment: Assignment) -> tuple[Tensor, Handle]:
        """Bring tokens (S, D) to the experts that chose them: rows (rows here, D) grouped by local expert."""

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """Bring the experts' answers back and add them up by weight: (S, D); zero for a token that nobody chose."""


class LocalDispatch:
    """All experts are here: the reference."""

    def dispatch(self, tokens: Tensor, assignment: Assignment) -> tuple[Tensor, Handle]:
        """See `Dispatch.dispatch`."""
        processed = assignment.chosen.sum(0)  # (N,)
        counts = processed.tolist()
        token, weight = _pairs(assignment, sum(counts))
        return take_rows(tokens, token), Handle(counts, processed, token, weight, tokens.shape[0])

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """See `Dispatch.combine`."""
        return _weighted_sum(rows, handle)


class AllToAllDispatch:
    """Experts are sharded over a group; rows travel by all-to-all with uneven splits, none included."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, tokens: Tensor, assignment: Assignment) -> tuple[Tensor, Handle]:
        """See `Dispatch.dispatch`: 1. permute locally, 2. exchange, 3. permute locally."""
        ranks = self.group.size
        processed = assignment.chosen.sum(0)  # (N,)
        arriving = all_to_all_even(processed, self.group)  # (N,) as (EP, E): from each rank, for each local expert
        numbers = torch.cat([processed, arriving]).tolist()  # the layer's one host synchronisation
        here = len(processed) // ranks
        send = [sum(numbers[rank * here : (rank + 1) * here]) for rank in range(ranks)]
        by_rank = [numbers[(ranks + rank) * here : (ranks + rank + 1) * here] for rank in range(ranks)]
        receive = [sum(part) for part in by_rank]
        counts = [sum(column) for column in zip(*by_rank, strict=True)]

        token, weight = _pairs(assignment, sum(send))
        rows = all_to_all(take_rows(tokens, token), send, receive, self.group)
        order = _expert_major(arriving.view(ranks, here), sum(receive))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        handle = Handle(counts, processed, token, weight, tokens.shape[0], send, receive, order, back)
        return permute_rows(rows, order, back), handle

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """See `Dispatch.combine`."""
        assert handle.order is not None and handle.back is not None
        rows = all_to_all(permute_rows(rows, handle.back, handle.order), handle.receive, handle.send, self.group)
        return _weighted_sum(rows, handle)


def take_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Copy rows index (R,) out of tokens (S, D); the backward adds them up in a fixed order."""
    return cast(Tensor, _TakeRows.apply(tokens, index))


def add_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Add rows (R, D) into a zero (size, D) at index (R,), in a fixed order; the backward copies them out."""
    return cast(Tensor, _AddRows.apply(rows, index, size))


def permute_rows(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Reorder rows (R, D) by a permutation (R,); the backward applies its inverse `back`."""
    return cast(Tensor, _PermuteRows.apply(rows, order, back))


def _pairs(assignment: Assignment, total: int) -> tuple[Tensor, Tensor]:
    """Token and weight of each chosen pair, ordered by (expert, token), without asking the device how many there are."""
    chosen = assignment.chosen.T.flatten()  # (N * S,) expert-major
    place = torch.where(chosen, chosen.cumsum(0) - 1, total)  # the rest goes to one slot behind the end
    flat = chosen.new_empty(total + 1, dtype=torch.int64).scatter_(0, place, torch.arange(len(chosen), device=chosen.device))[:total]
    tokens = assignment.chosen.shape[0]
    token = flat % max(tokens, 1)
    return token, assignment.weight.T.flatten().index_select(0, flat)


def _expert_major(counts: Tensor, total: int) -> Tensor:
    """The order that takes rows grouped by (rank, expert), counts (EP, E), to grouped by (expert, rank)."""
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()  # where each run lies now
    lengths = counts.T.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(total, device=counts.device) + shift.repeat_interleave(lengths, output_size=total)


def _weighted_sum(rows: Tensor, handle: Handle) -> Tensor:
    mixed = add_rows(rows.to(handle.weight.dtype) * handle.weight[:, None], handle.token, handle.num_tokens)
    return mixed.to(rows.dtype)


def _accumulate(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Deterministic on every device: CUDA's index_add_ adds in no fixed order, its accumulating index_put_ sorts first."""
    out = rows.new_zeros((size, *rows.shape[1:]), dtype=torch.promote_types(rows.dtype, torch.float32))
    rows = rows.to(out.dtype)
    return out.index_put_((index,), rows, accumulate=True) if rows.is_cuda else out.index_add_(0, index, rows)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = tokens.shape[0]
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _accumulate(gradients[0], index, ctx.size).to(gradients[0].dtype), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return _accumulate(rows, index, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index), None, None


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None
