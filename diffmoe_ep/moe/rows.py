"""Rows of a token matrix copied out, added up and reordered; each one's backward is another of them.

Legend: S tokens, D hidden size, R rows.

Sums are taken in a fixed order on every device, so that two runs give the same bits.
"""

from typing import Any, cast

import torch
from torch import Tensor


def take_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Copy rows index (R,) out of tokens (S, D); the backward adds them up in a fixed order."""
    return cast(Tensor, _TakeRows.apply(tokens, index))


def add_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Add rows (R, D) into a zero (size, D) at index (R,), in a fixed order; the backward copies them out."""
    return cast(Tensor, _AddRows.apply(rows, index, size))


def permute_rows(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Reorder rows (R, D) by a permutation (R,); the backward applies its inverse `back`."""
    return cast(Tensor, _PermuteRows.apply(rows, order, back))


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
