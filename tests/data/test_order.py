"""Position -> (shard, sample): every epoch visits each sample once, blocks keep reads together, nothing but seed and
position counts.
"""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ep.data.order import Order

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=7)
SEEDS = st.integers(0, 2**64 - 1)


def every_sample(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    return [order.locate(epoch * order.total + place) for place in range(order.total)]


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, st.integers(0, 9), st.integers(0, 10**6))
def test_an_epoch_visits_each_sample_once(sizes: list[int], seed: int, block: int, epoch: int) -> None:
    assert sorted(epoch_of(Order(sizes, seed, block), epoch)) == every_sample(sizes)


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, st.integers(1, 4), st.integers(0, 100))
def test_a_block_touches_only_its_shards(sizes: list[int], seed: int, block: int, epoch: int) -> None:
    visited = [shard for shard, _ in epoch_of(Order(sizes, seed, block), epoch)]
    shards_left = set(range(len(sizes)))
    while visited:
        # The positions of a block are as many as the samples of the shards that it touches, and there are `block` of
        # these.
        count = next(n for n in range(1, len(visited) + 1) if len(set(visited[:n])) == min(block, len(shards_left)))
        touched = set(visited[:count])
        size = sum(sizes[shard] for shard in touched)
        assert set(visited[:size]) == touched <= shards_left
        assert not touched & set(visited[size:])
        shards_left -= touched
        visited = visited[size:]
    assert not shards_left


@settings(deadline=None, max_examples=40)
@given(SIZES, SEEDS, st.integers(0, 4), st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_the_way_to_a_position_does_not_matter(sizes: list[int], seed: int, block: int, positions: list[int]) -> None:
    used = Order(sizes, seed, block)
    found = [used.locate(position) for position in positions]
    assert found == [Order(sizes, seed, block).locate(position) for position in positions]
    assert found[::-1] == [pickle.loads(pickle.dumps(used)).locate(position) for position in positions[::-1]]


@settings(deadline=None, max_examples=30)
@given(SIZES, SEEDS, st.integers(0, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
def test_ranks_and_workers_share_out_the_positions(
    sizes: list[int], seed: int, block: int, world: int, workers: int, first: int
) -> None:
    """Rank r takes slice r of every micro-step, worker w of n every n-th micro-step; joined they are the one
    sequence.
    """
    share, steps = 3, 6
    micro = share * world
    whole = [Order(sizes, seed, block).locate(position) for position in range(first * micro, (first + steps) * micro)]
    joined: dict[int, tuple[int, int]] = {}
    for rank in range(world):
        for worker in range(workers):
            order = Order(sizes, seed, block)
            for step in range(first + worker, first + steps, workers):
                for place in range(share):
                    position = step * micro + rank * share + place
                    joined[position - first * micro] = order.locate(position)
    assert [joined[place] for place in range(len(whole))] == whole


def test_epochs_and_seeds_differ() -> None:
    sizes = [20, 20, 20, 20]
    drawn = [tuple(epoch_of(Order(sizes, seed, 2), epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(drawn)) == len(drawn)
    shards = {tuple(dict.fromkeys(shard for shard, _ in epoch_of(Order(sizes, 0, 1), epoch))) for epoch in range(10)}
    assert len(shards) > 3  # the order of the shards changes too


def test_block_zero_is_storage_order() -> None:
    sizes = [3, 1, 4]
    order = Order(sizes, 5, 0)
    assert epoch_of(order, 0) == epoch_of(order, 7) == every_sample(sizes)


def test_the_order_is_the_one_written_down() -> None:
    """A golden sequence: were it to change, every run that is continued would see other samples."""
    order = Order([3, 2, 4], seed=11, block=2)
    expected = [(0, 2), (2, 2), (0, 1), (2, 1), (2, 3), (2, 0), (0, 0), (1, 1), (1, 0), (2, 2), (1, 0), (2, 1)]
    assert [order.locate(position) for position in range(12)] == expected


def test_starting_inside_ten_million_samples_computes_one_block() -> None:
    sizes = np.full(1000, 10_000)
    order = Order(sizes.tolist(), 3, 8)
    shard, sample = order.locate(123_456_789)
    assert 0 <= shard < 1000
    assert 0 <= sample < 10_000


@pytest.mark.parametrize(("sizes", "block"), [([], 1), ([3, 0], 1), ([3], -1)])
def test_senseless_orders_are_refused(sizes: list[int], block: int) -> None:
    with pytest.raises(ValueError, match="shards"):
        Order(sizes, 0, block)
