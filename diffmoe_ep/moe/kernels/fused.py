"""The experts as one autograd function: gradients are written in place, and what is worked on stays in the cache.

Legend: N experts, D hidden size, F width of an expert, R rows, n rows of one expert.

Experts are taken in runs (`_cut`): neighbours with equally many rows make one batched matmul, which gives each thread
experts of its own; ragged ones go one by one. Of the activations only those before GELU are kept and those after it
computed again, unless they are few (`keeps_all`): then the weights' own traffic rules, and passes over activations
count, so GELU and its derivative are kept instead. Weights' gradients go straight into their place in a full tensor.
Weights are cast run by run to the type of the rows, in both passes, so that bfloat16 needs no second copy of all
experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import pi, sqrt
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmoe_ep.moe.kernels import onednn
from diffmoe_ep.moe.kernels.plain import Weights, compute_type

RUN = 2**23  # activations (n, F) that a run of several experts holds at most; 32 MiB in float32
PART = 2**20  # activations (n, F) that experts share whose products are made one by one
PIECE = 2**19  # activations that GELU's passes go over at a time
FEW = 2**24  # activations (R, F) at which the backward's needs are kept whole; 128 MiB in float32
# GELU's tanh form is x * sigmoid(z) with z = x * (SLOPE + BEND * x^2).
SLOPE = 2 * sqrt(2 / pi)
BEND = SLOPE * 0.044715


def fused(rows: Tensor, counts: Sequence[int], weights: Weights, compiled: bool = False) -> Tensor:
    """All experts by one function of our own, however ragged; computes in the type of the rows, or autocast's.

    compiled: let torch.compile make one pass of GELU's on a CPU (a compiler is needed, and seconds at the first call).
    """
    rows = rows.to(compute_type(rows)).contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, *weights)):
        return cast(Tensor, _Fused.apply(rows, tuple(counts), compiled, *weights))
    return _forward(rows, list(_cut(counts, weights[0].shape[2])), weights, None, compiled)


@dataclass(frozen=True)
class _Run:
    """Neighbouring experts with equally many rows, computed together."""

    experts: slice
    rows: slice
    each: int  # rows of every one of them

    def of(self, tensor: Tensor) -> Tensor:
        """Their rows of tensor (R, X): (n, X) for one expert, else (experts, n, X)."""
        part = tensor[self.rows]
        return part if self.single else part.view(self.number, self.each, tensor.shape[1])

    def weights(self, tensor: Tensor, kind: torch.dtype | None = None) -> Tensor:
        """Their part of a stacked tensor (N, ...), without the first dimension for one expert."""
        part = tensor[self.experts.start] if self.single else tensor[self.experts]
        return part if kind is None else part.to(kind)

    def parts(self, rows: Tensor, width: int) -> "Sequence[_Run]":
        """What is worked on together but for the weights' gradients: all, or, where `onednn` takes rows like these,
        experts with few.
        """
        if self.single or not onednn.takes(rows):
            return [self]
        some = max(1, PART // max(1, self.each * width))
        starts = range(self.experts.start, self.experts.stop, some)
        return [self._of_experts(start, min(start + some, self.experts.stop)) for start in starts]

    def _of_experts(self, start: int, stop: int) -> "_Run":
        row = self.rows.start - self.experts.start * self.each
        return _Run(slice(start, stop), slice(row + start * self.each, row + stop * self.each), self.each)

    def within(self, run: "_Run") -> "_Run":
        """These experts' place in a tensor that holds the rows of `run` alone."""
        return _Run(self.experts, slice(self.rows.start - run.rows.start, self.rows.stop - run.rows.start), self.each)

    @property
    def num_rows(self) -> int:
        """Rows of all."""
        return int(self.rows.stop - self.rows.start)

    @property
    def number(self) -> int:
        """How many experts these are."""
        return int(self.experts.stop - self.experts.start)

    @property
    def single(self) -> bool:
        """Whether this is one expert by itself."""
        return self.number == 1


