"""The experts as one autograd function, which saves little and writes the weights' gradients in place.

Legend: N experts, D hidden size, F width of an expert, R rows, n rows of one expert.

Experts are taken in runs (`_cut`): neighbors with equally many rows make one batched matmul, which on a CPU gives each
thread experts of its own; ragged ones go one by one. Of the activations only those before GELU are saved, and GELU is
computed again in the backward. Weights are cast run by run to the type of the rows, in both passes, so that bfloat16
needs no second copy of all experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmoe_ep.moe.kernels import onednn
from diffmoe_ep.moe.kernels.gelu import gelu, gelu_and_gradient
from diffmoe_ep.moe.kernels.plain import Weights, compute_type

RUN = 2**23  # activations (n, F) that a run of several experts holds at most; 32 MiB in float32


def fused(rows: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
    """Apply all experts, however ragged, by one function of our own; computes in the type of the rows, or autocast's.

    rows (R, D), counts and weights: as in `plain`. Returns (R, D).
    """
    rows = rows.to(compute_type(rows)).contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, *weights)):
        return cast(Tensor, _Fused.apply(rows, tuple(counts), *weights))
    return _forward(rows, list(_cut(counts, weights[0].shape[2], rows.device)), weights, None)


@dataclass(frozen=True)
class _Run:
    """Neighboring experts with equally many rows, computed together."""

    experts: slice
    rows: slice
    each: int  # rows n of every one of them

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Their rows of tensor (R, X): (n, X) for one expert, else (experts, n, X)."""
        part = tensor[self.rows]
        return part if self.single else part.view(self.number, self.each, tensor.shape[1])

    def weights_of(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Their part of a stacked tensor (N, ...), without the first dimension for one expert."""
        part = tensor[self.experts.start] if self.single else tensor[self.experts]
        return part if dtype is None else part.to(dtype)

    @property
    def number(self) -> int:
        """How many experts these are."""
        return int(self.experts.stop - self.experts.start)

    @property
    def single(self) -> bool:
        """Whether this is one expert by itself."""
        return self.number == 1


def _cut(counts: Sequence[int], width: int, device: torch.device) -> Iterator[_Run]:
    """Cut the experts into runs; those without rows, too, since their gradients are zeros."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    expert, row = 0, 0
    while expert < len(counts):
        each, last = counts[expert], expert + 1
        while last < len(counts) and counts[last] == each and (last + 1 - expert) * each * width <= RUN:
            last += 1
        if last - expert > threads and last < len(counts):
            last -= (last - expert) % threads  # as many experts for every thread
        yield _Run(slice(expert, last), slice(row, row + (last - expert) * each), each)
        expert, row = last, row + (last - expert) * each


def _forward(rows: Tensor, runs: Sequence[_Run], weights: Weights, saved: list[Tensor] | None) -> Tensor:
    """Answers (R, D); what goes into each run's GELU is appended to `saved`."""
    w1, b1, w2, b2 = weights
    dtype = rows.dtype
    out = rows.new_empty(rows.shape[0], w2.shape[2])
    with torch.autocast(rows.device.type, enabled=False):
        for run in runs:
            hidden = _affine(run.rows_of(rows), run.weights_of(w1, dtype), run.weights_of(b1, dtype))
            if saved is not None:
                saved.append(hidden)
            _affine(gelu(hidden), run.weights_of(w2, dtype), run.weights_of(b2, dtype), run.rows_of(out))
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: tuple[int, ...], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        saved: list[Tensor] = []
        ctx.runs, ctx.bias_types = list(_cut(counts, w1.shape[2], rows.device)), (b1.dtype, b2.dtype)
        out = _forward(rows, ctx.runs, (w1, b1, w2, b2), saved)
        ctx.save_for_backward(rows, w1, w2, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, w2, *saved = ctx.saved_tensors
        dtype, out = rows.dtype, gradients[0].contiguous()
        by_rows, _, by_w1, by_b1, by_w2, by_b2 = ctx.needs_input_grad  # a frozen weight's gradient is not computed
        d_rows = torch.empty_like(rows) if by_rows else None
        d_w1, d_w2 = torch.empty_like(w1) if by_w1 else None, torch.empty_like(w2) if by_w2 else None
        d_b1 = w1.new_empty(w1.shape[0], w1.shape[2], dtype=ctx.bias_types[0]) if by_b1 else None
        d_b2 = w2.new_empty(w2.shape[0], w2.shape[2], dtype=ctx.bias_types[1]) if by_b2 else None
        with torch.autocast(rows.device.type, enabled=False):
            for run, hidden in zip(ctx.runs, saved, strict=True):
                x, g = run.rows_of(rows), run.rows_of(out)
                value, d_hidden = gelu_and_gradient(hidden, _times(g, run.weights_of(w2, dtype).mT))
                if d_rows is not None:
                    _times(d_hidden, run.weights_of(w1, dtype).mT, run.rows_of(d_rows))
                if d_b2 is not None:
                    run.weights_of(d_b2).copy_(g.sum(-2))
                if d_b1 is not None:
                    run.weights_of(d_b1).copy_(d_hidden.sum(-2))
                if d_w1 is not None:
                    _outer(x.mT, d_hidden, run.weights_of(d_w1))
                if d_w2 is not None:
                    _outer(value.mT, g, run.weights_of(d_w2))
        return d_rows, None, d_w1, d_b1, d_w2, d_b2


def _affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    if onednn.supports(x):
        return onednn.linear(x, weight, bias, out)
    if x.dim() == 2:
        return torch.addmm(bias, x, weight, out=out)
    return torch.baddbmm(bias[:, None], x, weight, out=out)


def _times(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    if onednn.supports(x):
        return onednn.linear(x, weight, out=out)
    return torch.mm(x, weight, out=out) if x.dim() == 2 else torch.bmm(x, weight, out=out)


def _outer(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Matmul into `out`, which may be wider: then computed in a's type and copied."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out)
    else:
        out.copy_(a @ b)
