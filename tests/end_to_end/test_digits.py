"""The quickstart's way in small: data, two ranks under real launchers, a kill, a resume, samples and scores."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffmoe_ep.train.metrics import MACHINE_METRICS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.hidden_size=32",
    "train.global_batch=32",
    "train.steps=20",
    "log.every=1",
    "checkpoint.every=5",
    "sample.grid_every=10",
    "sample.steps=4",
]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed(*arguments: str) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        "",
        "--num_gpus",
        "2",
        "--master_port",
        free_port(),
    ]
    return [*launcher, "--module", "diffmoe_ep", *arguments]


def torchrun(*arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return [*launcher, "-m", "diffmoe_ep", *arguments]


def finish(command: list[str], code: int = 0) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def told(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_METRICS} for line in lines]


def kill_rank(launcher: subprocess.Popen[bytes], rank: int) -> None:
    """SIGKILL one rank of a running launcher."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank) and "diffmoe_ep" in process.cmdline():
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.timeout(900)
def test_from_images_to_samples(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert "1500 samples" in finish([sys.executable, "-m", "data_prep", "digits", "--out", str(data)])
    settings = ["configs/digits.yaml", f"data.folder={data / 'train'}", *SMALL]

    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    finish(torchrun("train", *settings, f"folder={uncut}"))
    assert [line["step"] for line in told(uncut)] == list(range(1, 21))
    assert sorted(path.name for path in (uncut / "samples").iterdir()) == ["step-0000010.png", "step-0000020.png"]

    # The same run under DeepSpeed's launcher, killed after its first checkpoint, then run again: the same bits as the
    # uncut one.
    running = subprocess.Popen(
        deepspeed("train", *settings, f"folder={cut}"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=-3,
    )
    deadline = time.monotonic() + 240
    while not (cut / "checkpoints/latest").exists():
        assert running.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint after four minutes"
        time.sleep(0.05)
    kill_rank(running, 1)
    assert running.wait(timeout=120) != 0
    killed_at = int((cut / "checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert f"continues at step {killed_at}" in finish(deepspeed("train", *settings, f"folder={cut}"))
    assert told(cut) == told(uncut)
    assert "is finished: step 20 of 20" in finish(deepspeed("train", *settings, f"folder={cut}"))

    out = finish(
        [
            sys.executable,
            "-m",
            "diffmoe_ep",
            "sample",
            str(cut),
            "--out",
            str(tmp_path / "drawn"),
            "--samples",
            "20",
            "--classes",
            "3,8",
        ]
    )
    assert "20 samples of" in out
    assert (tmp_path / "drawn/grid.png").stat().st_size > 0
    scored = [
        "evaluate",
        str(cut),
        "--reference",
        str(data / "train"),
        "--heldout",
        str(data / "heldout"),
        "--samples",
        "50",
        "--out",
        str(tmp_path),
    ]
    assert "classifier accuracy" in finish([sys.executable, "-m", "diffmoe_ep", *scored])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_samples"] == 50
    assert 0 <= scores["accuracy"] <= 1
    assert scores["accuracy_heldout"] > 0.95


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_a_mistake_ends_the_launcher_quickly(tmp_path: Path, launcher: Any) -> None:
    """No hang and no traceback of ours, also when the mistake shows only after the ranks have joined."""
    done = subprocess.run(
        launcher("train", "configs/digits.yaml", f"data.folder={tmp_path / 'nothing'}", f"folder={tmp_path / 'run'}"),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert told.count("diffmoe: error: ") == 1
    assert f"{tmp_path / 'nothing'}" in told
    assert "diffmoe_ep/cli" not in told


@pytest.mark.timeout(300)
def test_more_bad_samples_than_allowed_end_all_ranks_and_are_listed(digits: Path, tmp_path: Path) -> None:
    """Damage that the quick check at the start cannot see: the rank that reads the samples says so, and all end."""
    data = tmp_path / "train"
    shutil.copytree(digits / "train", data)
    for shard in data.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[1536 + 128 + 10] ^= (
            1  # inside the pixels of each shard's first sample: behind two headers, the label and npy's own header
        )
        shard.write_bytes(bytes(content))
    settings = [
        *SMALL,
        "train.steps=200",
        "log.every=100",
        "checkpoint.every=1000",
        f"data.folder={data}",
        f"folder={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        torchrun("train", "configs/digits.yaml", *settings),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    told = done.stdout + done.stderr
    limit = (
        re.escape("samples are bad, listed in ")
        + r"\S+quarantine-rank\*\.jsonl: more than data\.max_bad_fraction = 0\.001"
    )
    assert re.search(r"diffmoe: error: (rank [01]: )?\d of 1500 " + limit, told), told
    listed = [
        json.loads(line)
        for file in (tmp_path / "run").glob("quarantine-rank*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len(listed) >= 2
    for fault in listed:
        assert re.fullmatch(r".*digits-train-00000\d\.tar", fault["shard"])
        assert "damaged (crc32 differs)" in fault["reason"]
