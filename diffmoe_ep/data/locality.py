"""Which bytes each node would fetch: the order, cut into the slices of ranks, counted without reading anything.

Shards are fetched whole and kept while their block lasts, so what counts is which shards a node touches between two of
its blocks. With one lane every rank draws from the same `shuffle_block` shards, so every node fetches all bytes. Lanes
(`order.Lanes`) give each slice of a micro-step shards of its own; a node, whose ranks are neighbours, then fetches its
share and little more: a shard at either end of a lane is shared with the next lane. That costs nothing elsewhere:
slices, batches and pools are as they are, only the order knows lanes.
"""

from collections.abc import Sequence

from diffmoe_ep.data.mixture import MixedOrder


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
    dropped. Raises ValueError where a micro-step does not divide.
    """
    if micro_step % nodes:
        raise ValueError(
            f"a micro-step of {micro_step} samples does not divide over {nodes} nodes; use a multiple of the nodes"
        )
    share, totals = micro_step // nodes, []
    for node in range(nodes):
        held: dict[tuple[int, int], None] = {}  # in the order of last use
        total = 0
        for number in range(first, first + count):
            begin = number * micro_step + node * share
            used = dict.fromkeys(
                (place.dataset, place.shard) for place in map(order.locate, range(begin, begin + share))
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
