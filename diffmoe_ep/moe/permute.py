"""Permutations of rows: the chosen tokens copied out to travel (`permute`), the experts' answers added up by token
(`unpermute`), and rows that came from several ranks grouped by expert (`reorder`).

Legend: S tokens on this rank, D hidden size, N experts (E of them on a rank of EP), R chosen (token, expert) pairs.

A token's answers are added in the order of the experts, whatever the order in which rows travel, so that every layout
and every run returns the same bits. The backward of `permute` is `unpermute` without weights, and the other way round.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Indices of the chosen pairs, in the order in which their rows travel."""

    token: Tensor  # (R,) the token of each pair
    flat_index: Tensor  # (R,) where each pair lies in (S, N) flattened
    by_token: Tensor  # (R,) the pairs ordered by (token, expert)
    offsets: Tensor  # (S,) where each token's pairs begin in by_token


def permutation_of(chosen: Tensor, total: int, experts: Tensor | None = None) -> Permutation:
    """The permutation that orders the `total` pairs of chosen (S, N) by (expert, token); asks the device nothing.

    experts (N,): the experts in the order in which their rows travel, if not in that of their numbers.
    """
    num_experts = chosen.shape[1]
    columns = chosen.T if experts is None else chosen.T.index_select(0, experts)  # (N, S)
    expert, token = torch.nonzero_static(columns, size=total).unbind(1)  # (R,) each
    if experts is not None:
        expert = experts.index_select(0, expert)
    flat_index = token * num_experts + expert
    per_token = chosen.sum(1)
    return Permutation(token.contiguous(), flat_index, flat_index.argsort(), per_token.cumsum(0) - per_token)


def permute(tokens: Tensor, permutation: Permutation) -> Tensor:
    """Copy the rows of the chosen tokens (S, D) out: (R, D)."""
    return cast(Tensor, _Permute.apply(tokens, permutation))


def unpermute(rows: Tensor, weight: Tensor, permutation: Permutation) -> Tensor:
    """Sum rows (R, D), each times its pair's entry of weight (S, N), by token: (S, D), zero where nobody chose.

    Sums are taken in at least float32.
    """
    return cast(Tensor, _Unpermute.apply(rows, weight, permutation))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(permutation.by_token, permutation.offsets)
        return tokens.index_select(0, permutation.token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        by_token, offsets = ctx.saved_tensors
        return _sum_by_token(gradients[0], by_token, offsets), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, permutation: Permutation) -> Tensor:
        ctx.shape = weight.shape
        weight = weight.reshape(-1).index_select(0, permutation.flat_index)  # (R,)
        ctx.save_for_backward(rows, weight, permutation.token, permutation.flat_index)
        wide = torch.promote_types(rows.dtype, weight.dtype)
        ordered = weight.to(wide).index_select(0, permutation.by_token)  # (R,)
        return _sum_by_token(rows.to(wide), permutation.by_token, permutation.offsets, ordered).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, token, flat_index = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, weight.dtype)
        gradient = gradients[0].index_select(0, token).to(wide)  # (R, D)
        of_pairs = (gradient * rows).sum(1).to(weight.dtype)  # (R,)
        of_weight = weight.new_zeros(ctx.shape.numel()).scatter_(0, flat_index, of_pairs).view(ctx.shape)  # (S, N)
        return gradient.mul_(weight[:, None]).to(rows.dtype), of_weight, None


def _sum_by_token(rows: Tensor, by_token: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums (S, D) of rows by token, each in the order of by_token on every device; one pass, without a sorted copy of
    the rows.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros((offsets.shape[0], rows.shape[1]))
    return F.embedding_bag(by_token, rows.contiguous(), offsets, mode="sum", per_sample_weights=weight)


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows (R, D) in another order (R,); the backward applies its inverse."""
    return cast(Tensor, _Reorder.apply(rows, order, inverse))


def order_by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order that takes rows grouped by (rank, expert), counts (EP, E), to grouped by (expert, rank), and its
    inverse, both (total,).
    """
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()  # where each run lies now
    lengths = counts.T.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    position = torch.arange(total, device=counts.device)
    order = position + shift.repeat_interleave(lengths, output_size=total)
    return order, torch.empty_like(order).scatter_(0, order, position)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None
