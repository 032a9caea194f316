"""The chosen (token, expert) pairs of a rank as indices, and the two ends of their travel: tokens copied out, answers
added up by weight.

Legend: S tokens on this rank, D hidden size, N experts, R chosen pairs.

A token's answers are added in the order of the experts, whatever the order in which rows travel, so that every layout
and every run gives the same bits. The backward of one end is the other, without the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Indices of the chosen pairs, in the order in which their rows travel."""

    token: Tensor  # (R,) the token of each pair
    place: Tensor  # (R,) where each pair lies in (S, N) flattened
    by_token: Tensor  # (R,) the pairs ordered by (token, expert)
    first: Tensor  # (S,) where each token's pairs begin in by_token


def pairs_of(chosen: Tensor, total: int, experts: Tensor | None = None) -> Pairs:
    """The pairs of chosen (S, N), of which there are `total`, ordered by (expert, token); asks the device nothing.

    experts (N,): the experts in the order in which their rows travel, if not in that of their numbers.
    """
    num_experts = chosen.shape[1]
    columns = chosen.T if experts is None else chosen.T.index_select(0, experts)
    expert, token = torch.nonzero_static(columns, size=total).unbind(1)
    if experts is not None:
        expert = experts.index_select(0, expert)
    place = token * num_experts + expert
    per_token = chosen.sum(1)
    return Pairs(token.contiguous(), place, place.argsort(), per_token.cumsum(0) - per_token)


def copy_out(tokens: Tensor, pairs: Pairs) -> Tensor:
    """Copy the rows of the chosen tokens (S, D) out: (R, D)."""
    return cast(Tensor, _CopyOut.apply(tokens, pairs))


def add_up(rows: Tensor, weight: Tensor, pairs: Pairs, compiled: bool = False) -> Tensor:
    """Sum the pairs' rows (R, D), each times its entry of weight (S, N), by token, in at least float32: (S, D); 0 where
    nobody chose.

    compiled: let torch.compile make one pass of the backward on a CPU (a compiler is needed, and seconds at the first
    call).
    """
    return cast(Tensor, _AddUp.apply(rows, weight, pairs, compiled and rows.device.type == "cpu"))


def _sums(rows: Tensor, by_token: Tensor, first: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums (S, D) of rows by token, each in the order of by_token on every device; one pass, without a sorted copy of
    the rows.
    """
    if not len(rows):
        return rows.new_zeros((len(first), rows.shape[1]))
    return F.embedding_bag(by_token, rows.contiguous(), first, mode="sum", per_sample_weights=weight)


class _CopyOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(pairs.by_token, pairs.first)
        return tokens.index_select(0, pairs.token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        by_token, first = ctx.saved_tensors
        return _sums(gradients[0], by_token, first), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, pairs: Pairs, compiled: bool) -> Tensor:
        ctx.shape, ctx.compiled = weight.shape, compiled
        weight = weight.reshape(-1).index_select(0, pairs.place)  # (R,)
        ctx.save_for_backward(rows, weight, pairs.token, pairs.place)
        wide = torch.promote_types(rows.dtype, weight.dtype)
        ordered = weight.to(wide).index_select(0, pairs.by_token)
        return _sums(rows.to(wide), pairs.by_token, pairs.first, ordered).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, token, place = ctx.saved_tensors
        of_rows, found = (_compiled(_of_pairs) if ctx.compiled else _of_pairs)(gradients[0], rows, weight, token)
        of_weight = weight.new_zeros(ctx.shape.numel()).scatter_(0, place, found)
        return of_rows, of_weight.view(ctx.shape), None, None


def _of_pairs(gradient: Tensor, rows: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by rows (R, D) and by their weights (R,), from that by the sums (S, D)."""
    wide = torch.promote_types(rows.dtype, weight.dtype)
    gradient = gradient.index_select(0, token).to(wide)  # (R, D)
    of_weight = (gradient * rows).sum(1).to(weight.dtype)
    return gradient.mul_(weight[:, None]).to(rows.dtype), of_weight


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
