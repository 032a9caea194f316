"""How fast one process streams, against the least that reading the same bytes takes and against plain webdataset, in one run.

    pread        os.pread + np.frombuffer + collate of the same bytes in the same order, nothing checked
    webdataset   webdataset.WebDataset(...).decode() over the same tars, in the order in which they lie
    stream       our Stream without workers: order, read, crc32, checks, random draws, final latents, collate
    draws        the random draws of the same positions alone: noise, time, flip, drop, posterior

The four take turns, so that whatever else the machine does meets them alike; the stream's speed without its draws is what remains of
its time. With workers, what a training loop waits for data is measured against steps of a given length.
"""

import json
import math
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.draw import Draws
from diffmoe_ep.data.foreign import Foreign, index_folder
from diffmoe_ep.data.manifest import MANIFEST_NAME, Manifest
from diffmoe_ep.data.order import Order
from diffmoe_ep.data.sample import encode
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.data.stream import Stream

SEED, BLOCK, BATCH, DROP = 0, 8, 64, 0.1


@dataclass(frozen=True)
class StreamBench:
    """Samples per second of one process, medians over the turns."""

    samples: int  # of a turn
    sample_bytes: int  # of the stored array
    turns: int
    pread: float
    webdataset: float
    stream: float
    draws: float
    without_draws: float  # of the stream, the time of the draws taken out
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
        rows = [
            ("pread + frombuffer + collate", self.pread), ("plain webdataset, decoded", self.webdataset), ("stream", self.stream),
            ("its random draws alone", self.draws), ("stream without its draws", self.without_draws),
        ]  # fmt: skip
        ours = self.without_draws
        memory = ", ".join(f"{size / 1e6:.0f} MB" for size in self.worker_bytes)
        return [
            f"{self.samples} samples of {self.sample_bytes} bytes, {self.turns} turns, one process, samples per second:",
            *(f"  {name:30}{rate:10,.0f}{1e6 / rate:10.1f} µs each" for name, rate in rows),
            f"without draws: {ours / self.pread:.2f} of pread, {ours / self.webdataset:.1f} times plain webdataset",
            f"first batch from the middle after {self.start_seconds:.3f} s",
            f"{self.workers} workers, steps of {self.step_seconds:g} s for {BATCH} samples: {self.wait:.2%} of the time waits for data",
            f"memory of each worker for itself: {memory}",
        ]


def write_synthetic(folder: Path, samples: int, shape: tuple[int, int, int], shard_size: int, flips: int = 2) -> None:
    """Write moments float16 (flips, 2C, H, W) of random numbers as plain tars, and index them; a folder that has them stays."""
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
    index_folder(folder, folder, Foreign("moments", array="moments.npy", scale=0.18215, num_classes=1000, name="synthetic"))


