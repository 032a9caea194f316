"""Ranks that are processes of their own, started as a launcher would but without one, so that none ends another."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_port() -> str:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(world: int, command: Sequence[str], output: Path) -> list[subprocess.Popen[bytes]]:
    """One process for each rank; rank r writes to output/r."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "GLOO", "NCCL"))}
    kept |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    made = []
    for rank in range(world):
        with (output / str(rank)).open("wb") as file:
            environment: dict[str, Any] = kept | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            made.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file))
    return made


def ranks_of(world: int, command: Sequence[str], timeout: float = 200.0) -> tuple[list[int], list[str]]:
    """Exit code and error output of each rank, without what DeepSpeed says of accelerators."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start(world, command, Path(folder))
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return codes, [told(Path(folder) / str(rank)) for rank in range(world)]


def told(file: Path) -> str:
    """What a rank has written, without what DeepSpeed says of accelerators."""
    lines = file.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if "real_accelerator.py" not in line)
