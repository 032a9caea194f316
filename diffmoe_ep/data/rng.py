"""Random numbers that follow the thing they are drawn for (a sample's position, an epoch), never the process that draws
them.
"""

from typing import Any

import numpy as np
from numpy.random import Generator, Philox

# The highest word of Philox's 256-bit counter. Numbers are part of every run's identity: add new ones, change none.
STREAMS = {
    "noise": 1,
    "time": 2,
    "flip": 3,
    "drop": 4,
    "posterior": 5,
    "order": 6,
    "start": 7,
    "mixture": 8,
    "substitute": 9,
    "caption": 10,
    "resample": 11,
}


def generator_for(seed: int, number: int, stream: str, part: int = 0) -> Generator:
    """The generator that belongs to (seed, number, stream, part); two different quadruples never share numbers.

    The key of Philox is [seed, number]; `stream` and `part` (a block of an epoch, a step of a sampler) are the two
    high words of its counter, so a generator would have to draw 2^128 blocks to meet its neighbour. seed, number and
    part are 0 .. 2^64 - 1.
    """
    key = np.array([seed, number], dtype=np.uint64)
    counter = np.array([0, 0, part, STREAMS[stream]], dtype=np.uint64)
    return Generator(Philox(key=key, counter=counter))


class KeyedRng:
    """The generators of one seed, one at a time: making one costs ten times as much as setting the state of one that is
    there.
    """

    def __init__(self, seed: int) -> None:
        self._philox = Philox(0)
        self._generator = Generator(self._philox)
        self._key = np.array([seed, 0], dtype=np.uint64)
        self._counter = np.zeros(4, dtype=np.uint64)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(4, dtype=np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def at(self, number: int, stream: str) -> Generator:
        """The generator `generator_for(seed, number, stream)`; the one returned before is void."""
        self._key[1] = number
        self._counter[3] = STREAMS[stream]
        self._philox.state = self._state
        return self._generator


def permutation(generator: Generator, count: int) -> np.ndarray:
    """A uniform permutation of 0 .. count - 1 from raw 64-bit words and a stable sort.

    NumPy promises the raw words of Philox for ever, but not what `Generator.permutation` makes of them.
    """
    words = np.asarray(generator.bit_generator.random_raw(count), dtype=np.uint64)
    return np.argsort(words, kind="stable")  # (count,) int64
