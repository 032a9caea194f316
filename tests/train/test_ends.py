"""What ends one rank of a training ends the others with its sentence, and nothing of them is left."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmoe_ep.config import dump
from diffmoe_ep.data.loader.stream import SHARED_MEMORY
from diffmoe_ep.processes import Process
from launched import start, told
from train.runs import config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FULL = """
import os, sys
from unittest import mock
from diffmoe_ep.cli import main
from diffmoe_ep.data.loader import stream

def full(batch):
    if os.environ["RANK"] == "1" and batch.position[0] >= 72:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    return pack(batch)

pack = stream.pack
with mock.patch.object(stream, "pack", full):
    main(sys.argv[1:])
"""


def children(pid: int) -> list[Process]:
    found = [Process.of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [process for process in found if process is not None and process.parent == pid]


def ended(data: Path, folder: Path, module: list[str], act: Callable[[int], None] | None) -> list[tuple[int, str]]:
    """Train on two ranks with a worker each; once some steps are made, do something to rank 1's worker or to it."""
    given = config(data, folder / "run", "train.steps=1000000", "data.workers=1", "parallel.timeout_minutes=2")
    (folder / "config.yaml").write_text(dump(given))
    before = set(os.listdir(SHARED_MEMORY))
    processes = start(2, [sys.executable, *module, "train", str(folder / "config.yaml")], folder)
    metrics, deadline = folder / "run/metrics.jsonl", time.monotonic() + 200
    workers: list[Process] = []
    try:
        while act is not None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert time.monotonic() < deadline and processes[0].poll() is None, told(folder / "0") + told(folder / "1")
            time.sleep(0.1)
        if act is not None:
            workers = children(processes[0].pid) + children(processes[1].pid)
            assert len(workers) == 2
            act(processes[1].pid)
        codes = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    deadline = time.monotonic() + 30
    while any(worker.is_alive for worker in workers):
        assert time.monotonic() < deadline, "a data worker outlives its rank"
        time.sleep(0.1)
    left = {name for name in set(os.listdir(SHARED_MEMORY)) - before if name.startswith("torch_")}
    assert not left
    return [(code, errors_of(told(folder / str(rank)))) for rank, code in enumerate(codes)]


def errors_of(text: str) -> str:
    assert "Traceback" not in text and "gloo" not in text.lower(), text
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("diffmoe: error"))


def kill_its_worker(pid: int) -> None:
    os.kill(children(pid)[0].pid, signal.SIGKILL)


def kill_it(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_dead_data_worker(digits: Path, tmp_path: Path) -> None:
    first, second = ended(digits / "train", tmp_path, ["-m", "diffmoe_ep"], kill_its_worker)
    assert (first[0], second[0]) == (2, 2)
    assert first[1] == ""
    assert second[1].startswith("diffmoe: error: rank 1: the data workers failed")
    assert "DataLoader worker" in second[1] and "set data.workers=0" in second[1] and second[1].count("\n") == 1


def test_a_full_shared_memory(digits: Path, tmp_path: Path) -> None:
    first, second = ended(digits / "train", tmp_path, ["-c", FULL], None)
    assert (first[0], second[0]) == (2, 2)
    assert first[1] == ""
    assert second[1].startswith("diffmoe: error: rank 1: a data worker has no shared memory for its batch (unable to")
    assert "GB free" in second[1] and second[1].count("\n") == 1


def test_a_killed_rank(digits: Path, tmp_path: Path) -> None:
    first, second = ended(digits / "train", tmp_path, ["-m", "diffmoe_ep"], kill_it)
    assert (first[0], second[0]) == (1, -signal.SIGKILL)
    assert first[1].startswith("diffmoe: error: rank 1 on ") and "ended without a word" in first[1]
    assert first[1].count("\n") == 1
