"""How fast one process streams, against the least that reading the same bytes takes and against plain webdataset, in
one run.

    pread        os.pread + np.frombuffer + collate of the same bytes in the same order, nothing checked
    webdataset   webdataset.WebDataset(...).decode() over the same tars, in the order in which they lie
    stream       our Stream without workers: order, read, crc32, checks, random draws, final latents, collate
    draws        what the stream draws for the same positions, drawn as it draws it: noise, time, flip, drop, posterior
    undrawn      the stream with ones in place of drawn noise, so that it reads, checks, makes latents and collates, and draws nothing
    arithmetic   what the stream makes of stored arrays that are at hand: float32, finite, the posterior's deviation, scale and shift

They take many short turns on one thread, and the fastest of each counts: what else the machine does only adds time. The
stream takes more than `draws` and `undrawn` together, by what its draws drive out of the processor's cache. With
workers, what a training loop waits for data is measured against steps of a given length.
"""

import itertools
import json
import math
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data import native
from diffmoe_ep.data.crc import fastest_crc32
from diffmoe_ep.data.index import MemberSpec, index_folder
from diffmoe_ep.data.loader.assemble import Assembler
from diffmoe_ep.data.loader.draw import AT_ONCE, Latents
from diffmoe_ep.data.loader.micro_steps import MicroSteps
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import MANIFEST_NAME, Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.order import Lanes, Order
from diffmoe_ep.data.sample import encode, read_sample
from diffmoe_ep.data.shards import Dataset

SEED, BLOCK, BATCH, DROP = 0, 8, 64, 0.1
OF_PREAD, TIMES_WEBDATASET = 0.6, 4.0  # what the stream that draws nothing is to reach


