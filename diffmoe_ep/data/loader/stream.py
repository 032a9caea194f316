"""The endless stream of one rank's micro-batches: read, decoded and drawn ahead by worker processes, the same for any
number of them.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from diffmoe_ep.config import ConfigError, DataConfig, UserError, check_limits
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.captions import CaptionSpec, check_text
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.micro_steps import IndexedSteps, RankSlice, Result
from diffmoe_ep.data.loader.pack import Packed, pack, unpack
from diffmoe_ep.data.loader.quarantine import Fault
from diffmoe_ep.data.loader.resampled import PlainTars, ResampledSteps
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.processes import serve

PackedResult = tuple[Packed, tuple[Fault, ...]] | UserError

SHARED_MEMORY = Path("/dev/shm")  # where batches lie on their way from a worker
DIED = "DataLoader worker (pid"  # so torch begins to say that one has
LEFT = re.compile(r"for file </(torch_\w+)>")  # that could not be filled; torch leaves it there


class LoaderError(UserError):
    """The processes that read ahead cannot go on, though the data may be sound."""


class MicroSteps(Protocol):
    """A rank's Batch of micro-step after micro-step, iterated over by each worker: `IndexedSteps`, `ResampledSteps`."""

    first: int  # micro-step that the next iteration starts at

    def __iter__(self) -> Iterator[Result]: ...

    def address(self, position: int) -> str | None: ...

    def again(self, micro_step: int) -> Result | None: ...

    def passes(self, position: int) -> dict[str, float]: ...

    def num_seen(self, first: int, position: int) -> int: ...


