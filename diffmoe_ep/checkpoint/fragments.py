"""Where the elements of a logical tensor lie: intervals on ranks, shards of replicas, boxes in files. Pure functions,
no ranks needed.

Whatever sharded a tensor (experts over an expert group, a flat optimizer partition, replicas), a rank holds intervals
of its row-major elements. So a checkpoint that stores intervals under the tensor's logical shape can be read back by
any other layout.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """An interval of one logical tensor that this rank holds."""

    name: str
    """Canonical name, the same for every layout: `model.blocks.1.ffn.experts.fc1_weight`,
    `optimizer.exp_avg.blocks...`.
    """
    shape: tuple[int, ...]
    """Logical shape of the whole tensor, over all experts."""
    start: int
    """Row-major number of the first element held here."""
    data: torch.Tensor
    """The elements held here: a contiguous 1-D view, so that loading writes into the tensor that it views."""

    def __post_init__(self) -> None:
        assert self.data.dim() == 1, f"{self.name}: a fragment is 1-D, not of shape {tuple(self.data.shape)}"
        assert self.data.is_contiguous(), f"{self.name}: a fragment is contiguous"
        assert 0 <= self.start <= self.stop <= math.prod(self.shape), (
            f"{self.name}: [{self.start}, {self.stop}) is outside {self.shape}"
        )

    @property
    def stop(self) -> int:
        """Row-major number of the element after the last one held here."""
        return self.start + self.data.numel()


def not_finite(fragments: Sequence[Fragment]) -> str | None:
    """The name of the first tensor of which a rank's part holds an infinity or no number; None if all are finite."""
    checked = [each for each in fragments if each.data.is_floating_point()]
    if not checked:
        return None
    finite = torch.stack([each.data.isfinite().all() for each in checked]).tolist()  # the device is asked once
    return next((each.name for each, good in zip(checked, finite, strict=True) if not good), None)


@dataclass(frozen=True)
class Box:
    """An axis-aligned block of a logical tensor whose elements follow each other in row-major order."""

    offsets: tuple[int, ...]
    """Where the block begins, per dimension."""
    sizes: tuple[int, ...]
    """Its length per dimension."""
    first: int
    """Number of its first element within the interval that was split."""

    @property
    def numel(self) -> int:
        """Number of elements in the block."""
        return math.prod(self.sizes)

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The block's part of the interval's elements `data` (1-D), as a view of the block's own shape."""
        return data[self.first : self.first + self.numel].view(self.sizes)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Split the row-major interval [start, stop) of a tensor into blocks, in order: at most 2 * dimensions - 1 of
    them.
    """
    return _boxes(shape, start, stop, (), 0)


def _boxes(shape: tuple[int, ...], start: int, stop: int, outer: tuple[int, ...], first: int) -> list[Box]:
    """Split an interval of the sub-tensor at the index `outer`, whose first element is number `first` of the whole
    interval.
    """
    ones = (1,) * len(outer)
    if start >= stop:
        return []
    if not shape:
        return [Box(outer, ones, first)]
    row = math.prod(shape[1:])
    top, bottom = -(-start // row), stop // row  # the whole rows are top .. bottom - 1
    if top > bottom:  # begins and ends inside one row
        return _boxes(shape[1:], start - bottom * row, stop - bottom * row, (*outer, bottom), first)
    parts = _boxes(shape[1:], start - (top - 1) * row, row, (*outer, top - 1), first) if start < top * row else []
    if top < bottom:
        inner = shape[1:]
        parts.append(Box((*outer, top, *(0 for _ in inner)), (*ones, bottom - top, *inner), first + top * row - start))
    return parts + _boxes(shape[1:], 0, stop - bottom * row, (*outer, bottom), first + bottom * row - start)


def shard_of(fragment: Fragment, index: int, count: int, *, smallest: int = 4096) -> Fragment:
    """The part of a fragment held by `count` replicas that replica `index` writes: nearly equal parts that join to the
    whole, in order.

    No part is cut below `smallest` elements (later replicas then get an empty one): on many ranks the book-keeping of
    tiny pieces would outweigh the data.
    """
    assert 0 <= index < count, f"{fragment.name}: replica {index} of {count}"
    numel = fragment.data.numel()
    parts = max(1, min(count, numel // smallest))
    begin, end = (min(part, parts) * numel // parts for part in (index, index + 1))
    return Fragment(fragment.name, fragment.shape, fragment.start + begin, fragment.data[begin:end])


def whole(name: str, tensor: torch.Tensor) -> Fragment:
    """A tensor that this rank holds completely."""
    return Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))


def expert_fragment(name: str, tensor: torch.Tensor, expert_rank: int, num_experts: int) -> Fragment:
    """This rank's experts (N / EP, ...) as an interval of the logical tensor over all experts (N, ...)."""
    local = tensor.shape[0]
    assert (expert_rank + 1) * local <= num_experts, (
        f"{name}: expert rank {expert_rank} with {local} of {num_experts} experts"
    )
    return Fragment(name, (num_experts, *tensor.shape[1:]), expert_rank * tensor.numel(), tensor.detach().view(-1))


def coverage_fault(intervals: Iterable[tuple[int, int]], numel: int) -> str | None:
    """What keeps the intervals [start, stop) from covering the elements 0 .. numel - 1 exactly once, or None if they
    do.
    """
    covered = 0
    for start, stop in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if start < covered:
            return f"elements {start} to {min(covered, stop) - 1} are given twice"
        if start > covered:
            return f"elements {covered} to {start - 1} are given by no rank"
        covered = stop
    return f"elements {covered} to {numel - 1} are given by no rank" if covered < numel else None
