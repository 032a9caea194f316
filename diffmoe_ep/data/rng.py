"""Random numbers that follow the thing they are drawn for (a sample's position, an epoch), never the process that draws
them.
"""

import numpy as np
from numpy.random import Generator, Philox

# The highest word of Philox's 256-bit counter. Numbers are part of every run's identity: add new ones, never change
# one.
STREAMS = {
    "noise": 1, "time": 2, "flip": 3, "drop": 4, "posterior": 5, "order": 6, "start": 7, "mixture": 8, "substitute": 9, "caption": 10,
    "resample": 11,
}  # fmt: skip


def generator_for(seed: int, number: int, purpose: str, part: int = 0) -> Generator:
    """The generator that belongs to (seed, number, purpose, part); two different quadruples never share a stream.

    The key of Philox is [seed, number]; `purpose` and `part` (a block of an epoch, a step of a sampler) are the two
    high words of its counter, so a stream would have to draw 2^128 blocks to meet its neighbour. seed, number, part: 0
    .. 2^64 - 1.
    """
    key = np.array([seed, number], dtype=np.uint64)
    counter = np.array([0, 0, part, STREAMS[purpose]], dtype=np.uint64)
    return Generator(Philox(key=key, counter=counter))


def permutation(generator: Generator, count: int) -> np.ndarray:
    """A uniform permutation of 0 .. count - 1 from raw 64-bit words and a stable sort.

    NumPy promises the raw words of Philox for ever, but not what `Generator.permutation` makes of them.
    """
    words = np.asarray(generator.bit_generator.random_raw(count), dtype=np.uint64)
    return np.argsort(words, kind="stable")  # (count,) int64