class Stream:
    """Iterate over this rank's Batch of every micro-step, in order, for ever; its whole state is `samples_consumed`.

    Micro-step m covers the positions m M .. (m + 1) M - 1, M = batch / accumulation; rank r has the r-th of `world`
    equal slices. What a batch holds is a function of seed and positions alone, so ranks, workers and restarts change
    nothing. A sample whose bytes are bad is replaced by another of its shuffle block, which its position decides; one
    that cannot be had is requested again. Of `PlainTars`, which nobody has indexed, all that is promised stands in
    `resampled`.
    """

    def __init__(
        self,
        source: BatchSource,
        data: DataConfig,
        *,
        seed: int,
        batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        samples_consumed: int = 0,
        text: CaptionSpec | None = None,
        quarantine_file: Path | None = None,
    ) -> None:
        """ConfigError where numbers are beyond their limits or do not divide, or the source has not what is requested;
        costs nothing before the first batch. TypeError for a source that is neither `Mixture` nor `PlainTars`.

        data: how samples are drawn; where they lie is the source's. batch: samples of a step over all ranks, in
        `accumulation` micro-steps. text: what is wanted of captions; None: the condition is a label. quarantine_file:
        where replaced samples are listed.
        """
        if not isinstance(source, Mixture | PlainTars):
            raise TypeError(
                f"a Stream reads a Mixture or PlainTars, not {type(source).__name__}; of one prepared dataset make "
                "Mixture([dataset])"
            )
        check_limits(data, "data.")
        of_rank = RankSlice.of(batch, accumulation, rank, world)
        if samples_consumed < 0 or samples_consumed % of_rank.micro_step_samples:
            raise ConfigError(
                f"{samples_consumed} samples are consumed, which is not a whole number of micro-steps of "
                f"{of_rank.micro_step_samples} samples (train.global_batch = {batch}, train.grad_accumulation = "
                f"{accumulation}); keep the micro-step of the run that is continued"
            )
        for name, manifest in zip(source.names, source.manifests, strict=True):
            if data.flip and manifest.kind == "moments" and manifest.flips != 2:
                raise ConfigError(
                    f"data.flip = true, but {name} holds no mirrored moments; use data.flip = false or add flips"
                )
        check_text(source, text)
        self.source = source
        self.samples_consumed = samples_consumed
        self.num_bad = 0  # samples of this rank that had to be replaced since the stream was made
        self._data, self._size, self._of_rank = data, of_rank.micro_step_samples, of_rank
        self._first = samples_consumed
        self._quarantine_file = quarantine_file
        self._steps: MicroSteps
        if isinstance(source, PlainTars):
            self._steps = ResampledSteps(source, data, seed, of_rank, text)
        else:
            self._steps = IndexedSteps(source, data, seed, of_rank, text)
        self._results: Iterator[Result | PackedResult] | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next micro-step's Batch.

        DataError names shard and key of a sample that cannot be had or replaced; LoaderError: a worker failed or died.
        """
        if self._results is None:
            self._results = self._start()
        try:
            result = next(self._results)
        except (RuntimeError, OSError, EOFError) as error:  # the last two: a worker ended while it handed a batch over
            with contextlib.suppress(RuntimeError):  # torch tells of a worker that died wherever this thread then is
                self.close()
            self._results = None
            first = self.samples_consumed
            awaited = f"positions {first} to {first + self._size - 1}"
            raise LoaderError(f"the data workers failed while {awaited} were awaited ({_reason(error)})") from error
        if isinstance(result, UserError):
            self.close()  # what was read ahead lies behind the bad sample
            raise result
        batch, faults = result
        if isinstance(batch, Packed):
            batch = unpack(batch)
        self.samples_consumed += self._size
        if faults:
            self._list(faults)
        return batch

    def check_bad(self, num_bad: int, everywhere: bool = False) -> None:
        """Raise DataError if this many replaced samples, of all ranks since the streams were made, are more than the
        config allows.

        everywhere: all ranks call it with the same number.
        """
        seen, most = self._steps.num_seen(self._first, self.samples_consumed), self._data.max_bad_fraction
        if num_bad > most * seen:
            listed = self._quarantine_file
            where = f", listed in {listed.parent}/quarantine-rank*.jsonl" if listed is not None else ""
            raise DataError(
                f"{num_bad} of {seen} samples are bad{where}: more than data.max_bad_fraction = {most:g} of them; "
                "mend the data (diffmoe data check tells what is wrong), or allow more",
                everywhere=everywhere,
            )

    def passes(self) -> dict[str, float]:
        """How often each dataset was gone through so far, by its folder: epochs as a number; empty where nobody
        knows.
        """
        return self._steps.passes(self.samples_consumed)

    def positions(self, micro_step: int) -> range:
        """The positions of this rank's samples in a micro-step."""
        return self._of_rank.positions(micro_step)

    def address(self, position: int) -> str | None:
        """Shard and key of the sample at a position; None where nobody knows (plain tars)."""
        return self._steps.address(position)

    def again(self, micro_step: int) -> Batch | None:
        """This rank's Batch of any micro-step once more, read in this process; None where nobody can (plain tars, or
        data that are not there any more).
        """
        result = self._steps.again(micro_step)
        return None if result is None or isinstance(result, DataError) else result[0]

    def _list(self, faults: tuple[Fault, ...]) -> None:
        self.num_bad += len(faults)
        try:
            if self._quarantine_file is not None:
                quarantine.append(self._quarantine_file, faults)
            self.check_bad(self.num_bad)
        except DataError:
            self.close()
            self.samples_consumed -= self._size
            raise

    def _start(self) -> "Iterator[Result | PackedResult]":
        self._steps.first = self.samples_consumed // self._size
        if self._data.workers == 0:
            return iter(self._steps)
        # A generator of its own keeps the loader away from torch's global random state.
        loader: Any = DataLoader(
            self._steps,  # type: ignore[arg-type]  # an IterableDataset, which a protocol cannot say
            batch_size=None,
            num_workers=self._data.workers,
            prefetch_factor=self._data.prefetch,
            generator=torch.Generator(),
            collate_fn=_packed,
            worker_init_fn=partial(_serve, os.getpid()),
        )
        return iter(loader)

    def close(self) -> None:
        """Stop the workers and close the shards; the next batch requested starts them again where the stream stands."""
        if self._data.workers and self._results is not None:
            # Dropping the iterator does it too, but only when it is collected.
            self._results._shutdown_workers()  # type: ignore[attr-defined]
        self._results = None
        self.source.close()


def _serve(parent: int, _worker: int) -> None:
    serve(parent)


def _packed(result: Any) -> PackedResult:
    """A worker's `Result`, ready to be passed on; an error instead where there is no memory for it, for raised it would
    arrive as a traceback.
    """
    if isinstance(result, DataError):
        return result
    try:
        return pack(result[0]), result[1]
    except (RuntimeError, OSError) as error:
        if (left := LEFT.search(str(error))) is not None:
            (SHARED_MEMORY / left[1]).unlink(missing_ok=True)
        return LoaderError(f"a data worker has no shared memory for its batch ({_reason(error)})")


@contextmanager
def loader_failures() -> Iterator[None]:
    """Turn into a LoaderError what torch raises when a worker dies, wherever the main thread then is."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(DIED):
            raise
        raise LoaderError(f"the data workers failed ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, how full the shared memory is, and what can be done."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    remedy = "give the host more memory, lower data.workers or data.prefetch, or set data.workers=0"
    if "shared memory" in first or "Bus error" in first:  # so a worker ends that touches memory which is not there
        remedy = f"start the container with --ipc=host or a larger --shm-size, {remedy.partition(', ')[2]}"
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return f"{first}; {remedy}"
    free, total = usage.free / 1e9, usage.total / 1e9
    return f"{first}; {SHARED_MEMORY} has {free:.1f} of {total:.1f} GB free; {remedy}"
