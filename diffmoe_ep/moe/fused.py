"""The experts as one autograd function: gradients are written in place, and what is worked on stays in the cache.

Legend: N experts, D hidden size, F width of an expert, R rows, n rows of one expert.

Experts are taken in runs (`_cut`): neighbours with equally many rows make one batched matmul, which gives each thread experts of its own;
ragged ones go one by one. Of the activations only those before GELU are kept and those after it computed again, unless they are few
(`keeps_all`): then the weights' own traffic rules, and passes over activations count, so GELU and its derivative are kept instead.
Weights' gradients go straight into their place in a full tensor. Weights are cast run by run to the type of the rows, in both passes, so
that bfloat16 needs no second copy of all experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import pi, sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmoe_ep.moe.kernels import Weights, compute_type

RUN = 2**23  # activations (n, F) that a run of several experts holds at most; 32 MiB in float32
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


Gelu = tuple[Tensor, ...]  # of a run: what goes into GELU; or, where both are kept, what comes out and the derivative


def keeps_all(rows: int, width: int, device: str, dtype: torch.dtype) -> bool:
    """Whether the backward is spared GELU's forward, for twice the memory."""
    return rows * width <= FEW and _by_sigmoid(device, dtype)


def _forward(rows: Tensor, runs: Sequence[_Run], weights: Weights, kept: list[Gelu] | None, compiled: bool) -> Tensor:
    """Answers (R, D); what each run's backward needs goes to `kept`."""
    w1, b1, w2, b2 = weights
    kind = rows.dtype
    keeps = keeps_all(rows.shape[0], w1.shape[2], rows.device.type, kind)
    out = rows.new_empty(rows.shape[0], w2.shape[2])
    with torch.autocast(rows.device.type, enabled=False):
        for run in runs:
            hidden = _affine(run.of(rows), run.weights(w1, kind), run.weights(b1, kind), None)
            if kept is not None and keeps:
                value, slope = _gelu_with_slope(hidden, hidden, compiled)
                kept.append((value, slope))
            else:
                value = _gelu(hidden, compiled)
                if kept is not None:
                    kept.append((hidden,))
            _affine(value, run.weights(w2, kind), run.weights(b2, kind), run.of(out))
    return out


def _affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return torch.addmm(bias, x, weight, out=out)
    return torch.baddbmm(bias[:, None], x, weight, out=out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Matmul into `out`, which may be wider: then computed in a's type and copied."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _gelu(x: Tensor, compiled: bool = False) -> Tensor:
    """GELU in its tanh form. A CPU's tanh costs four times its sigmoid; passes over the cache cost little."""
    if not _by_sigmoid(x.device.type, x.dtype):
        return F.gelu(x, approximate="tanh")
    if compiled:
        return _compiled(_value)(x)
    value, slope = torch.empty_like(x), x.new_tensor(SLOPE)
    for part, out in zip(_pieces(x), _pieces(value), strict=True):
        torch.addcmul(slope, part, part, value=BEND, out=out).mul_(part).sigmoid_().mul_(part)
    return value


def _gelu_with_slope(x: Tensor, slope: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """GELU of x, and its derivative, which may go into `slope`, and that may be x itself.

    With s = sigmoid(z), the derivative is s + s (1 - s) x dz/dx.
    """
    if compiled:
        return _compiled(_value_and_slope)(x)
    value, constant = torch.empty_like(x), x.new_tensor(SLOPE)
    z, s = x.new_empty(2, min(PIECE, x.numel())).unbind()
    for part, out, by_x in zip(_pieces(x), _pieces(value), _pieces(slope), strict=True):
        z, s = z[: len(part)], s[: len(part)]
        torch.addcmul(constant, part, part, value=BEND, out=z).mul_(part)
        torch.sigmoid(z, out=s)
        torch.mul(s, part, out=out)
        z.sub_(part, alpha=2 / 3 * SLOPE)  # x dz/dx = 3 z - 2 SLOPE x; here a third of it
        torch.ops.aten.sigmoid_backward.grad_input(z, s, grad_input=z)
        torch.add(s, z, alpha=3, out=by_x)
    return value, slope


def _gelu_backward(x: Tensor, gradient: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """GELU of x, computed again, and the gradient by x, which may go into `gradient`."""
    if not _by_sigmoid(x.device.type, x.dtype):
        again = F.gelu(x, approximate="tanh")
        return again, torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=gradient)
    if compiled:
        return _compiled(_value_and_gradient)(x, gradient)
    value, slope = _gelu_with_slope(x, torch.empty_like(x))
    return value, gradient.mul_(slope)


def _value(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * (SLOPE + BEND * x * x))


def _value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    z = x * (SLOPE + BEND * x * x)
    s = torch.sigmoid(z)
    return x * s, s + s * (1 - s) * (3 * z - 2 * SLOPE * x)


def _value_and_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _value_and_slope(x)
    return value, gradient * slope


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
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...], compiled: bool, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        kept: list[Gelu] = []
        ctx.compiled = compiled
        ctx.runs, ctx.kinds = list(_cut(counts, w1.shape[2])), (b1.dtype, b2.dtype)
        out = _forward(rows, ctx.runs, (w1, b1, w2, b2), kept, compiled)
        ctx.save_for_backward(rows, w1, w2, *(tensor for of_run in kept for tensor in of_run))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, w2, *kept = ctx.saved_tensors
        each = len(kept) // len(ctx.runs)  # tensors of a run
        kind, out = rows.dtype, gradients[0].contiguous()
        by_rows, _, _, by_w1, by_b1, by_w2, by_b2 = ctx.needs_input_grad  # a frozen weight's gradient is not computed
        d_rows = torch.empty_like(rows) if by_rows else None
        d_w1, d_w2 = torch.empty_like(w1) if by_w1 else None, torch.empty_like(w2) if by_w2 else None
        d_b1 = w1.new_empty(w1.shape[0], w1.shape[2], dtype=ctx.kinds[0]) if by_b1 else None
        d_b2 = w2.new_empty(w2.shape[0], w2.shape[2], dtype=ctx.kinds[1]) if by_b2 else None
        with torch.autocast(rows.device.type, enabled=False):
            for number, run in enumerate(ctx.runs):
                x, g = run.of(rows), run.of(out)
                if d_b2 is not None:
                    run.weights(d_b2).copy_(g.sum(-2))  # biases first, while what they sum is in the cache
                d_hidden = g @ run.weights(w2, kind).mT
                if each == 2:
                    value, slope = kept[2 * number : 2 * number + 2]
                    d_hidden.mul_(slope)
                else:
                    value, d_hidden = _gelu_backward(kept[number], d_hidden, ctx.compiled)
                if d_b1 is not None:
                    run.weights(d_b1).copy_(d_hidden.sum(-2))
                if d_rows is not None:
                    _product(d_hidden, run.weights(w1, kind).mT, run.of(d_rows))
                if d_w1 is not None:
                    _product(x.mT, d_hidden, run.weights(d_w1))
                if d_w2 is not None:
                    _product(value.mT, g, run.weights(d_w2))
        return d_rows, None, None, d_w1, d_b1, d_w2, d_b2
