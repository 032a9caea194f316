"""Intervals of logical tensors: their boxes, replicas' shares, experts' slices, and the check of coverage."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffmoe_ep.checkpoint.fragments import Fragment, boxes, coverage_fault, expert_fragment, shard_of, whole


@st.composite
def intervals(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape of 0 to 4 dimensions and an interval of its elements."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    start, stop = sorted(draw(st.integers(0, math.prod(shape))) for _ in range(2))
    return shape, start, stop


@settings(deadline=None, max_examples=300)
@given(intervals())
@example(((), 0, 1))
@example(((3, 0, 2), 0, 0))
@example(((4, 4, 4), 1, 63))
@example(((4, 4, 4), 16, 48))
def test_boxes_join_to_the_interval_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    data = torch.arange(start, stop)
    seen: list[int] = []
    found = boxes(shape, start, stop)
    for box in found:
        block = numbers[
            tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True))
        ]
        assert box.first == len(seen)
        np.testing.assert_array_equal(box.view(data).numpy(), block)
        seen += block.reshape(-1).tolist()
    assert seen == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None, max_examples=100)
@given(intervals(), st.integers(1, 7), st.integers(1, 5))
def test_shares_join_to_the_fragment(case: tuple[tuple[int, ...], int, int], count: int, smallest: int) -> None:
    shape, start, stop = case
    fragment = Fragment("x", shape, start, torch.arange(start, stop))
    parts = [shard_of(fragment, index, count, smallest=smallest) for index in range(count)]
    assert torch.cat([part.data for part in parts]).tolist() == list(range(start, stop))
    assert all(
        part.start == fragment.start + sum(before.data.numel() for before in parts[:i]) for i, part in enumerate(parts)
    )
    sizes = [part.data.numel() for part in parts if part.data.numel()]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert len(sizes) == 1 or all(size >= smallest for size in sizes)


def test_fragments_are_views() -> None:
    tensor = torch.nn.Parameter(torch.zeros(2, 3))
    whole("dense", tensor).data[4] = 7.0
    expert_fragment("experts", tensor, 1, 4).data[0] = 5.0
    shard_of(whole("dense", tensor), 1, 2, smallest=1).data[2] = 3.0
    assert tensor.tolist() == [[5.0, 0.0, 0.0], [0.0, 7.0, 3.0]]
    scalar = torch.zeros((), dtype=torch.int64)
    whole("scalar", scalar).data[0] = 9
    assert scalar.item() == 9


def test_experts_are_slices_of_the_logical_tensor() -> None:
    logical = torch.arange(6 * 2 * 5).view(6, 2, 5)
    for rank, local in enumerate(logical.split(2)):
        fragment = expert_fragment("experts", local, rank, 6)
        assert fragment.shape == (6, 2, 5)
        assert torch.equal(fragment.data, logical.view(-1)[fragment.start : fragment.stop])
    with pytest.raises(AssertionError, match="experts: expert rank 3 with 2 of 6 experts"):
        expert_fragment("experts", logical[:2], 3, 6)


def test_a_fragment_lies_inside_its_tensor() -> None:
    with pytest.raises(AssertionError, match=r"x: \[5, 7\) is outside \(2, 3\)"):
        Fragment("x", (2, 3), 5, torch.zeros(2))
    with pytest.raises(AssertionError, match="x: a fragment is 1-D"):
        Fragment("x", (2, 3), 0, torch.zeros(2, 3))
    with pytest.raises(AssertionError, match="x: a fragment is contiguous"):
        Fragment("x", (2, 3), 0, torch.zeros(6)[::2])


@pytest.mark.parametrize(
    ("given_intervals", "numel", "expected"),
    [
        ([(3, 6), (0, 3), (2, 2)], 6, None),
        ([], 0, None),
        ([(0, 2), (3, 6)], 6, "elements 2 to 2 are given by no rank"),
        ([(0, 2)], 6, "elements 2 to 5 are given by no rank"),
        ([(0, 0)], 1, "elements 0 to 0 are given by no rank"),
        ([(0, 4), (3, 6)], 6, "elements 3 to 3 are given twice"),
        ([(0, 6), (0, 6)], 6, "elements 0 to 5 are given twice"),
    ],
)
def test_fault(given_intervals: list[tuple[int, int]], numel: int, expected: str | None) -> None:
    assert coverage_fault(given_intervals, numel) == expected
