"""Rows of a token matrix copied out, added up and reordered; each one's backward is another of them.

Legend: S tokens, D hidden size, R rows.

Sums are taken in a fixed order on every device, so that two runs give the same bits.
"""

from typing import Any, cast

import torch
from torch import Tensor


def permute_rows(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Reorder rows (R, D) by a permutation (R,); the backward applies its inverse `back`."""
    return cast(Tensor, _PermuteRows.apply(rows, order, back))


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None