def _cut(counts: Sequence[int], width: int) -> Iterator[_Run]:
    """Cut the experts into runs; those without rows, too, since their gradients are zeros."""
    threads = torch.get_num_threads()
    expert, row = 0, 0
    while expert < len(counts):
        each, last = counts[expert], expert + 1
        while last < len(counts) and counts[last] == each and (last + 1 - expert) * each * width <= RUN:
            last += 1
        if last - expert > threads and last < len(counts):
            last -= (last - expert) % threads  # as many experts for every thread
        yield _Run(slice(expert, last), slice(row, row + (last - expert) * each), each)
        expert, row = last, row + (last - expert) * each


def keeps_all(rows: int, width: int, device: str, dtype: torch.dtype) -> bool:
    """Whether the backward is spared GELU's forward, for twice the memory."""
    return rows * width <= FEW and _by_sigmoid(device, dtype)


def _forward(rows: Tensor, runs: Sequence[_Run], weights: Weights, kept: list[Tensor] | None, compiled: bool) -> Tensor:
    """Answers (R, D). To `kept` goes what the backward needs: where all is kept, what a run's GELU gives and each
    part's derivative of it; otherwise what goes into each part's GELU.
    """
    w1, b1, w2, b2 = weights
    kind, width = rows.dtype, w1.shape[2]
    keeps = keeps_all(rows.shape[0], width, rows.device.type, kind)
    out = rows.new_empty(rows.shape[0], w2.shape[2])
    with torch.autocast(rows.device.type, enabled=False):
        for run in runs:
            values = rows.new_empty(run.num_rows, width)
            if kept is not None and keeps:
                kept.append(values)
            for part in run.parts(rows, width):
                value = part.within(run).of(values)
                hidden = _affine(part.of(rows), part.weights(w1, kind), part.weights(b1, kind), None)
                if kept is not None and keeps:
                    _gelu_to_slope(hidden, value, compiled)
                else:
                    _gelu(hidden, value, compiled)
                if kept is not None:
                    kept.append(hidden)
                _affine(value, part.weights(w2, kind), part.weights(b2, kind), part.of(out))
    return out


def _affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    if onednn.takes(x):
        return onednn.linear(x, weight, bias, out)
    if x.dim() == 2:
        return torch.addmm(bias, x, weight, out=out)
    return torch.baddbmm(bias[:, None], x, weight, out=out)