@dataclass(frozen=True)
class StreamBench:
    """Samples per second of one process, in the fastest turn."""

    samples: int  # of a turn
    sample_bytes: int  # of the stored array
    turns: int
    pread: float
    webdataset: float
    stream: float
    draws: float
    undrawn: float
    arithmetic: float
    difference: float  # of the stream, the time of the draws taken out
    native: str | None  # why latents are not made by native code
    checksum: str  # library that computes it
    start_seconds: float  # from nothing to the first batch in the middle of the dataset
    workers: int
    wait: float  # share of a training loop's time that it waits for data, with workers
    step_seconds: float  # of that loop
    worker_bytes: tuple[int, ...]  # memory that each worker holds for itself

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As text."""
        ours, rest = self.undrawn, self.difference
        goals = f"{ours / self.pread:.2f} of (a), goal {OF_PREAD}; {ours / self.webdataset:.1f} times (b), goal {TIMES_WEBDATASET:g}"
        how = f"stream, checksums by {self.checksum}" if self.native else "stream, by native code"
        rows = [
            ("(a) pread + frombuffer + collate", self.pread, ""),
            ("(b) plain webdataset, decoded", self.webdataset, ""),
            (how, self.stream, ""),
            ("its draws alone", self.draws, ""),
            ("its arithmetic alone", self.arithmetic, ""),
            ("stream that draws nothing", ours, f"  {goals}"),
            (
                "stream less its draws",
                rest,
                f"  {rest / self.pread:.2f} of (a); {rest / self.webdataset:.1f} times (b)",
            ),
        ]
        memory = ", ".join(f"{size / 1e6:.0f} MB" for size in self.worker_bytes)
        return [
            f"{self.samples} samples of {self.sample_bytes} bytes, {self.turns} turns, one process, samples per second:",
            *([f"  no native code: {self.native}"] if self.native else []),
            *(f"  {name:34}{rate:10,.0f}{1e6 / rate:10.1f} µs each{goal}" for name, rate, goal in rows),
            f"first batch from the middle after {self.start_seconds:.3f} s",
            f"{self.workers} workers, steps of {self.step_seconds:g} s for {BATCH} samples: {self.wait:.2%} of the time waits for data",
            f"memory of each worker for itself: {memory}",
        ]


def write_synthetic(folder: Path, samples: int, shape: tuple[int, int, int], shard_size: int, flips: int = 2) -> None:
    """Write moments float16 (flips, 2C, H, W) of random numbers as plain tars, and index them; a folder that has them
    stays.
    """
    if (folder / MANIFEST_NAME).exists():
        return
    manifest = Manifest("synthetic", "moments", shape, "float16", 0.18215, 0.0, 1000, (), "random numbers", flips=flips)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(SEED)
    pool = drawn.normal(size=(64, *manifest.stored_shape)).astype(np.float16)
    for shard in range(math.ceil(samples / shard_size)):
        with tarfile.open(folder / f"synthetic-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * shard_size, min((shard + 1) * shard_size, samples)):
                for field, content in sorted(encode(pool[number % len(pool)], number % 1000, manifest).items()):
                    member = tarfile.TarInfo(f"{number:09d}.{field}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    index_folder(
        folder, folder, MemberSpec("moments", array="moments.npy", scale=0.18215, num_classes=1000, name="synthetic")
    )


def bench(
    folder: Path,
    turns: int = 40,
    samples: int | None = None,
    workers: int = 2,
    step_seconds: float = 0.5,
    steps: int = 20,
) -> StreamBench:
    """Measure on a prepared folder of moments or pixels, `samples` a turn (default: all, at most 512)."""
    dataset = Dataset.open(folder)
    manifest = dataset.manifest
    count = min(samples or 512, manifest.num_samples) // BATCH * BATCH
    if turns < 1 or count < BATCH:
        raise ConfigError(
            f"{folder} is measured in {turns} turns of {count} samples; give at least 1 turn and {BATCH} samples"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took = _seconds(dataset, turns, count)
    finally:
        torch.set_num_threads(threads)
    without = took["stream"] - took["draws"]
    begun = time.perf_counter()
    next(_open(Dataset.open(folder), samples_consumed=manifest.num_samples // 2 // BATCH * BATCH))
    start = time.perf_counter() - begun
    wait, memory = _waiting(dataset, workers, step_seconds, steps)
    return StreamBench(
        samples=count, sample_bytes=int(np.dtype(manifest.dtype).itemsize * math.prod(manifest.stored_shape)), turns=turns,
        pread=1 / took["pread"], webdataset=1 / took["webdataset"], stream=1 / took["stream"], draws=1 / took["draws"],
        undrawn=1 / took["undrawn"], arithmetic=1 / took["arithmetic"], difference=1 / max(without, 1e-9), native=native.problem(),
        checksum=fastest_crc32().__module__.partition(".")[0], start_seconds=start,
        workers=workers, wait=wait, step_seconds=step_seconds, worker_bytes=memory,
    )  # fmt: skip


def _seconds(dataset: Dataset, turns: int, count: int) -> dict[str, float]:
    """What each takes for a sample, in the fastest of its turns of `count` samples."""
    manifest, order = dataset.manifest, Order(dataset.sizes, SEED, BLOCK)
    positions = min((turns + 1) * count, manifest.num_samples // BATCH * BATCH)
    places = [_place(dataset, *order.locate(position)) for position in range(positions)]
    batches: dict[str, Iterator[Any]] = {  # each goes on where it stood
        "pread": _pread(places, manifest),
        "webdataset": _webdataset([f"{dataset.folder}/{shard.name}" for shard in manifest.shards]),
        "stream": _open(dataset),
        "draws": _draws(manifest),
        "undrawn": _undrawn(dataset),
        "arithmetic": _arithmetic(dataset),
    }
    took: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(turns + 1):  # the first warms caches
        for name, each in batches.items():
            begun = time.perf_counter()
            for _ in range(count // BATCH):
                next(each)
            if turn:
                took[name].append((time.perf_counter() - begun) / count)
    return {name: min(values) for name, values in took.items()}


def _flips(manifest: Manifest) -> bool:
    return manifest.kind == "pixels" or manifest.flips == 2


def _open(dataset: Dataset, workers: int = 0, samples_consumed: int = 0) -> Stream:
    return Stream(
        dataset, seed=SEED, batch=BATCH, accumulation=1, rank=0, world=1, drop_condition=DROP, flip=_flips(dataset.manifest),
        shuffle_block=BLOCK, workers=workers, prefetch=4, samples_consumed=samples_consumed,
    )  # fmt: skip


def _place(dataset: Dataset, shard: int, sample: int) -> tuple[int, int, int, int]:
    """Descriptor, begin, size and label of a stored array's values."""
    field = f"{dataset.manifest.kind}.npy"
    opened = dataset.opened(shard)
    place = 2 + 3 * dataset.manifest.fields.index(field)
    offset, size = opened.members[sample, place : place + 2].tolist()
    start = 10 + int.from_bytes(
        os.pread(opened.descriptor, 2, offset + 8), "little"
    )  # the values stand behind the npy header
    return opened.descriptor, offset + start, size - start, int(dataset.member(shard, sample, "cls"))


