"""Each node fetches its share of the bytes, and little more, when a micro-step's slices have shards of their own."""

from collections.abc import Sequence
from fractions import Fraction

import pytest

from diffmoe_ep.data.mixture import MixedOrder
from diffmoe_ep.data.order import Lanes

SIZES = [[20 + number % 5 for number in range(400)]]  # 8,800 samples, a byte each


def fetched(
    order: MixedOrder,
    shard_bytes: Sequence[Sequence[int]],
    *,
    micro_step: int,
    nodes: int,
    first: int,
    count: int,
    kept: int,
) -> list[int]:
    """Bytes that each node fetches for `count` micro-steps from number `first` on; node n reads the n-th of `nodes`
    equal slices of each.

    shard_bytes: of each dataset, of each shard. kept: shards that a node's cache holds, the one used longest ago is
    dropped. Shards are fetched whole, so what counts is which of them a node touches between two of its blocks.
    """
    local_batch, totals = micro_step // nodes, []
    for node in range(nodes):
        held: dict[tuple[int, int], None] = {}  # in the order of last use
        total = 0
        for number in range(first, first + count):
            begin = number * micro_step + node * local_batch
            used = dict.fromkeys(
                (place.dataset, place.shard) for place in map(order.locate, range(begin, begin + local_batch))
            )
            for name in used:
                if name not in held:
                    total += shard_bytes[name[0]][name[1]]
                held.pop(name, None)
                held[name] = None
            while len(held) > kept:
                held.pop(next(iter(held)))
        totals.append(total)
    return totals


def shares(
    order: MixedOrder, sizes: list[list[int]], nodes: int, micro_step: int = 64, epochs: int = 3, kept: int = 32
) -> list[float]:
    """Bytes that each node fetches in some epochs, over its share of the stored bytes."""
    total = sum(map(sum, sizes))
    count = epochs * total // micro_step
    found = fetched(order, sizes, micro_step=micro_step, nodes=nodes, first=5, count=count, kept=kept)
    return [number / (epochs * total / nodes) for number in found]


@pytest.mark.parametrize(("lanes", "block"), [(8, 2), (8, 8), (16, 4), (32, 2)])
def test_eight_nodes_fetch_their_share(lanes: int, block: int) -> None:
    """With S shards in a lane about (S + 1) / S of it: lanes meet within a shard."""
    order = MixedOrder(SIZES, [Fraction(1)], 7, block, Lanes(lanes, 64 // lanes))
    assert max(shares(order, SIZES, nodes=8, kept=2 * block * lanes // 8)) < 1.2


def test_fewer_nodes_than_lanes_fetch_their_share_too() -> None:
    order = MixedOrder(SIZES, [Fraction(1)], 7, 4, Lanes(8, 8))
    for nodes in (1, 2, 4):
        assert max(shares(order, SIZES, nodes, kept=64)) < 1.2


def test_nodes_of_a_mixture_fetch_their_share() -> None:
    sizes = [[20] * 200, [10] * 400]
    order = MixedOrder(sizes, [Fraction(1), Fraction(1)], 7, 4, Lanes(8, 8))
    assert max(shares(order, sizes, nodes=8)) < 1.2


def test_without_lanes_every_node_fetches_all() -> None:
    order = MixedOrder(SIZES, [Fraction(1)], 7, 8)
    assert min(shares(order, SIZES, nodes=8, epochs=1)) > 7