def _times(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    if onednn.takes(x):
        return onednn.linear(x, weight, out=out)
    return torch.mm(x, weight, out=out) if x.dim() == 2 else torch.bmm(x, weight, out=out)


def _outer(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Matmul into `out`, which may be wider: then computed in a's type and copied."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _gelu(x: Tensor, value: Tensor, compiled: bool) -> None:
    """Put GELU of x, in its tanh form, into `value`. A CPU's tanh costs four times its sigmoid; passes over the cache
    cost little.
    """
    if not _by_sigmoid(x.device.type, x.dtype):
        torch.ops.aten.gelu.out(x, approximate="tanh", out=value)
    elif compiled:
        _compiled(_put_value)(x, value)
    else:
        slope = x.new_tensor(SLOPE)
        for part, out in zip(_pieces(x), _pieces(value), strict=True):
            torch.addcmul(slope, part, part, value=BEND, out=out).mul_(part).sigmoid_().mul_(part)


def _gelu_to_slope(x: Tensor, value: Tensor, compiled: bool) -> None:
    """Put GELU of x into `value`, and its derivative in the place of x."""
    if compiled:
        _compiled(_put_value_and_slope)(x, value)
    else:
        _gelu_with_slope(x, value, x)


def _gelu_with_slope(x: Tensor, value: Tensor, slope: Tensor) -> None:
    """Put GELU of x into `value`, and its derivative into `slope`, which may be x itself.

    With s = sigmoid(z), the derivative is s + s (1 - s) x dz/dx.
    """
    constant = x.new_tensor(SLOPE)
    z, s = x.new_empty(2, min(PIECE, x.numel())).unbind()
    for part, out, by_x in zip(_pieces(x), _pieces(value), _pieces(slope), strict=True):
        z, s = z[: len(part)], s[: len(part)]
        torch.addcmul(constant, part, part, value=BEND, out=z).mul_(part)
        torch.sigmoid(z, out=s)
        torch.mul(s, part, out=out)
        z.sub_(part, alpha=2 / 3 * SLOPE)  # x dz/dx = 3 z - 2 SLOPE x; here a third of it
        torch.ops.aten.sigmoid_backward.grad_input(z, s, grad_input=z)
        torch.add(s, z, alpha=3, out=by_x)


def _gelu_backward(x: Tensor, gradient: Tensor, value: Tensor, by_x: Tensor, compiled: bool) -> None:
    """Put GELU of x, computed again, into `value`, and the gradient by x into `by_x`, which may be `gradient`
    itself.
    """
    if not _by_sigmoid(x.device.type, x.dtype):
        torch.ops.aten.gelu.out(x, approximate="tanh", out=value)
        torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=by_x)
    elif compiled:
        _compiled(_put_value_and_gradient)(x, gradient, value, by_x)
    else:
        slope = torch.empty_like(x)
        _gelu_with_slope(x, value, slope)
        torch.mul(gradient, slope, out=by_x)


def _value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    z = x * (SLOPE + BEND * x * x)
    s = torch.sigmoid(z)
    return x * s, s + s * (1 - s) * (3 * z - 2 * SLOPE * x)


def _put_value(x: Tensor, value: Tensor) -> None:
    value.copy_(_value_and_slope(x)[0])


def _put_value_and_slope(x: Tensor, value: Tensor) -> None:
    found, slope = _value_and_slope(x)
    value.copy_(found)
    x.copy_(slope)


def _put_value_and_gradient(x: Tensor, gradient: Tensor, value: Tensor, by_x: Tensor) -> None:
    found, slope = _value_and_slope(x)
    value.copy_(found)
    by_x.copy_(gradient * slope)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _pieces(x: Tensor) -> Sequence[Tensor]:
    return x.view(-1).split(PIECE)


def _by_sigmoid(device: str, dtype: torch.dtype) -> bool:
    """In half precision each pass would round; a GPU does it all in one pass of its own."""
    return device == "cpu" and dtype in (torch.float32, torch.float64)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: tuple[int, ...], compiled: bool, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        ctx.compiled = compiled
        ctx.runs, ctx.kinds = list(_cut(counts, w1.shape[2])), (b1.dtype, b2.dtype)
        out = _forward(rows, ctx.runs, (w1, b1, w2, b2), kept, compiled)
        ctx.save_for_backward(rows, w1, w2, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, w2, *saved = ctx.saved_tensors
        kind, width, out, kept = rows.dtype, w1.shape[2], gradients[0].contiguous(), iter(saved)
        keeps = keeps_all(rows.shape[0], width, rows.device.type, kind)
        by_rows, _, _, by_w1, by_b1, by_w2, by_b2 = ctx.needs_input_grad  # a frozen weight's gradient is not computed
        d_rows = torch.empty_like(rows) if by_rows else None
        d_w1, d_w2 = torch.empty_like(w1) if by_w1 else None, torch.empty_like(w2) if by_w2 else None
        d_b1 = w1.new_empty(w1.shape[0], width, dtype=ctx.kinds[0]) if by_b1 else None
        d_b2 = w2.new_empty(w2.shape[0], w2.shape[2], dtype=ctx.kinds[1]) if by_b2 else None
        with torch.autocast(rows.device.type, enabled=False):
            for run in ctx.runs:
                x, g, whole = run.of(rows), run.of(out), run.within(run)
                values = next(kept) if keeps else rows.new_empty(run.num_rows, width)
                d_hiddens = torch.empty_like(values)
                for part in run.parts(rows, width):
                    value, d_hidden = part.within(run).of(values), part.within(run).of(d_hiddens)
                    d_value = _times(part.of(out), part.weights(w2, kind).mT, None)
                    if keeps:
                        torch.mul(d_value, next(kept), out=d_hidden)
                    else:
                        _gelu_backward(next(kept), d_value, value, d_hidden, ctx.compiled)
                    if d_rows is not None:
                        _times(d_hidden, part.weights(w1, kind).mT, part.of(d_rows))
                value, d_hidden = whole.of(values), whole.of(d_hiddens)
                if d_b2 is not None:
                    run.weights(d_b2).copy_(g.sum(-2))
                if d_b1 is not None:
                    run.weights(d_b1).copy_(d_hidden.sum(-2))
                if d_w1 is not None:
                    _outer(x.mT, d_hidden, run.weights(d_w1))
                if d_w2 is not None:
                    _outer(value.mT, g, run.weights(d_w2))
        return d_rows, None, None, d_w1, d_b1, d_w2, d_b2
