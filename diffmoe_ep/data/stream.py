"""The endless stream of one rank's micro-batches: read, decoded and drawn ahead by worker processes, the same for any number of them."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.keyed import keyed
from diffmoe_ep.data.sample import Batch, final_latent, read_sample
from diffmoe_ep.data.shards import DataError, Dataset, Order


class Stream:
    """Iterate over this rank's Batch of every micro-step, in order, for ever; its whole state is `samples_consumed`.

    Micro-step m covers the positions m M .. (m + 1) M - 1, M = batch / accumulation; rank r has the r-th of `world` equal slices.
    What a batch holds is a function of seed and positions alone, so ranks, workers and restarts change nothing.
    """

    def __init__(
        self, dataset: Dataset, *, seed: int, batch: int, accumulation: int, rank: int, world: int, drop_condition: float, flip: bool,
        shuffle_block: int, workers: int, prefetch: int, samples_consumed: int = 0,
    ) -> None:  # fmt: skip
        """ConfigError where the numbers do not divide or the dataset has no flips; costs nothing until the first batch is asked for."""
        parts = accumulation * world
        if batch < parts or batch % parts:
            fitting = sorted({max(batch // parts, 1) * parts, (batch // parts + 1) * parts})
            raise ConfigError(
                f"train.batch = {batch} does not divide into train.accumulation = {accumulation} micro-steps on {world} ranks;"
                f" use a multiple of {parts}, such as {' or '.join(map(str, fitting))}"
            )
        if samples_consumed < 0 or samples_consumed % (batch // accumulation):
            raise ConfigError(
                f"{samples_consumed} samples are consumed, which is not a whole number of micro-steps of {batch // accumulation} samples"
                f" (train.batch = {batch}, train.accumulation = {accumulation}); keep the micro-step of the run that is continued"
            )
        if flip and dataset.manifest.kind == "moments" and dataset.manifest.flips != 2:
            raise ConfigError(f"data.flip = true, but {dataset.folder} holds no mirrored moments; use data.flip = false or add flips")
        if not 0 <= drop_condition <= 1:
            raise ConfigError(f"data.drop_condition = {drop_condition} is no probability; use a number from 0 to 1")
        if workers < 0 or (workers > 0 and prefetch < 1):
            raise ConfigError(f"data.workers = {workers}, data.prefetch = {prefetch}; use 0 or more workers, a prefetch of 1 or more")
        self.samples_consumed = samples_consumed
        self._micro_step_size = batch // accumulation
        share = self._micro_step_size // world
        self._source = _MicroSteps(dataset, seed, self._micro_step_size, rank * share, share, drop_condition, flip, shuffle_block)
        self._workers = workers
        self._prefetch = prefetch
        self._results: Iterator[Batch | DataError] | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next micro-step's Batch; DataError names shard and key of a bad sample, RuntimeError tells of a worker that died."""
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
        self.samples_consumed += self._micro_step_size
        return result

    def _start(self, micro_step: int) -> Iterator[Batch | DataError]:
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
        self._source.dataset.close()


class _MicroSteps(TorchDataset["Batch | DataError"]):
    """Micro-step number -> this rank's Batch, or the DataError of a bad sample: raised in a worker, it would arrive as a traceback."""

    def __init__(
        self, dataset: Dataset, seed: int, micro_step_size: int, offset: int, share: int, drop_condition: float, flip: bool, block: int
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.micro_step_size = micro_step_size  # samples of a micro-step over all ranks
        self.offset = offset  # first of this rank's in it
        self.share = share  # this rank's samples in it
        self.drop_condition = drop_condition
        self.flip = flip
        self.order = Order(dataset.sizes, seed, block)

    def __getitem__(self, micro_step: int) -> Batch | DataError:
        first = micro_step * self.micro_step_size + self.offset
        try:
            samples = [self._sample(position) for position in range(first, first + self.share)]
        except DataError as error:
            return error
        latents, noises, us, conditions = zip(*samples, strict=True)
        return Batch(
            latent=torch.from_numpy(np.stack(latents)),  # (B, C, H, W)
            noise=torch.from_numpy(np.stack(noises)),  # (B, C, H, W)
            u=torch.from_numpy(np.array(us, dtype=np.float32)),  # (B,)
            condition=torch.tensor(conditions, dtype=torch.int64),  # (B,)
            position=torch.arange(first, first + self.share),  # (B,)
        )

    def _sample(self, position: int) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Latent, noise, u and condition of a position; every draw has a stream of its own, so none shifts another."""
        shard, sample = self.order.locate(position)
        manifest = self.dataset.manifest
        array, label = read_sample(self.dataset, shard, sample)
        flipped = self.flip and keyed(self.seed, position, "flip").random() < 0.5
        dropped = self.drop_condition > 0 and keyed(self.seed, position, "drop").random() < self.drop_condition
        noise = keyed(self.seed, position, "noise").standard_normal(manifest.shape, dtype=np.float32)
        u = keyed(self.seed, position, "time").random(dtype=np.float32)
        latent = final_latent(array, manifest, flipped, self.seed, position)
        return latent, noise, u, manifest.num_classes if dropped else label
