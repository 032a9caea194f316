"""The endless stream of one rank's micro-batches: read, decoded and drawn ahead by worker processes, the same for any number of them."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data import quarantine
from diffmoe_ep.data.draw import Draws, final_latents
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.mixture import Mixture, Place
from diffmoe_ep.data.order import Lanes
from diffmoe_ep.data.quarantine import Fault
from diffmoe_ep.data.remote import Unavailable
from diffmoe_ep.data.sample import Batch, read_sample
from diffmoe_ep.data.shards import Dataset

LONGEST_PAUSE = 60  # seconds between two attempts at a shard that cannot be had


class Stream:
    """Iterate over this rank's Batch of every micro-step, in order, for ever; its whole state is `samples_consumed`.

    Micro-step m covers the positions m M .. (m + 1) M - 1, M = batch / accumulation; rank r has the r-th of `world` equal slices.
    What a batch holds is a function of seed and positions alone, so ranks, workers and restarts change nothing. A sample whose bytes
    are bad is replaced by another of its shuffle block, which its position decides; one that cannot be had is asked for again.
    """

    def __init__(
        self, dataset: Dataset | Mixture, *, seed: int, batch: int, accumulation: int, rank: int, world: int, drop_condition: float,
        flip: bool, shuffle_block: int, workers: int, prefetch: int, samples_consumed: int = 0, lanes: int = 1, retries: int = 0,
        max_bad_fraction: float = 0.0, quarantine_file: Path | None = None,
    ) -> None:  # fmt: skip
        """ConfigError where the numbers do not divide or the dataset has no flips; costs nothing until the first batch is asked for.

        lanes: slices of a micro-step with shards of their own (`order.Lanes`). max_bad_fraction 0: no sample is replaced.
        """
        parts = accumulation * world
        if batch < parts or batch % parts:
            fitting = sorted({max(batch // parts, 1) * parts, (batch // parts + 1) * parts})
            raise ConfigError(
                f"train.batch = {batch} does not divide into train.accumulation = {accumulation} micro-steps on {world} ranks;"
                f" use a multiple of {parts}, such as {' or '.join(map(str, fitting))}"
            )
        micro_step_size = batch // accumulation
        if samples_consumed < 0 or samples_consumed % micro_step_size:
            raise ConfigError(
                f"{samples_consumed} samples are consumed, which is not a whole number of micro-steps of {micro_step_size} samples"
                f" (train.batch = {batch}, train.accumulation = {accumulation}); keep the micro-step of the run that is continued"
            )
        if lanes < 1 or micro_step_size % lanes:
            raise ConfigError(f"data.lanes = {lanes} does not divide the {micro_step_size} samples of a micro-step; use a divisor of these")
        self.mixture = dataset if isinstance(dataset, Mixture) else Mixture([dataset])
        for part in self.mixture.parts if flip else ():
            if part.manifest.kind == "moments" and part.manifest.flips != 2:
                raise ConfigError(f"data.flip = true, but {part.folder} holds no mirrored moments; use data.flip = false or add flips")
        if self.mixture.manifest.condition != "class":
            raise ConfigError(
                f"{self.mixture.names[0]} holds captions, and training needs labels; give a dataset with classes in data.folder"
            )
        if not 0 <= drop_condition <= 1:
            raise ConfigError(f"data.drop_condition = {drop_condition} is no probability; use a number from 0 to 1")
        if workers < 0 or (workers > 0 and prefetch < 1):
            raise ConfigError(f"data.workers = {workers}, data.prefetch = {prefetch}; use 0 or more workers, a prefetch of 1 or more")
        self.samples_consumed = samples_consumed
        self.num_bad = 0  # samples of this rank that had to be replaced since the stream was made
        self._first = samples_consumed
        self._max_bad_fraction = max_bad_fraction
        self._quarantine_file = quarantine_file
        self._micro_step_size = micro_step_size
        self._source = _MicroSteps(
            self.mixture, seed, micro_step_size, rank, world, drop_condition, flip, shuffle_block, lanes, retries, max_bad_fraction > 0
        )
        self._workers = workers
        self._prefetch = prefetch
        self._results: Iterator[_Result] | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next micro-step's Batch.

        DataError names shard and key of a sample that cannot be had or replaced, RuntimeError tells of a worker that died.
        """
        if self._results is None:
            self._results = self._start(self.samples_consumed // self._micro_step_size)
        try:
            result = next(self._results)
        except (RuntimeError, OSError, EOFError) as error:  # the last two: a worker ended while it handed a batch over
            self.close()
            first = self.samples_consumed
            awaited = f"positions {first} to {first + self._micro_step_size - 1}"
            remedy = "look for its cause above, give the host more memory, or try data.workers = 0"
            raise RuntimeError(f"the data workers failed while {awaited} were awaited ({error}); {remedy}") from error
        if isinstance(result, DataError):
            self.close()  # what was read ahead lies behind the bad sample
            raise result
        batch, faults = result
        self.samples_consumed += self._micro_step_size
        if faults:
            self._list(faults)
        return batch

    def check_bad(self, num_bad: int, everywhere: bool = False) -> None:
        """Raise DataError if this many replaced samples, of all ranks since the streams were made, are more than the config allows.

        everywhere: all ranks ask with the same number.
        """
        epoch = self.mixture.num_samples  # counted whole, for bad samples may lie at its beginning
        seen = (max(self.samples_consumed - 1, self._first) // epoch - self._first // epoch + 1) * epoch
        if num_bad > self._max_bad_fraction * seen:
            where = f", listed in {self._quarantine_file.parent}/quarantine-rank*.jsonl" if self._quarantine_file is not None else ""
            raise DataError(
                f"{num_bad} of {seen} samples are bad{where}: more than data.max_bad_fraction = {self._max_bad_fraction:g} of them; "
                "mend the data (diffmoe data check tells what is wrong), or allow more",
                everywhere=everywhere,
            )

    def passes(self) -> dict[str, float]:
        """How often each dataset was gone through so far, by its folder: epochs as a number."""
        return dict(zip(self.mixture.names, self._source.order.passes(self.samples_consumed), strict=True))

    def _list(self, faults: tuple[Fault, ...]) -> None:
        self.num_bad += len(faults)
        try:
            if self._quarantine_file is not None:
                quarantine.append(self._quarantine_file, faults)
            self.check_bad(self.num_bad)
        except DataError:
            self.close()
            self.samples_consumed -= self._micro_step_size
            raise

    def _start(self, micro_step: int) -> "Iterator[_Result]":
        if self._workers == 0:
            return map(self._source.__getitem__, itertools.count(micro_step))
        # The sampler is the endless count of micro-steps: worker w of n gets every n-th, and results come back in its order.
        # A generator of its own keeps the loader away from torch's global random state.
        loader = DataLoader(
            self._source, batch_size=None, sampler=itertools.count(micro_step), num_workers=self._workers,
            prefetch_factor=self._prefetch, generator=torch.Generator(),
        )  # fmt: skip
        return iter(loader)

    def close(self) -> None:
        """Stop the workers and close the shards; the next batch asked for starts them again where the stream stands."""
        if self._workers and self._results is not None:
            self._results._shutdown_workers()  # type: ignore[attr-defined]  # dropping the iterator does it too, but only when collected
        self._results = None
        self.mixture.close()


_Sample = tuple[int, np.ndarray, int]  # number of the dataset, stored array, label
_Result = tuple[Batch, tuple[Fault, ...]] | DataError


class _MicroSteps(TorchDataset["_Result"]):
    """Micro-step number -> this rank's Batch and the bad samples met; or a DataError, which would arrive as a traceback if raised."""

    def __init__(
        self, mixture: Mixture, seed: int, micro_step_size: int, rank: int, world: int, drop_condition: float, flip: bool, block: int,
        lanes: int, retries: int, substitute: bool,
    ) -> None:  # fmt: skip
        self.mixture = mixture
        self.seed = seed
        self.micro_step_size = micro_step_size  # samples of a micro-step over all ranks
        self.share = micro_step_size // world  # this rank's samples in it
        self.offset = rank * self.share  # first of them
        self.drop_condition = drop_condition
        self.flip = flip
        self.retries = retries
        self.substitute = substitute
        self.ahead: dict[int, dict[int, tuple[int, list[int]]]] = {}  # dataset -> lane -> its latest block and the shards to be fetched
        self.draws = Draws(seed)
        self.order = mixture.order(seed, block, Lanes(lanes, micro_step_size // lanes))

    def __getitem__(self, micro_step: int) -> _Result:
        first = micro_step * self.micro_step_size + self.offset
        faults: list[Fault] = []
        self._fetch_ahead(range(first, first + self.share))
        positions = range(first, first + self.share)
        try:
            samples = [self._stored(position, faults) for position in positions]
        except DataError as error:
            return error
        # Every draw has a stream of its own, so none shifts another.
        noise = np.empty((self.share, *self.mixture.manifest.shape), dtype=np.float32)  # (B, C, H, W)
        u, condition = np.empty(self.share, dtype=np.float32), np.empty(self.share, dtype=np.int64)  # (B,)
        flipped = []
        for row, (position, (_, _, label)) in enumerate(zip(positions, samples, strict=True)):
            self.draws.at(position, "noise").standard_normal(out=noise[row], dtype=np.float32)
            u[row] = self.draws.at(position, "time").random(dtype=np.float32)
            flipped.append(self.flip and self.draws.at(position, "flip").random() < 0.5)
            dropped = self.drop_condition > 0 and self.draws.at(position, "drop").random() < self.drop_condition
            condition[row] = self.mixture.manifest.num_classes if dropped else label
        batch = Batch(
            latent=torch.from_numpy(self._latents(positions, samples, flipped)),
            noise=torch.from_numpy(noise),
            u=torch.from_numpy(u),
            condition=torch.from_numpy(condition),
            position=torch.arange(first, first + self.share),
        )
        return batch, tuple(faults)

    def _latents(self, positions: range, samples: list[_Sample], flipped: list[bool]) -> np.ndarray:
        """The final latents, (B, C, H, W), those of each dataset together."""
        datasets = [dataset for dataset, _, _ in samples]
        if len(set(datasets)) == 1:
            return final_latents([array for _, array, _ in samples], self._manifest(datasets[0]), flipped, positions, self.draws)
        latent = np.empty((self.share, *self.mixture.manifest.shape), dtype=np.float32)
        for dataset in set(datasets):
            rows = [row for row, each in enumerate(datasets) if each == dataset]
            arrays, mirrored, places = [samples[row][1] for row in rows], [flipped[row] for row in rows], [positions[row] for row in rows]
            latent[rows] = final_latents(arrays, self._manifest(dataset), mirrored, places, self.draws)
        return latent

    def _manifest(self, dataset: int) -> Manifest:
        return self.mixture.parts[dataset].manifest

    def _fetch_ahead(self, positions: range) -> None:
        """Have the shards of the positions' blocks and of the blocks that follow fetched, if they are remote and not those of before."""
        if all(part.remote is None for part in self.mixture.parts):
            return
        for dataset, blocks in self.order.shards_ahead(positions).items():
            if self.mixture.parts[dataset].remote is None:
                continue
            known = self.ahead.setdefault(dataset, {})
            latest = {lane: (first, shards) for (lane, first), shards in blocks.items()}
            if any(known.get(lane) != block for lane, block in latest.items()):
                known.update(latest)
                wanted = [*blocks.values(), *(shards for _, shards in known.values())]
                self.mixture.parts[dataset].prefetch(list(dict.fromkeys(shard for shards in wanted for shard in shards)))

    def _stored(self, position: int, faults: list[Fault]) -> _Sample:
        """The stored sample of a position or, if its bytes are bad, the first of its substitutes whose are not."""
        place = self.order.locate(position)
        try:
            return self._read(place)
        except Unavailable:
            raise
        except DataError as error:
            if not self.substitute:
                raise
            bad = error
        tried = 0
        for other in self.order.substitutes(position):
            tried += 1
            try:
                stored = self._read(other)
            except Unavailable:
                raise
            except DataError:
                continue
            faults.append(Fault(*self._names(place), str(bad), position, ", ".join(self._names(other))))
            return stored
        raise DataError(f"{bad}; and none of {tried} other samples of its shuffle block can stand in for it, they are bad too") from bad

    def _read(self, place: Place) -> _Sample:
        """A stored sample; a shard that cannot be had is asked for again, since who passed over it would change the order."""
        part = self.mixture.parts[place.dataset]
        for attempt in itertools.count():
            try:
                array, label = read_sample(part, place.shard, place.sample)
                assert isinstance(label, int), "a stream is of datasets with classes"
                return place.dataset, array, label
            except Unavailable as error:
                if attempt == self.retries or part.remote is not None:  # a remote shard has been asked for again already
                    raise
                pause = min(2**attempt, LONGEST_PAUSE)
                print(f"{error}; asking again in {pause} s ({attempt + 1} of {self.retries})", file=sys.stderr, flush=True)
            part.close()  # a descriptor may be stale
            time.sleep(pause)
        raise AssertionError  # the count has no end

    def _names(self, place: Place) -> tuple[str, str]:
        """Shard and key of a stored sample; its number, if the index is bad as well."""
        part = self.mixture.parts[place.dataset]
        try:
            key = part.key(place.shard, place.sample)
        except DataError:
            key = f"number {place.sample}"
        return part.place(part.manifest.shards[place.shard].name), key
