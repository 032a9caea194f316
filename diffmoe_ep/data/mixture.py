"""Several datasets read as one, by weight: which of them a position comes from is a pure function of (seed,
position).
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.order import Lanes, Order
from diffmoe_ep.data.remote.fetch import Access
from diffmoe_ep.data.rng import generator_for, permutation
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.data.sources import SampleStore

BLOCK = 1024  # positions of a lane in which each dataset has its due number; part of every mixed run's identity


class Mixture:
    """Datasets and their weights; one dataset alone is a mixture too, and is then just that."""

    def __init__(self, parts: Sequence[SampleStore], weights: Sequence[float] | None = None) -> None:
        """ConfigError where the datasets do not describe the same kind of samples. Weights, all above 0, are equal
        where not given.
        """
        self.parts = tuple(parts)
        self.weights = tuple(Fraction(str(weight)) for weight in weights or [1] * len(parts))
        _check_agreement(self)

    @classmethod
    def open(cls, data: DataConfig) -> "Mixture":
        """Open what the config names: `data.folder`, or all of `data.mixture`; DataError or ConfigError for what does
        not fit.

        Where bad samples may be replaced, shards that are damaged already are tolerated, and listed in `problems`.
        """
        access, tolerant = Access.of(data), data.max_bad_fraction > 0
        if not data.mixture:
            return cls([Dataset.open(data.folder, access, tolerant)])
        return cls(
            [Dataset.open(part.folder, access, tolerant) for part in data.mixture],
            [part.weight for part in data.mixture],
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What each dataset is called in logs and messages: its folder, or its URL without what may be secret."""
        return tuple(part.name for part in self.parts)

    @property
    def problems(self) -> tuple[str, ...]:
        """Damage that was seen and tolerated when the datasets were opened, in words that name the files."""
        return tuple(problem for part in self.parts for problem in part.problems)

    @property
    def manifest(self) -> Manifest:
        """The first dataset's manifest; what a model has to know of samples is the same in all."""
        return self.parts[0].manifest

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Of each dataset."""
        return tuple(part.manifest for part in self.parts)

    @property
    def num_samples(self) -> int:
        """Stored samples of all datasets."""
        return sum(part.manifest.num_samples for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Hash of what is stored and how it is mixed; of a dataset alone, its own."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        total = sum(self.weights)
        lines = [
            f"{part.fingerprint} {weight / total}\n" for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def order(self, seed: int, block: int, lanes: Lanes | None = None) -> "MixedOrder":
        """The order in which the samples are visited."""
        return MixedOrder([part.sizes for part in self.parts], self.weights, seed, block, lanes)

    def close(self) -> None:
        """Close the shards held open; reading opens them again."""
        for part in self.parts:
            part.close()


class Place(NamedTuple):
    """A stored sample."""

    dataset: int  # its number in the mixture
    shard: int
    sample: int  # its number in the shard


class MixedOrder:
    """Which stored sample stands at which position: the dataset by weight, then that dataset's own `Order`.

    A lane's positions are cut into blocks of `BLOCK`; a block holds each dataset's due number of positions (whole
    numbers, whose sums over blocks follow the weights for ever), shuffled. Whoever looks at one position computes one
    block, wherever in the stream it is.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        weights: Sequence[Fraction],
        seed: int,
        block: int,
        lanes: Lanes | None = None,
    ) -> None:
        """sizes: of each dataset, the samples of each of its shards; the rest as in `Order`."""
        self.seed = seed
        self.lanes = lanes or Lanes()
        self.orders = [Order(each, seed, block, number, self.lanes) for number, each in enumerate(sizes)]
        # A dataset's share of what the datasets before it leave over: so counts only grow, and they always sum up.
        self._shares = [weight / sum(weights[number:]) for number, weight in enumerate(weights)]
        self._blocks: dict[int, tuple[int, list[int], list[int]]] = {}  # lane -> its block last requested

    def locate(self, position: int) -> Place:
        """The stored sample at a position, 0 or above."""
        dataset, own = self.own(position)
        return Place(dataset, *self.orders[dataset].locate(own))

    def places(self, positions: range) -> list[Place]:
        """The stored samples at these positions."""
        if len(self.orders) == 1:
            return [Place(0, shard, sample) for shard, sample in self.orders[0].locate_all(positions)]
        return [self.locate(position) for position in positions]

    def substitutes(self, position: int) -> Iterator[Place]:
        """Stored samples that may stand in for the one at a position, in the order in which they are to be tried; see
        `Order`.
        """
        dataset, own = self.own(position)
        for shard, sample in self.orders[dataset].substitutes(own):
            yield Place(dataset, shard, sample)

    def own(self, position: int) -> tuple[int, int]:
        """(dataset of a position, position in that dataset's own stream)."""
        if len(self.orders) == 1:
            return 0, position
        lane, place = self.lanes.split(position)
        number, inside = divmod(place, BLOCK)
        if lane not in self._blocks or self._blocks[lane][0] != number:
            self._blocks[lane] = (number, *self._mixed(lane, number))
        _, datasets, places = self._blocks[lane]
        return datasets[inside], self.lanes.join(lane, places[inside])

    def shards_ahead(self, positions: Sequence[int]) -> dict[int, dict[tuple[int, int], list[int]]]:
        """Dataset -> block -> the shards of it and of the next, for all blocks that the positions lie in."""
        found: dict[int, dict[tuple[int, int], list[int]]] = {}
        for position in positions:
            dataset, own = self.own(position)
            blocks, name = found.setdefault(dataset, {}), self.orders[dataset].block_name(own)
            if name not in blocks:
                blocks[name] = self.orders[dataset].shards_ahead(own)
        return found

    def passes(self, position: int) -> tuple[float, ...]:
        """How often each dataset was gone through before a position (to within a block where there are several)."""
        if len(self.orders) == 1:
            return (position / self.orders[0].total,)
        before = [self.counts(self.lanes.before(lane, position)) for lane in range(self.lanes.count)]
        return tuple(
            sum(counts) / order.total for counts, order in zip(zip(*before, strict=True), self.orders, strict=True)
        )

    def counts(self, places: int) -> tuple[int, ...]:
        """How many of a lane's first `places` places, a multiple of `BLOCK`, each dataset has."""
        counts, rest = [], places
        for share in self._shares:
            taken = (2 * rest * share.numerator + share.denominator) // (2 * share.denominator)  # rest * share, rounded
            counts.append(taken)
            rest -= taken
        return tuple(counts)

    def _mixed(self, lane: int, number: int) -> tuple[list[int], list[int]]:
        """Of each place of a lane's block, (BLOCK,): its dataset, and its place in that dataset's part of the lane."""
        before, after = self.counts(number * BLOCK), self.counts((number + 1) * BLOCK)
        due = [high - low for low, high in zip(before, after, strict=True)]
        order = permutation(generator_for(self.seed, number, "mixture", part=lane), BLOCK)
        datasets = np.repeat(np.arange(len(due)), due)[order]
        places = np.empty(BLOCK, dtype=np.int64)
        for dataset, first in enumerate(before):
            mine = datasets == dataset
            places[mine] = first + np.arange(due[dataset])
        return datasets.tolist(), places.tolist()


# What must be equal for samples to be of one kind. Pixels may be scaled from whatever they are stored as; latents are
# of one encoder. Of text, only the features that are read must be of one encoder: `captions.check_text` sees to it.
_SHARED = ("kind", "shape", "condition", "num_classes", "class_names")
_SHARED_LATENTS = ("scale", "shift", "encoder")


def _check_agreement(mixture: Mixture) -> None:
    first = mixture.manifest
    shared = _SHARED + (_SHARED_LATENTS if first.kind == "moments" else ())
    for where, part in zip(mixture.names[1:], mixture.parts[1:], strict=True):
        for name in shared:
            here, there = getattr(part.manifest, name), getattr(first, name)
            known = name != "encoder" or (here and there)
            if known and here != there:
                raise ConfigError(
                    f"data.mixture: {where} has {name} {_short(here)}, but {mixture.names[0]} has {_short(there)}; a "
                    "mixture is of "
                    f"datasets that agree in {', '.join(shared)}: prepare one of them anew, or leave it out"
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."