def _pread(places: list[tuple[int, int, int, int]], manifest: Manifest) -> Iterator[Any]:
    dtype, shape = np.dtype(manifest.dtype), manifest.stored_shape
    for first in itertools.cycle(range(0, len(places), BATCH)):
        chosen = places[first : first + BATCH]
        arrays = [
            np.frombuffer(os.pread(descriptor, size, begin), dtype).reshape(shape)
            for descriptor, begin, size, _ in chosen
        ]
        yield torch.from_numpy(np.stack(arrays)), torch.tensor([label for *_, label in chosen])


def _webdataset(shards: list[str]) -> Iterator[Any]:
    import webdataset

    samples: Iterator[Any] = iter(webdataset.WebDataset(shards, shardshuffle=False).repeat().decode())
    while True:
        yield list(itertools.islice(samples, BATCH))


def _draws(manifest: Manifest) -> Iterator[Any]:
    """The random numbers of a stream's positions, drawn as it draws them."""
    assembler = Assembler(SEED, DROP, _flips(manifest), None)
    for first in itertools.count(0, BATCH):
        noise, posterior = (np.empty((BATCH, *manifest.shape), dtype=np.float32) for _ in range(2))
        u = np.empty(BATCH, dtype=np.float32)
        for row in range(0, BATCH, AT_ONCE):
            few = slice(row, row + AT_ONCE)
            assembler.draw(range(first + row, first + row + AT_ONCE), manifest.kind, noise[few], posterior[few], u[few])
        yield noise, posterior, u


class _Ones(Assembler):
    """Mirrors every second sample, drops no condition, and its noise is 1."""

    def draw(
        self, positions: range, kind: str, noise: np.ndarray, posterior: np.ndarray, u: np.ndarray  # noqa: ARG002
    ) -> tuple[list[bool], list[bool]]:  # fmt: skip
        """See `Assembler.draw`."""
        noise.fill(1)
        posterior.fill(1)
        u.fill(0.5)
        return [position % 2 == 1 for position in positions], [False] * len(positions)


def _undrawn(dataset: Dataset) -> Iterator[Any]:
    """What the stream does for its positions, but for drawing."""
    mixture = Mixture([dataset])
    source = MicroSteps(
        mixture,
        mixture.order(SEED, BLOCK, Lanes(1, BATCH)),
        _Ones(SEED, DROP, True, None),
        BATCH,
        range(BATCH),
        0,
        False,
    )
    return map(source.__getitem__, itertools.count())


def _arithmetic(dataset: Dataset) -> Iterator[Any]:
    """Final latents of a stored array that is at hand."""
    latents, (array, _) = Latents(dataset.manifest), read_sample(dataset, 0, 0)
    quick = native.Moments(dataset.manifest) if native.takes(dataset.manifest) else None
    while quick is not None:
        values = np.ones((BATCH, *dataset.manifest.shape), dtype=np.float32)
        for latent in values:
            quick.sample(array[0], latent)
        yield values
    while True:
        values = np.ones((BATCH, *dataset.manifest.shape), dtype=np.float32)
        for first in range(0, BATCH, AT_ONCE):
            for row in range(first, first + AT_ONCE):
                latents.put(row, array, False)
            latents.fill(values)
        yield values


def _waiting(dataset: Dataset, workers: int, step_seconds: float, steps: int) -> tuple[float, tuple[int, ...]]:
    """Share of the time that a loop with steps of this length waits for its batches, once it runs; memory of each
    worker then.
    """
    before = _children()
    stream = _open(dataset, workers)
    try:
        for _ in range(2):
            next(stream)
        waited, begun = 0.0, time.perf_counter()
        for _ in range(steps):
            time.sleep(step_seconds)  # an accelerator works, this process waits for it
            asked = time.perf_counter()
            next(stream)
            waited += time.perf_counter() - asked
        total = time.perf_counter() - begun
        memory = tuple(_private_bytes(process) for process in sorted(_children() - before))
    finally:
        stream.close()
    return waited / total, memory


def _children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(word) for task in tasks for word in task.read_text().split()}


def _private_bytes(process: int) -> int:
    """Memory of a process that it shares with no other."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    rows = [line.split() for line in text.splitlines() if line.startswith(("Private_Clean", "Private_Dirty"))]
    return 1024 * sum(int(row[1]) for row in rows)


def write_json(found: StreamBench, path: Path) -> None:
    """Write the numbers to a file."""
    path.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
