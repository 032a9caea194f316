"""The few collectives that the project needs, each the identity on one rank; those that carry gradients say what their
backward is.

Each counts, in its group's `traffic`, one round and the payload that this rank receives from the others (of a sum: the
tensor's size, whatever the back end makes of it on the way).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What has gone over a group since the last reset, as seen from this rank."""

    received: int = 0  # bytes of payload from other ranks
    rounds: int = 0  # collectives
    syncs: int = 0  # times that the host waited for the device to learn what came or goes

    def reset(self) -> None:
        """Count from zero again."""
        self.received = self.rounds = self.syncs = 0

    def count(self, received: int) -> None:
        """Add one collective that brings `received` bytes."""
        self.received += received
        self.rounds += 1


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, and this rank's place among them."""

    size: int = 1  # ranks in the group
    rank: int = 0  # this rank's number in the group
    handle: dist.ProcessGroup | None = None  # None only when the group is this rank alone
    nodes: int = 1  # machines that the ranks stand on
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)  # what went over it


ALONE = Group()


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's x (n, ...) along dimension 0, in rank order; all must have the same shape. No
    gradient.
    """
    if group.size == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
    gather(out, x, group=group.handle)
    group.traffic.count((group.size - 1) * x.nbytes)
    return out


def all_sum(x: Tensor, group: Group) -> Tensor:
    """Sum x over the ranks. No gradient."""
    if group.size == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x, group=group.handle)
    group.traffic.count(x.nbytes)
    return x


def largest(value: int, group: Group) -> int:
    """The largest of all ranks' numbers; over a group that carries host memory (gloo), so that no device is waited
    for.
    """
    if group.size == 1:
        return value
    x = torch.tensor(value)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group.handle)
    group.traffic.count(x.nbytes)
    return int(x)


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send rows x[offset_j : offset_j + send[j]] to rank j and concatenate what the ranks send here, receive[j] rows
    from rank j.

    Splits may be uneven, zeros included; the backward is the same exchange with the splits swapped.
    """
    if group.size == 1:
        return x
    return cast(Tensor, _AllToAll.apply(x, list(send), list(receive), group))


def all_to_all_even(x: Tensor, group: Group) -> Tensor:
    """Exchange equal parts of x (size * n, ...): part j goes to rank j. No gradient."""
    if group.size == 1:
        return x.detach()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x.contiguous(), group=group.handle)
    group.traffic.count(x.nbytes // group.size * (group.size - 1))
    return out


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Give every rank the list of all ranks' (small) values; for set-up and messages, never in a training step."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def collect_objects(value: Any, group: Group) -> list[Any] | None:
    """Give the first rank the list of all ranks' values, the others None; for results, never in a training step."""
    if group.size == 1:
        return [value]
    values: list[Any] | None = [None] * group.size if group.rank == 0 else None
    dist.gather_object(value, values, group=group.handle, group_dst=0)
    return values


def first_object(value: Any, group: Group) -> Any:
    """Give every rank the first rank's value, which may be large; for set-up, never in a training step."""
    if group.size == 1:
        return value
    values = [value if group.rank == 0 else None]
    dist.broadcast_object_list(values, group=group.handle, group_src=0)
    return values[0]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.handle)
    group.traffic.count(out.nbytes - receive[group.rank] * out[:1].nbytes)
    return out
