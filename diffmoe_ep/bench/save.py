"""What a checkpoint costs: how long training waits, and how long until it is complete, beside the disk's own speed.

    plain        each rank writes its bytes to one file, and the file to the disk (fsync)
    sha256       each rank hashes its bytes once; a save does it twice, as it writes and as it reads back
    foreground   a save with checkpoint.background=false
    background   one with true: the copy that training waits for, and the time until all is complete, nothing else to do

They take turns in one process; a turn's time is that of the slowest rank. The first turn, in which the copies' memory
is taken, does not count.
"""

import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffmoe_ep.checkpoint.background import Saver
from diffmoe_ep.checkpoint.fragments import Fragment, whole
from diffmoe_ep.config import CheckpointConfig, ConfigError
from diffmoe_ep.parallel.collectives import gather_objects, largest
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.tables import duration, size, table

TENSOR_NUMEL = 1 << 22  # 16 MiB of float32, as a matrix of a large model


@dataclass(frozen=True)
class SaveBench:
    """Seconds of each turn."""

    size: int  # bytes over all ranks
    ranks: int
    device: str
    seconds: dict[str, tuple[float, ...]]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As text."""
        medians = {name: statistics.median(turns) for name, turns in self.seconds.items()}
        plain = medians["plain write and fsync"]
        rows = [
            (
                name,
                duration(median),
                f"{size(self.size / median)}/s",
                f"{median / plain:.2f}",
                f"{duration(min(self.seconds[name]))} to {duration(max(self.seconds[name]))}",
            )
            for name, median in medians.items()
        ]
        turns = len(self.seconds["plain write and fsync"])
        head = f"{size(self.size)} from {self.device} over {self.ranks} rank{'s' * (self.ranks > 1)}, {turns} turns"
        return [head, *table([("", "median", "speed", "of plain", "turns"), *rows], "<>>><")]


def bench_save(mesh: Mesh, out: Path, gigabytes: float, turns: int) -> SaveBench:
    """Write so many 10^9 bytes, dealt over the ranks, in every way; the folder is left empty."""
    folder = out / "bench_save"
    if folder.exists():
        raise ConfigError(f"{folder} is there already; give another folder with --out")
    fragments = _made_up(mesh, int(gigabytes * 1e9 / 4 / mesh.size))
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        largest(0, mesh.control)
        begin = time.perf_counter()
        work()
        found.setdefault(name, []).append(max(gather_objects(time.perf_counter() - begin, mesh.world)))

    with (
        Saver(folder / "foreground", CheckpointConfig(background=False, keep_last=1), mesh, 30.0) as foreground,
        Saver(folder / "background", CheckpointConfig(background=True, keep_last=1), mesh, 30.0) as background,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        for turn in range(turns + 1):
            timed("plain write and fsync", lambda: _plain(folder / f"plain-{mesh.rank}", fragments))
            timed("sha256, once", lambda: _hash(fragments))
            timed("in the foreground", partial(foreground.save, turn, fragments, {}, _nothing))
            begin = time.perf_counter()
            timed("in the background: training waits", partial(background.save, turn, fragments, {}, _nothing))
            background.finish()
            whole_time = max(gather_objects(time.perf_counter() - begin, mesh.world))
            found.setdefault("in the background: until complete", []).append(whole_time)
    largest(0, mesh.control)
    if mesh.is_first:
        shutil.rmtree(folder)
    total = sum(gather_objects(sum(each.data.nbytes for each in fragments), mesh.world))
    seconds = {name: tuple(each[1:]) for name, each in found.items()}
    return SaveBench(total, mesh.size, str(mesh.device.type), seconds)


def _nothing(_step: int) -> None:
    """Nobody asks."""


def _made_up(mesh: Mesh, numel: int) -> list[Fragment]:
    generator = torch.Generator().manual_seed(mesh.rank)
    sizes = [min(TENSOR_NUMEL, numel - begin) for begin in range(0, numel, TENSOR_NUMEL)]
    return [
        whole(f"rank{mesh.rank}.{number}", torch.randn(each, generator=generator).to(mesh.device))
        for number, each in enumerate(sizes)
    ]


def _plain(path: Path, fragments: list[Fragment]) -> None:
    with path.open("wb") as file:
        for fragment in fragments:
            file.write(fragment.data.cpu().numpy().data)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _hash(fragments: list[Fragment]) -> None:
    sha = hashlib.sha256()
    for fragment in fragments:
        sha.update(fragment.data.cpu().numpy().data)
