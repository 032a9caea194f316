"""The endless stream of one rank's micro-batches: read, decoded and drawn ahead by worker processes, the same for any
number of them.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.captions import CaptionSpec, check_text
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.assemble import Assembler
from diffmoe_ep.data.loader.micro_steps import MicroSteps, Result
from diffmoe_ep.data.loader.pack import Packed, pack, unpack
from diffmoe_ep.data.loader.quarantine import Fault
from diffmoe_ep.data.loader.resampled import PlainTars, ResampledSteps
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.order import Lanes
from diffmoe_ep.data.sample import Batch
from diffmoe_ep.data.shards import Dataset

PackedResult = tuple[Packed, tuple[Fault, ...]] | DataError
LEAST_SEEN = 65_536  # samples that bad ones are counted against where nobody knows how many there are


class Stream:
    """Iterate over this rank's Batch of every micro-step, in order, for ever; its whole state is `samples_consumed`.

    Micro-step m covers the positions m M .. (m + 1) M - 1, M = batch / accumulation; rank r has the r-th of `world`
    equal slices. What a batch holds is a function of seed and positions alone, so ranks, workers and restarts change
    nothing. A sample whose bytes are bad is replaced by another of its shuffle block, which its position decides; one
    that cannot be had is asked for again. Of `PlainTars`, which nobody has indexed, all that is promised stands in
    `resampled`.
    """

    def __init__(
        self, dataset: Dataset | Mixture | PlainTars, *, seed: int, batch: int, accumulation: int, rank: int, world: int, drop_condition: float,
        flip: bool, shuffle_block: int, workers: int, prefetch: int, samples_consumed: int = 0, lanes: int = 1, retries: int = 0,
        max_bad_fraction: float = 0.0, quarantine_file: Path | None = None, text: CaptionSpec | None = None,
    ) -> None:  # fmt: skip
        """ConfigError where the numbers do not divide or the dataset has not what is asked for; costs nothing before
        the first batch.

        lanes: slices of a micro-step with shards of their own (`order.Lanes`). max_bad_fraction 0: no sample is
        replaced.
        text: what is wanted of captions; None: the condition is a label.
        """
        parts = accumulation * world
        if batch < parts or batch % parts:
            fitting = sorted({max(batch // parts, 1) * parts, (batch // parts + 1) * parts})
            raise ConfigError(
                f"train.global_batch = {batch} does not divide into train.grad_accumulation = {accumulation} micro-steps on {world} ranks;"
                f" use a multiple of {parts}, such as {' or '.join(map(str, fitting))}"
            )
        micro_step_size = batch // accumulation
        if samples_consumed < 0 or samples_consumed % micro_step_size:
            raise ConfigError(
                f"{samples_consumed} samples are consumed, which is not a whole number of micro-steps of {micro_step_size} samples"
                f" (train.global_batch = {batch}, train.grad_accumulation = {accumulation}); keep the micro-step of the run that is continued"
            )
        if lanes < 1 or micro_step_size % lanes:
            raise ConfigError(
                f"data.lanes = {lanes} does not divide the {micro_step_size} samples of a micro-step; use a divisor of these"
            )
        self.dataset = dataset if isinstance(dataset, Mixture | PlainTars) else Mixture([dataset])
        for name, manifest in zip(self.dataset.names, self.dataset.manifests, strict=True):
            if flip and manifest.kind == "moments" and manifest.flips != 2:
                raise ConfigError(
                    f"data.flip = true, but {name} holds no mirrored moments; use data.flip = false or add flips"
                )
        check_text(self.dataset, text)
        if not 0 <= drop_condition <= 1:
            raise ConfigError(f"data.condition_dropout = {drop_condition} is no probability; use a number from 0 to 1")
        if workers < 0 or (workers > 0 and prefetch < 1):
            raise ConfigError(
                f"data.workers = {workers}, data.prefetch = {prefetch}; use 0 or more workers, a prefetch of 1 or more"
            )
        self.samples_consumed = samples_consumed
        self.num_bad = 0  # samples of this rank that had to be replaced since the stream was made
        self._first = samples_consumed
        self._max_bad_fraction = max_bad_fraction
        self._quarantine_file = quarantine_file
        self._micro_step_size = micro_step_size
        share, assembler = micro_step_size // world, Assembler(seed, drop_condition, flip, text)
        rows, tolerant = range(rank * share, (rank + 1) * share), max_bad_fraction > 0
        self._source: MicroSteps | ResampledSteps
        if isinstance(self.dataset, PlainTars):
            self._source = ResampledSteps(self.dataset, assembler, seed, micro_step_size, rows, tolerant)
        else:
            order = self.dataset.order(seed, shuffle_block, Lanes(lanes, micro_step_size // lanes))
            self._source = MicroSteps(self.dataset, order, assembler, micro_step_size, rows, retries, tolerant)
            if self._source.slow is not None and rank == 0:
                print(
                    f"latents are made without native code, slower and the same to the bit: {self._source.slow}",
                    file=sys.stderr,
                )
        self._workers = workers
        self._prefetch = prefetch
        self._results: Iterator[Result | PackedResult] | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next micro-step's Batch.

        DataError names shard and key of a sample that cannot be had or replaced, RuntimeError tells of a worker that
        died.
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
        if isinstance(batch, Packed):
            batch = unpack(batch)
        self.samples_consumed += self._micro_step_size
        if faults:
            self._list(faults)
        return batch

    def check_bad(self, num_bad: int, everywhere: bool = False) -> None:
        """Raise DataError if this many replaced samples, of all ranks since the streams were made, are more than the
        config allows.

        everywhere: all ranks ask with the same number.
        """
        if isinstance(self.dataset, PlainTars):
            seen = max(self.samples_consumed - self._first, LEAST_SEEN)
        else:
            epoch = self.dataset.num_samples  # counted whole, for bad samples may lie at its beginning
            seen = (max(self.samples_consumed - 1, self._first) // epoch - self._first // epoch + 1) * epoch
        if num_bad > self._max_bad_fraction * seen:
            where = (
                f", listed in {self._quarantine_file.parent}/quarantine-rank*.jsonl"
                if self._quarantine_file is not None
                else ""
            )
            raise DataError(
                f"{num_bad} of {seen} samples are bad{where}: more than data.max_bad_fraction = {self._max_bad_fraction:g} of them; "
                "mend the data (diffmoe data check tells what is wrong), or allow more",
                everywhere=everywhere,
            )

    def passes(self) -> dict[str, float]:
        """How often each dataset was gone through so far, by its folder: epochs as a number; empty where nobody
        knows.
        """
        if isinstance(self._source, ResampledSteps):
            return {}
        return dict(zip(self.dataset.names, self._source.order.passes(self.samples_consumed), strict=True))

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

    def _start(self, micro_step: int) -> "Iterator[Result | PackedResult]":
        source, sampler = self._source, None
        if isinstance(source, ResampledSteps):
            source.first = micro_step
        else:
            # The endless count of micro-steps: worker w of n gets every n-th, and results come back in its order.
            sampler = itertools.count(micro_step)
        if self._workers == 0:
            return (
                iter(source)
                if isinstance(source, ResampledSteps)
                else map(source.__getitem__, itertools.count(micro_step))
            )
        # A generator of its own keeps the loader away from torch's global random state.
        loader = DataLoader(
            source, batch_size=None, sampler=sampler, num_workers=self._workers, prefetch_factor=self._prefetch,
            generator=torch.Generator(), collate_fn=_packed,
        )  # fmt: skip
        return iter(loader)

    def close(self) -> None:
        """Stop the workers and close the shards; the next batch asked for starts them again where the stream stands."""
        if self._workers and self._results is not None:
            self._results._shutdown_workers()  # type: ignore[attr-defined]  # dropping the iterator does it too, but only when collected
        self._results = None
        self.dataset.close()


def _packed(result: Any) -> PackedResult:
    """A worker's result (`Result`), ready to be passed on."""
    return result if isinstance(result, DataError) else (pack(result[0]), result[1])
