"""A run goes on while hosts come and go: torchrun on two network namespaces, without ssh, and a link that is cut.

Needs root and Debian's iproute2; is skipped where they are missing.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from end_to_end.hosts import ROOT, Hosts, finish, ip, metrics, missing, two_hosts

pytestmark = pytest.mark.slow

SMALL = [
    "configs/digits.yaml", "model.hidden_size=32", "model.num_blocks=4", "data.workers=0", "train.global_batch=24",
    "train.steps=24", "train.schedule.warmup=0", "train.optimizer.lr=1e-4", "log.every=1", "checkpoint.every=2",
    "sample.grid_every=0", "data.retries=1", "parallel.timeout_minutes=0.15", "parallel.expert_parallel=2",
    "parallel.elastic=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if (reason := missing(ssh=False)) is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts"), ssh=False) as made:
        yield made


def start(hosts: Hosts, number: int, settings: list[str], said: Path) -> subprocess.Popen[bytes]:
    """The line that is the same on all hosts, started on this one."""
    script = [str(ROOT / "launch/torchrun.sh"), "--nnodes", "1:2"]
    script += ["--rdzv-endpoint", f"{hosts.addresses[0]}:{hosts.port}", "--rdzv-conf", "last_call_timeout=1"]
    with said.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", hosts.names[number], *script, *settings],
            cwd="/", env=hosts.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def until(happened: Callable[[], bool], running: list[subprocess.Popen[bytes]], said: list[Path], what: str) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert all(one.poll() is None for one in running), "\n".join(path.read_text() for path in said)
        assert time.monotonic() < deadline, f"{what}: not in two minutes\n" + "\n".join(p.read_text() for p in said)
        time.sleep(0.02)


def ranks(hosts: Hosts, number: int) -> list[int]:
    """The processes of a host that train."""
    pids = map(int, ip("netns", "pids", hosts.names[number]).split())
    return [pid for pid in pids if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


def last(folder: Path) -> int:
    """The last step that is logged; 0 before the first."""
    return metrics(folder)[-1]["step"] if (folder / "metrics.jsonl").exists() and metrics(folder) else 0


def is_told(pid: int) -> bool:
    """Whether a SIGTERM waits for this process."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) >> signal.SIGTERM - 1 & 1)


@pytest.mark.timeout(400)
def test_a_run_goes_on_while_a_host_comes_and_its_link_is_cut(hosts: Hosts, digits: Path, tmp_path: Path) -> None:
    """One host alone, then two with the experts over them, then the first alone again: what one process trains at a
    stretch.
    """
    common = [*SMALL, f"data.folder={digits / 'train'}"]
    whole = tmp_path / "whole"
    finish([sys.executable, "-m", "diffmoe_ep", "train", *common, f"folder={whole}"], hosts.environment())

    folder = tmp_path / "run"
    said = [tmp_path / "first", tmp_path / "second"]
    running = [start(hosts, 0, [*common, f"folder={folder}"], said[0])]
    until(lambda: last(folder) >= 2, running, said[:1], "the first steps on one host")
    (alone,) = ranks(hosts, 0)
    os.kill(alone, signal.SIGSTOP)  # so that the second host comes before the run is over
    running.append(start(hosts, 1, [*common, f"folder={folder}"], said[1]))
    until(lambda: is_told(alone), running, said, "the second host's coming")
    os.kill(alone, signal.SIGCONT)
    came_at = last(folder)
    until(lambda: last(folder) >= came_at + 4, running, said, "steps on two hosts")
    pair = [*ranks(hosts, 0), *ranks(hosts, 1)]
    for pid in pair:
        os.kill(pid, signal.SIGSTOP)
    ip("-n", hosts.names[1], "link", "set", "eth0", "down")
    cut_at = last(folder)
    assert cut_at < 20
    for pid in pair:
        os.kill(pid, signal.SIGCONT)
    assert running[0].wait(timeout=200) == 0, said[0].read_text()

    # What was cut is named by those that waited, no longer than they may; ranks of the lost host have ended, too. (Its
    # launcher waits for the link.)
    words = said[0].read_text()
    assert re.search(r"Timed out waiting 9000ms|parallel\.timeout_minutes", words), words
    deadline = time.monotonic() + 60
    while ranks(hosts, 1):
        assert time.monotonic() < deadline, "a rank of the lost host runs on"
        time.sleep(0.5)
    worlds = re.findall(r"^(\d) ranks? on cpu", words, re.MULTILINE)
    assert worlds == ["1", "2", "1"], words
    assert words.count("parallel.expert_parallel is 1, not 2, on 1 rank") == 2
    found, wanted = metrics(folder), metrics(whole)
    assert [line["step"] for line in found] == list(range(1, 25))
    for one, other in zip(found, wanted, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-6
    assert found[-1]["loss"] != found[0]["loss"]
