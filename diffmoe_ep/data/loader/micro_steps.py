"""The work behind a stream of indexed datasets, done in its worker processes: from the number of a micro-step to a
rank's Batch of it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info

from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.loader.assemble import assemble
from diffmoe_ep.data.loader.draw import Draw
from diffmoe_ep.data.loader.quarantine import Fault
from diffmoe_ep.data.loader.reader import Reader
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.order import Lanes

Result = tuple[Batch, tuple[Fault, ...]] | DataError  # an error, for raised it would arrive as a traceback


@dataclass(frozen=True)
class RankSlice:
    """Which of the samples of every micro-step are a rank's."""

    micro_step_samples: int  # of a micro-step over all ranks
    rank: int
    world: int  # ranks; rank r has the r-th of as many equal slices

    @classmethod
    def of(cls, batch: int, accumulation: int, rank: int, world: int) -> "RankSlice":
        """batch: samples of a step over all ranks, in `accumulation` micro-steps. ConfigError if they do not divide, or
        for a number below 1 or a rank that is none of the world's.
        """
        numbers = {"train.global_batch": batch, "train.grad_accumulation": accumulation, "the number of ranks": world}
        for name, number in numbers.items():
            if number < 1:
                raise ConfigError(f"{name} is {number}; it must be greater than 0")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is none of {world} ranks; they are 0 to {world - 1}")
        parts = accumulation * world
        if batch % parts:
            fitting = sorted({max(batch // parts, 1) * parts, (batch // parts + 1) * parts})
            raise ConfigError(
                f"train.global_batch = {batch} does not divide into train.grad_accumulation = {accumulation} "
                f"micro-steps on {world} ranks; use a multiple of {parts}, such as {' or '.join(map(str, fitting))}"
            )
        return cls(batch // accumulation, rank, world)

    def positions(self, micro_step: int) -> range:
        """The positions of the rank's samples in a micro-step."""
        local_batch = self.micro_step_samples // self.world
        first = micro_step * self.micro_step_samples + self.rank * local_batch
        return range(first, first + local_batch)


class IndexedSteps(IterableDataset["Result"]):
    """A rank's Batch of micro-step after micro-step, with the bad samples met; worker w of n makes every n-th of
    them.
    """

    def __init__(
        self, mixture: Mixture, data: DataConfig, seed: int, of_rank: RankSlice, text: CaptionSpec | None
    ) -> None:
        """ConfigError where data.lanes does not divide a micro-step. text: what is wanted of captions; None: the
        condition is a label.
        """
        size = of_rank.micro_step_samples
        if size % data.lanes:
            raise ConfigError(
                f"data.lanes = {data.lanes} does not divide the {size} samples of a micro-step; use a divisor of these"
            )
        self.first = 0  # micro-step that the next iteration starts at
        self.order = mixture.order(seed, data.shuffle_block, Lanes(data.lanes, size // data.lanes))
        self._mixture, self._of_rank, self._text = mixture, of_rank, text
        self._draw = Draw(seed, data, mixture.manifest)
        self._reader = Reader(mixture.parts, self.order, text, data.retries, tolerant=data.max_bad_fraction > 0)
        # Of each dataset and lane: its latest block, and the shards that were to be fetched for it.
        self._ahead: dict[int, dict[int, tuple[int, list[int]]]] = {}

    def __iter__(self) -> Iterator[Result]:
        info = get_worker_info()
        worker, count = (info.id, info.num_workers) if info is not None else (0, 1)
        return map(self.batch, itertools.count(self.first + worker, count))

    def batch(self, micro_step: int) -> Result:
        """This rank's Batch of a micro-step, a function of seed and positions alone."""
        positions = self._of_rank.positions(micro_step)
        self._fetch_ahead(positions)
        try:
            places = self.order.places(positions)  # which stored sample stands at each position
            draws = self._draw(positions)  # noise, posterior, u, flip, drop: keyed by position
            wanted = zip(places, positions, draws.flip, draws.caption, strict=True)
            stored = [self._reader.read(*each) for each in wanted]  # fast if usual, checked if not, substituted if bad
            batch = assemble(positions, stored, draws, self._mixture.manifest.num_classes, self._text)
        except DataError as error:
            return error
        return batch, tuple(fault for sample in stored for fault in sample.faults)

    def address(self, position: int) -> str | None:
        """Shard and key of the stored sample at a position; one that is bad has a substitute, which is listed."""
        place = self.order.locate(position)
        return ", key ".join(self._mixture.parts[place.dataset].address(place.shard, place.sample))

    def again(self, micro_step: int) -> Result | None:
        """A micro-step's Batch once more, for who wants to look at it."""
        return self.batch(micro_step)

    def passes(self, position: int) -> dict[str, float]:
        """How often each dataset was gone through before a position, by its name: epochs as a number."""
        return dict(zip(self._mixture.names, self.order.passes(position), strict=True))

    def num_seen(self, first: int, position: int) -> int:
        """Samples that bad ones among the positions `first` to `position` - 1 are counted against: epochs are counted
        whole, for bad samples may lie at their beginning.
        """
        epoch = self._mixture.num_samples
        return (max(position - 1, first) // epoch - first // epoch + 1) * epoch

    def _fetch_ahead(self, positions: range) -> None:
        """Have the shards of the positions' blocks and of the blocks that follow fetched, if they are remote and not
        those of before.
        """
        if not any(part.is_remote for part in self._mixture.parts):
            return
        for dataset, blocks in self.order.shards_ahead(positions).items():
            if not self._mixture.parts[dataset].is_remote:
                continue
            known = self._ahead.setdefault(dataset, {})
            latest = {lane: (first, shards) for (lane, first), shards in blocks.items()}
            if any(known.get(lane) != block for lane, block in latest.items()):
                known.update(latest)
                wanted = [*blocks.values(), *(shards for _, shards in known.values())]
                shards = list(dict.fromkeys(shard for shards in wanted for shard in shards))
                self._mixture.parts[dataset].prefetch(shards)
