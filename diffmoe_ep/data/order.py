"""Which stored sample stands at which position of the endless stream: a pure function of shard sizes, seed, block and
lanes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffmoe_ep.data.rng import generator_for, permutation

TRIES = 32  # samples that may stand in for a bad one, before its block is given up


@dataclass(frozen=True)
class Lanes:
    """The stream's positions dealt out to `count` lanes in turn, `run` positions at a time, each lane with shards of
    its own.

    When count * run is a micro-step, its r-th slice is always of the same lanes, so a rank (or a node's ranks) reads
    the shards of its lanes and no others, although neither the order of a batch nor the slices of ranks were touched,
    and ranks may change.
    """

    count: int = 1  # lanes
    run: int = 1  # positions that a lane has in a row

    def split(self, position: int) -> tuple[int, int]:
        """(lane, place in that lane) of a position."""
        if self.count == 1:
            return 0, position
        turn, rest = divmod(position, self.count * self.run)
        return rest // self.run, turn * self.run + rest % self.run

    def join(self, lane: int, place: int) -> int:
        """The position that `split` takes to (lane, place)."""
        turn, rest = divmod(place, self.run)
        return (turn * self.count + lane) * self.run + rest

    def before(self, lane: int, position: int) -> int:
        """How many of the positions 0 .. position - 1 are the lane's."""
        turn, rest = divmod(position, self.count * self.run)
        return turn * self.run + min(max(rest - lane * self.run, 0), self.run)


class Order:
    """Which sample stands at which position of the endless stream of one dataset.

    An epoch visits every sample once: epoch e is the positions e * total .. (e + 1) * total - 1. Its shards are
    permuted and laid end to end; each lane has a section of them, cut into runs of `block` shards, and the samples of
    each run are permuted together, so reading stays within `block` shards of a lane at a time. `block` 0 keeps the
    storage order in every epoch.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, block: int, dataset: int = 0, lanes: Lanes | None = None
    ) -> None:
        """Sizes: samples of each shard, all above 0; seed: 0 .. 2^64 - 1; block: shards shuffled together, 0 for no
        shuffling.

        dataset: its number in a mixture, 0 .. 2^15 - 1, so that equal datasets are not shuffled alike.
        """
        if not sizes or min(sizes) < 1 or block < 0:
            raise ValueError(
                f"an order needs shards with samples and a block of 0 or more shards; got {len(sizes)} shards, block "
                f"{block}"
            )
        self.seed = seed
        self.block = block
        self.lanes = lanes or Lanes()
        self._dataset = dataset
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self.total = int(self._sizes.sum())
        self._layout: _Epoch | None = None  # of the epoch last requested
        self._runs: dict[int, _Run] = {}  # lane -> its run last requested: neighbours share it

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, sample in it) at a position, 0 or above."""
        run, index = self._run(position)
        return run.at(index if run.order is None else int(run.order[index]))

    def locate_all(self, positions: range) -> list[tuple[int, int]]:
        """As `locate`, of neighbouring positions: at once where they lie together in a run."""
        run, first = self._run(positions[0])
        last_run, last = self._run(positions[-1])
        if run is not last_run or last - first != len(positions) - 1:
            return [self.locate(position) for position in positions]
        numbers = np.arange(first, last + 1) if run.order is None else run.order[first : last + 1]
        slots = np.searchsorted(run.starts, numbers, side="right") - 1
        samples = numbers - np.asarray(run.starts)[slots]
        return list(zip(np.asarray(run.shards)[slots].tolist(), samples.tolist(), strict=True))

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """Other samples of the position's block (of its shard where nothing is shuffled), to be tried in turn when its
        own is bad.

        At most `TRIES`, all different, drawn by the position.
        """
        run, index = self._run(position)
        seen = {index if run.order is None else int(run.order[index])}
        generator = generator_for(self.seed, position, "substitute", part=self._dataset)
        for word in np.asarray(generator.bit_generator.random_raw(min(TRIES, run.count - 1)), dtype=np.uint64).tolist():
            other = word % run.count
            while other in seen:
                other = (other + 1) % run.count
            seen.add(other)
            yield run.at(other)

    def block_name(self, position: int) -> tuple[int, int]:
        """What identifies a position's block: its lane, and where in the lane it begins."""
        return self.lanes.split(position)[0], self._run(position)[0].first

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of a position's block and, after them, those of its lane's next block."""
        lane, _ = self.lanes.split(position)
        run, _ = self._run(position)
        following = self._find(lane, run.first + run.count)
        return list(dict.fromkeys(run.shards + following.shards))

    def _run(self, position: int) -> "tuple[_Run, int]":
        """The run of samples that a position is shuffled with, and the position's number in it."""
        lane, place = self.lanes.split(position)
        run = self._runs.get(lane)
        if run is None or not run.first <= place < run.first + run.count:
            run = self._runs[lane] = self._find(lane, place)
            if self.block:
                drawn = permutation(
                    generator_for(self.seed, self._number(run.epoch), "order", part=run.part), run.count
                )
                run = self._runs[lane] = replace(run, order=drawn.astype(np.uint32))
        return run, place - run.first

    def _find(self, lane: int, place: int) -> "_Run":
        """The run at a place of a lane, in its stored order."""
        number = self.lanes.join(lane, place) // self.total
        epoch = self._epoch(number)
        low, high = int(epoch.sections[lane]), int(epoch.sections[lane + 1])
        # From a place in the lane to one in the shards laid end to end.
        offset = low - self.lanes.before(lane, number * self.total)
        slot, first = epoch.slot(place + offset), epoch.slot(low)
        block = (slot - first) // self.block if self.block else 0
        begin = first + block * self.block if self.block else slot
        end = min(begin + (self.block or 1), len(epoch.shards))
        low, high = max(low, int(epoch.starts[begin])), min(high, int(epoch.starts[end]))
        while end > begin + 1 and int(epoch.starts[end - 1]) >= high:  # shards behind the lane's last
            end -= 1
        part = block + 1 + (lane << 32)  # part 0 orders the epoch's shards
        starts = (epoch.starts[begin:end] - low).tolist()
        return _Run(number, part, low - offset, high - low, epoch.shards[begin:end].tolist(), starts)

    def _epoch(self, number: int) -> "_Epoch":
        if self._layout is None or self._layout.number != number:
            count = len(self._sizes)
            shards = (
                permutation(generator_for(self.seed, self._number(number), "order"), count)
                if self.block
                else np.arange(count)
            )
            first, last = number * self.total, (number + 1) * self.total
            shares = [
                self.lanes.before(lane, last) - self.lanes.before(lane, first) for lane in range(self.lanes.count)
            ]
            self._layout = _Epoch(
                number, shards, _cumulated(self._sizes[shards]), _cumulated(np.asarray(shares, dtype=np.int64))
            )
        return self._layout

    def _number(self, epoch: int) -> int:
        return epoch + (self._dataset << 48)


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shards, laid end to end."""

    number: int
    shards: np.ndarray  # (num_shards,) in their order
    starts: np.ndarray  # (num_shards + 1,) place at which each starts
    sections: np.ndarray  # (lanes + 1,) place at which each lane's section starts

    def slot(self, place: int) -> int:
        """Which of the shards, in their order, holds a place."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1


@dataclass(frozen=True)
class _Run:
    """Samples that lie together in a lane and are shuffled together."""

    epoch: int
    part: int  # of the random numbers that shuffle it
    first: int  # its first place in the lane
    count: int  # its samples
    shards: list[int]  # that hold them
    starts: list[int]  # of each, where it starts in the run; the first may start before it
    order: np.ndarray | None = None  # (count,) which of the samples stands at each place; None: as stored

    def at(self, number: int) -> tuple[int, int]:
        """(shard, sample in it) of the run's samples in stored order."""
        slot = bisect_right(self.starts, number) - 1
        return self.shards[slot], number - self.starts[slot]


def _cumulated(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
