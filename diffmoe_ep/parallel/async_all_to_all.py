"""All-to-alls that are started now and waited for later: rows with gradients, and counts on their way to the host.

What is started must be waited for in the order that every rank shares; work between the two hides the time in flight.
On CUDA the exchange of rows runs on the process group's own stream, that of counts on a stream beside the computing
one.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ep.parallel.collectives import Group


class PendingRows:
    """Rows on their way from all ranks of a group; `wait` waits for them."""

    def __init__(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> None:
        self._exchange = _Exchange(list(send), list(receive), group)
        self._rows = rows if group.size == 1 else cast(Tensor, _Start.apply(rows, self._exchange))

    def wait(self) -> Tensor:
        """The rows received (sum(receive), ...), in rank order; the backward is the same exchange the other way, as
        early and as late.
        """
        return self._rows if self._exchange.group.size == 1 else cast(Tensor, _Wait.apply(self._rows, self._exchange))


def start_all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> PendingRows:
    """Start what `all_to_all` does: send[j] consecutive rows to rank j, receive[j] rows from it; splits may be uneven,
    zeros included.
    """
    return PendingRows(rows, send, receive, group)


class RowCounts:
    """How many rows this rank sends to each expert, and receives from each rank for each of its own; soon on the host,
    too.

    The exchange of numbers and their copy to the host start at once; the host waits when it first reads them.
    """

    def __init__(self, sent: Tensor, group: Group, known: int | None = None) -> None:
        """sent (N,). known: every entry of `sent`, here and on every other rank, so that nothing is asked."""
        self.group, self._known = group, known
        self._work: dist.Work | None = None
        self._ready: torch.cuda.Event | None = None
        self.tensor = torch.stack([sent, sent]).to(torch.int32)  # (2, N): what is sent; what comes, as (EP, N / EP)
        if known is not None:
            return
        if group.size > 1:
            group.traffic.count(self.tensor[0].nbytes // group.size * (group.size - 1))
        if sent.is_cuda:
            self._start_on_side_stream()
        elif group.size > 1:
            self._work = dist.all_to_all_single(self.tensor[1], self.tensor[0], group=group.handle, async_op=True)

    @functools.cached_property
    def sent(self) -> list[int]:
        """Rows to each expert (N,)."""
        return self._read[0]

    @functools.cached_property
    def arriving(self) -> list[list[int]]:
        """Rows from each rank for each expert of this one: (EP, N / EP)."""
        here = len(self._read[1]) // self.group.size
        return [self._read[1][rank * here : (rank + 1) * here] for rank in range(self.group.size)]

    @functools.cached_property
    def _read(self) -> list[list[int]]:
        if self._known is not None:
            return [[self._known] * self.tensor.shape[1]] * 2
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._ready is not None:
            self._ready.synchronize()
        self.group.traffic.syncs += 1
        numbers: list[list[int]] = (self._host if self.tensor.is_cuda else self.tensor).tolist()
        return numbers

    def _start_on_side_stream(self) -> None:
        """On CUDA: exchange and copy on a stream beside the computing one, so that neither host nor device waits."""
        side = _side_stream(self.tensor.device.index)
        self._host = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=True)
        self._ready = torch.cuda.Event()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            if self.group.size > 1:
                dist.all_to_all_single(self.tensor[1], self.tensor[0], group=self.group.handle)
            self._host.copy_(self.tensor, non_blocking=True)
            self._ready.record()
        self.tensor.record_stream(side)


@functools.cache
def _side_stream(device: int) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


class _Exchange:
    """One exchange of rows, there and, in the backward, back."""

    def __init__(self, send: list[int], receive: list[int], group: Group) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._pending: tuple[dist.Work, Tensor, Tensor] | None = None  # what is sent must live as long as what comes

    def start(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows = rows.contiguous()
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        work = dist.all_to_all_single(out, rows, receive, send, group=self.group.handle, async_op=True)
        self.group.traffic.count((sum(receive) - receive[self.group.rank]) * out[:1].nbytes)
        self._pending = work, rows, out
        return out

    def wait(self) -> Tensor:
        assert self._pending is not None, "rows are waited for once"
        work, _, out = self._pending
        work.wait()
        self._pending = None
        return out


class _Start(torch.autograd.Function):
    """Forward: start sending. Backward: wait for the gradients whose sending `_Wait` has started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Wait(torch.autograd.Function):
    """Forward: wait for the rows. Backward: start sending their gradients; what it returns only leads autograd on to
    `_Start`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        exchange.wait()
        ctx.exchange = exchange
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(gradients[0], ctx.exchange.receive, ctx.exchange.send)
        return gradients[0], None
