"""Lanes: slices of a micro-step with shards of their own, in an order that still visits every sample once an epoch."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from diffmoe_ep.data import order as orders
from diffmoe_ep.data.order import TRIES, Lanes, Order

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=7)
SEEDS = st.integers(0, 2**64 - 1)
LANES = st.builds(Lanes, st.integers(1, 5), st.integers(1, 6))


def every_sample(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


@settings(deadline=None, max_examples=60)
@given(LANES, st.integers(0, 10**6))
def test_lanes_share_out_the_positions(lanes: Lanes, position: int) -> None:
    lane, place = lanes.split(position)
    assert lanes.join(lane, place) == position
    assert lanes.before(lane, position) == place
    assert sum(lanes.before(each, position) for each in range(lanes.count)) == position
    assert lane == position // lanes.run % lanes.count


@settings(deadline=None, max_examples=80)
@given(SIZES, SEEDS, st.integers(0, 4), LANES, st.integers(0, 10**6))
def test_an_epoch_visits_each_sample_once(sizes: list[int], seed: int, block: int, lanes: Lanes, epoch: int) -> None:
    order = Order(sizes, seed, block, lanes=lanes)
    found = [order.locate(epoch * order.total + place) for place in range(order.total)]
    assert sorted(found) == every_sample(sizes)


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, st.integers(0, 4), LANES, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_the_way_to_a_position_does_not_matter(
    sizes: list[int], seed: int, block: int, lanes: Lanes, positions: list[int]
) -> None:
    used = Order(sizes, seed, block, lanes=lanes)
    found = [used.locate(position) for position in positions]
    assert found == [Order(sizes, seed, block, lanes=lanes).locate(position) for position in positions]
    assert found[::-1] == [pickle.loads(pickle.dumps(used)).locate(position) for position in positions[::-1]]


@settings(deadline=None, max_examples=80)
@given(SIZES, SEEDS, st.integers(0, 4), LANES, st.integers(0, 10**9), st.integers(1, 30))
def test_many_at_once_are_those_one_by_one(
    sizes: list[int], seed: int, block: int, lanes: Lanes, first: int, count: int
) -> None:
    order, positions = Order(sizes, seed, block, lanes=lanes), range(first, first + count)
    assert order.locate_all(positions) == [order.locate(position) for position in positions]


def test_one_lane_is_the_order_without() -> None:
    sizes = [5, 3, 7, 2]
    plain, laned = Order(sizes, 4, 2), Order(sizes, 4, 2, lanes=Lanes(1, 6))
    assert [laned.locate(position) for position in range(60)] == [plain.locate(position) for position in range(60)]


def test_a_lane_reads_shards_of_its_own() -> None:
    """24 equal shards, 4 lanes: each has 6 of them in an epoch, `block` at a time."""
    sizes, lanes = [10] * 24, Lanes(4, 5)
    order = Order(sizes, 9, 2, lanes=lanes)
    shards: list[list[int]] = [[] for _ in range(4)]
    for position in range(240):
        shards[lanes.split(position)[0]].append(order.locate(position)[0])
    assert [len(set(each)) for each in shards] == [6] * 4
    assert len(set().union(*shards)) == 24
    assert all(len(set(each[start : start + 20])) == 2 for each in shards for start in range(0, 60, 20))


def test_datasets_of_a_mixture_are_shuffled_apart() -> None:
    first, second = (Order([20] * 5, 1, 2, number) for number in (0, 1))
    assert [first.locate(position) for position in range(100)] != [second.locate(position) for position in range(100)]


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, st.integers(0, 4), LANES, st.integers(0, 10**6))
def test_substitutes_are_other_samples_of_the_block(
    sizes: list[int], seed: int, block: int, lanes: Lanes, position: int
) -> None:
    order = Order(sizes, seed, block, lanes=lanes)
    found = list(order.substitutes(position))
    assert found == list(Order(sizes, seed, block, lanes=lanes).substitutes(position))
    run, _ = order._run(position)
    others = {run.at(number) for number in range(run.count)} - {order.locate(position)}
    assert len(set(found)) == len(found) == min(TRIES, run.count - 1)
    assert set(found) <= others


def test_shards_ahead_are_those_that_come() -> None:
    sizes, lanes = [4, 6, 5, 7, 3, 5, 6, 4], Lanes(2, 5)
    order = Order(sizes, 3, 2, lanes=lanes)
    for position in range(200):
        ahead = order.shards_ahead(position)
        lane, place = lanes.split(position)
        run, _ = order._run(position)
        coming = [order.locate(lanes.join(lane, later))[0] for later in range(place, run.first + run.count + 1)]
        assert set(coming) <= set(ahead)
        assert len(ahead) <= 6  # two blocks of two, and a shard in each that the lanes share


def test_a_start_anywhere_shuffles_the_shards_and_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of ten million samples: the number of samples whose order is computed, not the time it takes."""
    drawn: list[int] = []
    original = orders.permutation

    def counted(generator: Generator, count: int) -> np.ndarray:
        drawn.append(count)
        return original(generator, count)

    monkeypatch.setattr(orders, "permutation", counted)
    order = Order([10_000] * 1000, 3, 8)
    order.locate(5_000_123)
    assert drawn == [1000, 80_000]
    for position in range(5_000_124, 5_000_624):
        order.locate(position)
    assert drawn == [1000, 80_000]
