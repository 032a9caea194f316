"""The samples of a run in their order, and what is drawn for each, written once more from the words of `data.order` and
`data.rng`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator, Philox

NOISE, TIME, FLIP, DROP, POSTERIOR, ORDER = 1, 2, 3, 4, 5, 6


def generator(seed: int, number: int, purpose: int, part: int = 0) -> Generator:
    """Philox with the key [seed, number] and the counter [0, 0, part, purpose]."""
    key, counter = np.array([seed, number], np.uint64), np.array([0, 0, part, purpose], np.uint64)
    return Generator(Philox(key=key, counter=counter))


def shuffled(items: Sequence[Any], drawn: Generator) -> list[Any]:
    """Sorted by one raw word for each place."""
    return [items[place] for place in np.argsort(drawn.bit_generator.random_raw(len(items)), kind="stable")]


def epoch(number: int, sizes: Sequence[int], seed: int, block: int, lanes: int, micro_step: int) -> list[int]:
    """The stored samples (counted over all shards) at the positions number * total .. (number + 1) * total - 1.

    Shards are shuffled and laid end to end. Each lane gets as many of their samples as it has positions in this epoch,
    lane after lane, and shuffles them among the shards of each run of `block`, counted from its own first shard.
    """
    starts, total = np.cumsum([0, *sizes]), sum(sizes)
    shards = shuffled(range(len(sizes)), generator(seed, number, ORDER)) if block else list(range(len(sizes)))
    laid = [(slot, int(starts[shard]) + place) for slot, shard in enumerate(shards) for place in range(sizes[shard])]
    positions = range(number * total, (number + 1) * total)
    owner = [position % micro_step // (micro_step // lanes) for position in positions]
    found, begin = [0] * total, 0
    for lane in range(lanes):
        mine = [place for place, each in enumerate(owner) if each == lane]
        section = laid[begin : begin + len(mine)]
        begin += len(mine)
        runs: dict[int, list[int]] = {}
        for slot, sample in section:
            runs.setdefault((slot - section[0][0]) // block if block else 0, []).append(sample)
        for run, samples in runs.items():
            if block:
                runs[run] = shuffled(samples, generator(seed, number, ORDER, part=run + 1 + (lane << 32)))
        for place, sample in zip(mine, [sample for samples in runs.values() for sample in samples], strict=True):
            found[place] = sample
    return found


def drawn(seed: int, position: int, moments: np.ndarray, flip: bool, drop: float) -> tuple[Any, Any, float, bool]:
    """Latent (unscaled), noise, u and whether the condition is dropped, of a position that holds moments (2, 2C, H, W).

    The mean and half of the log-variance make the posterior; moments[1] are the mirrored image's.
    """
    mirrored = flip and generator(seed, position, FLIP).random() < 0.5
    mean, log_variance = np.split(moments[int(mirrored)].astype(np.float64), 2)
    normal = [generator(seed, position, of).standard_normal(mean.shape, dtype=np.float32) for of in (POSTERIOR, NOISE)]
    u = float(generator(seed, position, TIME).random(dtype=np.float32))
    dropped = bool(generator(seed, position, DROP).random() < drop)
    return mean + np.exp(log_variance.clip(-30, 20) / 2) * normal[0], normal[1].astype(np.float64), u, dropped
