"""Training over two hosts is the training on one: hosts made of two network namespaces, each with its own sshd, and
DeepSpeed over pdsh.

Needs root and Debian's iproute2, openssh-server and pdsh; is skipped where they are missing.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from end_to_end.hosts import Hosts, command_of, finish, ip, metrics, missing, two_hosts

pytestmark = pytest.mark.slow

SMALL = [
    "model.hidden_size=32", "model.num_blocks=4", "data.workers=0", "train.global_batch=24", "train.steps=8",
    "train.max_grad_norm=0.3", "train.schedule.warmup=0",
    "train.optimizer.lr=1e-3", "log.every=1", "sample.grid_every=0", "parallel.timeout_minutes=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if (reason := missing(ssh=True)) is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts"), ssh=True) as made:
        yield made


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> list[dict[str, Any]]:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    settings = [f"data.folder={digits / 'train'}", f"folder={folder}", "parallel.expert_parallel=1", *SMALL]
    finish([sys.executable, "-m", "diffmoe_ep", "train", "configs/digits.yaml", *settings], hosts.environment())
    return metrics(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("slots", "expert"), [(2, 2), (2, 4)], ids=["experts inside hosts", "experts across hosts"])
def test_two_hosts_train_what_one_trains(
    hosts: Hosts, alone: list[dict[str, Any]], digits: Path, tmp_path: Path, slots: int, expert: int
) -> None:
    folder = tmp_path / "a run's $HOME, 100%n"  # a name that ssh, pdsh and two shells must leave as it is
    settings = [f"data.folder={digits / 'train'}", f"folder={folder}", f"parallel.expert_parallel={expert}", *SMALL]
    before = hosts.received()
    finish(hosts.command("configs/digits.yaml", *settings, slots=slots), hosts.environment())
    found = metrics(folder)
    assert [line["step"] for line in found] == list(range(1, 9))
    for one, other in zip(found, alone, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-6
        assert abs(one["grad_norm"] / other["grad_norm"] - 1) <= 1e-5
    assert found[-1]["loss"] != found[0]["loss"]
    assert hosts.received() - before > 100_000  # the ranks did meet over the wire
    assert hosts.processes() == []


@pytest.mark.timeout(300)
def test_the_laws_hold_over_two_hosts(hosts: Hosts) -> None:
    told = finish(hosts.command("--verb", "verify"), hosts.environment())
    assert "checks on 2 ranks in " in told
    assert "all hold" in told


@pytest.mark.timeout(300)
def test_a_stopped_launch_leaves_nothing_on_any_host(hosts: Hosts, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [
        f"data.folder={digits / 'train'}",
        f"folder={folder}",
        "parallel.expert_parallel=2",
        *SMALL,
        "train.steps=100000",
    ]
    running = subprocess.Popen(
        hosts.command("configs/digits.yaml", *settings), env=hosts.environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists():
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline, "no step after two minutes"
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        told = running.communicate(timeout=90)[0].decode()
        assert running.returncode == 143, told
        assert f"launch: stopping the ranks on {' '.join(hosts.addresses)}" in told
        deadline = time.monotonic() + 30
        while hosts.processes():
            assert time.monotonic() < deadline, [command_of(pid) for pid in hosts.processes()]
            time.sleep(0.1)
    finally:
        running.kill()
        for pid in hosts.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_a_cut_link_ends_the_launch_and_the_run_goes_on_with_what_is_left(
    hosts: Hosts, digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = [
        "configs/digits.yaml", f"data.folder={digits / 'train'}", f"folder={folder}", "parallel.expert_parallel=2",
        "parallel.elastic=true", *SMALL, "parallel.timeout_minutes=0.15", "data.retries=1", "checkpoint.every=2",
    ]  # fmt: skip
    patience = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"}  # usual: a minute
    running = subprocess.Popen(
        hosts.command(*settings, "train.steps=100000"), env=hosts.environment() | patience,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints/latest").exists():
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint after two minutes"
            time.sleep(0.05)
        ip("-n", hosts.names[1], "link", "set", "eth0", "down")
        told = running.communicate(timeout=120)[0].decode()
        assert running.returncode != 0
        assert re.search(r"Timed out waiting 9000ms|parallel\.timeout_minutes", told), told
        deadline = time.monotonic() + 90
        while hosts.processes():
            assert time.monotonic() < deadline, [command_of(pid) for pid in hosts.processes()]
            time.sleep(0.1)
        saved = int((folder / "checkpoints/latest").read_text().strip().removeprefix("step-"))
        told = finish(hosts.command("--nodes", "1", *settings, f"train.steps={saved + 2}"), hosts.environment())
        assert "parallel.expert_parallel is 1, not 2, on 1 rank" in told
        assert [line["step"] for line in metrics(folder)] == list(range(1, saved + 3))
    finally:
        ip("-n", hosts.names[1], "link", "set", "eth0", "up")
        running.kill()
        for pid in hosts.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(120)
def test_a_host_that_cannot_take_part_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    other = hosts.addresses[0].rpartition(".")[0] + ".9"
    hostfile.write_text(f"{hosts.addresses[0]} slots=1\n{other} slots=1\n")
    told = finish([*hosts.command()[:5], "--hostfile", str(hostfile), "configs/digits.yaml"], hosts.environment(), 1)
    assert f"launch: host {hosts.addresses[0]} cannot be used over ssh" in told  # no --ssh-port: nothing listens at 22
    told = finish(hosts.command("configs/digits.yaml"), hosts.environment() | {"GLOO_SOCKET_IFNAME": "lo,eth1"}, 1)
    assert (
        "GLOO_SOCKET_IFNAME names the interface eth1, which this machine has not; it has eth0 lo, and eth0 leads to "
        "the other hosts" in told
    )
