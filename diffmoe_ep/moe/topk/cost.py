"""What finding the exact top-k together costs, by algorithm: bytes, rounds and, from a link's figures, seconds. Pure
arithmetic.

Legend: S tokens on each rank, C columns (the experts' scores, and those whose k-th value rides along), N of them
experts, W ranks, w bytes of a score (4 or 8). Bytes are the payload that the busiest rank receives from the others.

            bytes                                                    rounds
    gather  w S C (W-1): grows with the ranks                        1
    owner   w S ceil(C/W) (W-1), and 2 w C back: constant while      2
            there are fewer ranks than columns, then as gather's, divided by C
    radix   1024 C for each of w passes, 4 N (W-1) for the ties:     w + 1
            the same for any number of tokens
"""

import math
from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["gather", "owner", "radix"]
ALGORITHMS: tuple[Algorithm, ...] = ("gather", "owner", "radix")
BINS = 256  # of one pass of radix: eight bits of the key
BIN_BYTES = 4  # a count fits 32 bits, since a pool holds fewer than 2^31 tokens


@dataclass(frozen=True)
class Link:
    """How fast ranks talk and search: figures good to a factor of two, which is what a choice among three needs."""

    latency: float  # seconds of a round for each level of a binary tree over the ranks
    message: float  # seconds for each message of an all-to-all, which a rank sends to every other
    bandwidth: float  # bytes per second that a rank receives
    rate: float  # scores per second that a rank searches


@dataclass(frozen=True)
class SearchCost:
    """One search by one algorithm, as the busiest rank sees it."""

    algorithm: Algorithm
    received: int  # bytes from other ranks
    rounds: int  # collectives, each waiting for the one before
    seconds: float  # predicted


CPU = Link(
    latency=200e-6, message=20e-6, bandwidth=1.5e9, rate=1e8
)  # gloo among processes of one machine, one thread each
CPU_NODES = Link(latency=250e-6, message=40e-6, bandwidth=1e9, rate=1e8)  # gloo over Ethernet
NVLINK = Link(latency=6e-6, message=0.5e-6, bandwidth=160e9, rate=5e9)  # NCCL among GPUs of one machine
NETWORK = Link(latency=12e-6, message=1.5e-6, bandwidth=40e9, rate=5e9)  # NCCL over 400 Gb/s for each GPU


def link_between(device: str, nodes: int) -> Link:
    """The figures for ranks on a type of device ("cuda", "cpu") that stand on `nodes` machines."""
    if device == "cuda":
        return NVLINK if nodes == 1 else NETWORK
    return CPU if nodes == 1 else CPU_NODES


def search_cost(
    algorithm: Algorithm,
    tokens: int,
    columns: int,
    ranks: int,
    link: Link,
    *,
    experts: int | None = None,
    width: int = 4,
) -> SearchCost:
    """What one search costs when each of `ranks` ranks has `tokens` tokens.

    columns: the experts' and those that ride along; experts: how many are the experts' (None: all); width: bytes of a
    score.
    """
    if ranks == 1:
        return SearchCost(algorithm, 0, 0, tokens * columns / link.rate)
    others, levels = ranks - 1, math.ceil(math.log2(ranks))
    if algorithm == "gather":
        received, rounds, messages, searched = width * tokens * columns * others, 1, 0, tokens * columns * ranks
    elif algorithm == "owner":
        owned = math.ceil(columns / ranks)  # by the rank that owns most
        received = width * tokens * owned * others + 2 * width * (columns - owned)
        rounds, messages, searched = 2, 2 * others, tokens * owned * ranks
    else:
        ties = 4 * (columns if experts is None else experts) * others
        received = width * BINS * BIN_BYTES * columns + ties
        rounds, messages, searched = width + 1, 0, tokens * columns * width
    seconds = (
        rounds * levels * link.latency + messages * link.message + received / link.bandwidth + searched / link.rate
    )
    return SearchCost(algorithm, received, rounds, seconds)


def cheapest(
    tokens: int, columns: int, ranks: int, link: Link, *, experts: int | None = None, width: int = 4
) -> Algorithm:
    """The algorithm that `search_cost` says is quickest; every rank finds the same, since none of this is measured."""
    return min(
        ALGORITHMS,
        key=lambda name: search_cost(name, tokens, columns, ranks, link, experts=experts, width=width).seconds,
    )


def dispatch_bytes(rows: float, hidden: int, ranks: int, width: int = 2) -> float:
    """Bytes that a rank receives when `rows` rows of its tokens go to experts and back, evenly over `ranks` ranks; for
    comparison.
    """
    return 2 * width * rows * hidden * (ranks - 1) / ranks
