"""How fast one process streams, beside the least that reading the same bytes takes and beside plain webdataset.

    pread        os.pread + np.frombuffer + collate of the same bytes in the same order, nothing checked
    webdataset   webdataset.WebDataset(...).decode() over the same tars, in the order in which they lie
    stream       our Stream without workers: order, random draws, read, crc32, checks, final latents, collate
    draws        what the stream draws for the same positions: noise, time, flip, drop, posterior

They take many short turns on one thread, and the fastest of each counts: what else the machine does only adds time.
With workers, what a training loop waits for data is measured against steps of a given length.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.index import MemberSpec, index_folder
from diffmoe_ep.data.loader.draw import Draw
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import MANIFEST_NAME, Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.order import Order
from diffmoe_ep.data.shards import Dataset, fastest_crc32
from diffmoe_ep.tables import table

SEED, BLOCK, BATCH, DROP = 0, 8, 64, 0.1


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
    undrawn: float  # of the stream, the time of the draws taken out
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
        beside = f"{self.undrawn / self.pread:.2f} of (a); {self.undrawn / self.webdataset:.1f} times (b)"
        rows = [
            ("(a) pread + frombuffer + collate", self.pread, ""),
            ("(b) plain webdataset, decoded", self.webdataset, ""),
            (f"stream, checksums by {self.checksum}", self.stream, ""),
            ("its random draws alone", self.draws, ""),
            ("stream less its draws", self.undrawn, beside),
        ]
        memory = ", ".join(f"{size / 1e6:.0f} MB" for size in self.worker_bytes)
        cells = [(name, f"{rate:,.0f}", f"{1e6 / rate:.1f}", note) for name, rate, note in rows]
        return [
            f"{self.samples} samples of {self.sample_bytes} bytes, {self.turns} turns, one process",
            *table([("reader", "samples/s", "µs each", ""), *cells], "<>><"),
            f"first batch from the middle after {self.start_seconds:.3f} s",
            f"{self.workers} workers, steps of {self.step_seconds:g} s for {BATCH} samples: "
            f"{self.wait:.2%} of the time waits for data",
            f"memory of each worker for itself: {memory}",
        ]


def write_synthetic(folder: Path, samples: int, shape: tuple[int, int, int], shard_size: int, flips: int = 2) -> None:
    """Write moments float16 (flips, 2C, H, W) of random numbers as plain tars, and index them; a folder that has them
    stays.
    """
    from webdataset.writer import TarWriter

    if (folder / MANIFEST_NAME).exists():
        return
    manifest = Manifest("synthetic", "moments", shape, "float16", 0.18215, 0.0, 1000, (), "random numbers", flips=flips)
    folder.mkdir(parents=True, exist_ok=True)
    pool = np.random.default_rng(SEED).normal(size=(64, *manifest.stored_shape)).astype(np.float16)
    for shard, first in enumerate(range(0, samples, shard_size)):
        with TarWriter(str(folder / f"synthetic-{shard:06d}.tar"), encoder=False) as writer:
            for number in range(first, min(first + shard_size, samples)):
                fields = encode(pool[number % len(pool)], number % 1000, manifest)
                writer.write({"__key__": f"{number:09d}", **fields})
    spec = MemberSpec("moments", array="moments.npy", scale=0.18215, num_classes=1000, name="synthetic")
    index_folder(folder, folder, spec)


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
    begun = time.perf_counter()
    next(_open(Dataset.open(folder), samples_consumed=manifest.num_samples // 2 // BATCH * BATCH))
    start = time.perf_counter() - begun
    wait, memory = _waiting(dataset, workers, step_seconds, steps)
    return StreamBench(
        samples=count,
        sample_bytes=int(np.dtype(manifest.dtype).itemsize * math.prod(manifest.stored_shape)),
        turns=turns,
        **{name: 1 / seconds for name, seconds in took.items()},
        undrawn=1 / max(took["stream"] - took["draws"], 1e-9),
        checksum=fastest_crc32().__module__.partition(".")[0],
        start_seconds=start,
        workers=workers,
        wait=wait,
        step_seconds=step_seconds,
        worker_bytes=memory,
    )


def _seconds(dataset: Dataset, turns: int, count: int) -> dict[str, float]:
    """What each takes for a sample, in the fastest of its turns of `count` samples."""
    manifest, order = dataset.manifest, Order(dataset.sizes, SEED, BLOCK)
    positions = min((turns + 1) * count, manifest.num_samples // BATCH * BATCH)
    places = [_place(dataset, *order.locate(position)) for position in range(positions)]
    draw = Draw(SEED, _data(manifest), manifest)
    batches: dict[str, Iterator[Any]] = {  # each goes on where it stood
        "pread": _pread(places, manifest),
        "webdataset": _webdataset([f"{dataset.folder}/{shard.name}" for shard in manifest.shards]),
        "stream": _open(dataset),
        "draws": (draw(range(first, first + BATCH)) for first in itertools.count(0, BATCH)),
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


def _data(manifest: Manifest, workers: int = 0) -> DataConfig:
    """How a run draws by default, mirrored where that is possible."""
    flip = manifest.kind == "pixels" or manifest.flips == 2
    return DataConfig(flip=flip, condition_dropout=DROP, shuffle_block=BLOCK, workers=workers, prefetch=4)


def _open(dataset: Dataset, workers: int = 0, samples_consumed: int = 0) -> Stream:
    data = _data(dataset.manifest, workers)
    return Stream(Mixture([dataset]), data, seed=SEED, batch=BATCH, samples_consumed=samples_consumed)


def _place(dataset: Dataset, shard: int, sample: int) -> tuple[int, int, int, int]:
    """Descriptor, begin, size and label of a stored array's values."""
    field = f"{dataset.manifest.kind}.npy"
    opened = dataset.opened(shard)
    place = 2 + 3 * dataset.manifest.fields.index(field)
    offset, size = opened.members[sample, place : place + 2].tolist()
    # The values stand behind the npy header.
    start = 10 + int.from_bytes(os.pread(opened.descriptor, 2, offset + 8), "little")
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
            requested = time.perf_counter()
            next(stream)
            waited += time.perf_counter() - requested
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