def bench(
    folder: Path, turns: int = 5, samples: int | None = None, workers: int = 2, step_seconds: float = 0.5, steps: int = 20
) -> StreamBench:
    """Measure on a prepared folder of moments or pixels, `samples` a turn (default: all, at most 4096)."""
    dataset = Dataset.open(folder)
    manifest = dataset.manifest
    count = min(samples or 4096, manifest.num_samples) // BATCH * BATCH
    if turns < 1 or count < BATCH:
        raise ConfigError(f"{folder} is measured in {turns} turns of {count} samples; give at least 1 turn and {BATCH} samples")
    order = Order(dataset.sizes, SEED, BLOCK)
    places = [_place(dataset, *order.locate(position)) for position in range(count)]
    shards = [str(folder / shard.name) for shard in manifest.shards]
    runs: dict[str, Callable[[], int]] = {
        "pread": lambda: _pread(places, manifest),
        "webdataset": lambda: _webdataset(shards, count),
        "stream": lambda: _stream(dataset, count),
        "draws": lambda: _draws(manifest, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first warms caches
        for name, run in runs.items():
            begun = time.perf_counter()
            done = run()
            if turn:
                seconds[name].append((time.perf_counter() - begun) / done)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    without = statistics.median(stream - draws for stream, draws in zip(seconds["stream"], seconds["draws"], strict=True))
    begun = time.perf_counter()
    next(_open(Dataset.open(folder), samples_consumed=manifest.num_samples // 2 // BATCH * BATCH))
    start = time.perf_counter() - begun
    wait, memory = _waiting(dataset, workers, step_seconds, steps)
    return StreamBench(
        samples=count, sample_bytes=int(np.dtype(manifest.dtype).itemsize * math.prod(manifest.stored_shape)), turns=turns,
        pread=1 / took["pread"], webdataset=1 / took["webdataset"], stream=1 / took["stream"], draws=1 / took["draws"],
        without_draws=1 / max(without, 1e-9), start_seconds=start, workers=workers, wait=wait, step_seconds=step_seconds,
        worker_bytes=memory,
    )  # fmt: skip


def _open(dataset: Dataset, workers: int = 0, samples_consumed: int = 0) -> Stream:
    flip = dataset.manifest.kind == "pixels" or dataset.manifest.flips == 2
    return Stream(
        dataset, seed=SEED, batch=BATCH, accumulation=1, rank=0, world=1, drop_condition=DROP, flip=flip, shuffle_block=BLOCK,
        workers=workers, prefetch=4, samples_consumed=samples_consumed,
    )  # fmt: skip


def _place(dataset: Dataset, shard: int, sample: int) -> tuple[int, int, int, int]:
    """Descriptor, begin, size and label of a stored array's values."""
    field = f"{dataset.manifest.kind}.npy"
    opened = dataset.opened(shard)
    place = 2 + 3 * dataset.manifest.fields.index(field)
    offset, size = opened.members[sample, place : place + 2].tolist()
    start = 10 + int.from_bytes(os.pread(opened.descriptor, 2, offset + 8), "little")  # the values stand behind the npy header
    return opened.descriptor, offset + start, size - start, int(dataset.member(shard, sample, "cls"))


def _pread(places: list[tuple[int, int, int, int]], manifest: Manifest) -> int:
    dtype, shape = np.dtype(manifest.dtype), manifest.stored_shape
    for first in range(0, len(places), BATCH):
        chosen = places[first : first + BATCH]
        arrays = [np.frombuffer(os.pread(descriptor, size, begin), dtype).reshape(shape) for descriptor, begin, size, _ in chosen]
        _ = torch.from_numpy(np.stack(arrays)), torch.tensor([label for *_, label in chosen])
    return len(places)


def _webdataset(shards: list[str], count: int) -> int:
    import webdataset

    samples: Iterator[Any] = iter(webdataset.WebDataset(shards, shardshuffle=False).decode())
    for done, _ in enumerate(samples, 1):
        if done == count:
            break
    return done


def _stream(dataset: Dataset, count: int) -> int:
    stream = _open(dataset)
    for _ in range(count // BATCH):
        next(stream)
    return count


def _draws(manifest: Manifest, count: int) -> int:
    """The random numbers of a stream's first positions, drawn as it draws them."""
    draws = Draws(SEED)
    for first in range(0, count, BATCH):
        noise, posterior = (np.empty((BATCH, *manifest.shape), dtype=np.float32) for _ in range(2))
        for row in range(BATCH):
            draws.at(first + row, "noise").standard_normal(out=noise[row], dtype=np.float32)
            draws.at(first + row, "time").random(dtype=np.float32)
            draws.at(first + row, "flip").random()
            draws.at(first + row, "drop").random()
            if manifest.kind == "moments":
                draws.at(first + row, "posterior").standard_normal(out=posterior[row], dtype=np.float32)
    return count


def _waiting(dataset: Dataset, workers: int, step_seconds: float, steps: int) -> tuple[float, tuple[int, ...]]:
    """Share of the time that a loop with steps of this length waits for its batches, once it runs; memory of each worker then."""
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
