"""Training over two hosts is the training on one: hosts made of two network namespaces, each with its own sshd, and
DeepSpeed over pdsh.

Needs root and Debian's iproute2, openssh-server and pdsh; is skipped where they are missing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
SMALL = [
    "model.hidden_size=32", "model.num_blocks=4", "data.workers=0", "train.global_batch=24", "train.steps=8",
    "train.max_grad_norm=0.3", "train.schedule.warmup=0",
    "train.optimizer.lr=1e-3", "log.every=1", "sample.grid_every=0", "parallel.timeout_minutes=1",
]  # fmt: skip


def missing() -> str | None:
    """What this machine lacks for two hosts of its own, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in {
        "ip": "iproute2",
        "sshd": "openssh-server",
        "ssh": "openssh-client",
        "pdsh": "pdsh",
    }.items():
        if shutil.which(program, path=PATH) is None:
            return f"there is no {program} (Debian's package {package})"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(
        ["ip", "netns", "add", probe], env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=30
    )
    subprocess.run(
        ["ip", "netns", "del", probe], env=os.environ | {"PATH": PATH}, capture_output=True, check=False, timeout=30
    )
    return None if made.returncode == 0 else f"network namespaces cannot be made here: {made.stderr.strip()}"


@dataclass(frozen=True)
class Hosts:
    """Two namespaces joined by a pair of interfaces, both named eth0."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    folder: Path  # keys, configs, and the programs that shadow the system's
    port: int  # free in both

    def command(self, *arguments: str, slots: int = 1) -> list[str]:
        """launch/deepspeed.sh on the first host, over both."""
        hostfile = self.folder / f"hosts-{slots}"
        hostfile.write_text("# two hosts\n\n" + "".join(f"{address} slots={slots}\n" for address in self.addresses))
        script = [
            str(ROOT / "launch/deepspeed.sh"),
            "--hostfile",
            str(hostfile),
            "--ssh-port",
            "2200",
            "--master-port",
            str(self.port),
        ]
        return ["ip", "netns", "exec", self.names[0], *script, *arguments]

    def environment(self) -> dict[str, str]:
        """One thread a rank, no GPU, our ssh; nothing that says which interface to take."""
        foreign = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "GLOO_SOCKET_IFNAME",
            "NCCL_SOCKET_IFNAME",
            "DS_ENV_FILE",
        )
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        ours = {
            "DIFFMOE_PYTHON": sys.executable,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        return kept | ours | {"PATH": os.pathsep.join([str(self.folder / "bin"), PATH])}

    def processes(self) -> list[int]:
        """All that runs in the namespaces but the ssh servers: all of it was started here."""
        pids = [int(pid) for name in self.names for pid in ip("netns", "pids", name).split()]
        return [pid for pid in pids if "sshd" not in command_of(pid)]

    def received(self) -> int:
        """Bytes that the second host has got from the first."""
        return int(ip("netns", "exec", self.names[1], "cat", "/sys/class/net/eth0/statistics/rx_bytes"))


def ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has just ended
        return ""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts, which are gone with all that runs on them at the end, however that comes."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    number = os.getpid()
    names = (f"hosts{number}a", f"hosts{number}b")
    network = f"10.{100 + number % 100}.{number // 100 % 250}"
    made = Hosts(names, (f"{network}.1", f"{network}.2"), tmp_path_factory.mktemp("hosts"), 20000 + number % 10000)
    separation = Path("/run/sshd")  # sshd wants it, and a machine where no sshd is started has none
    make_separation = not separation.exists()
    servers = []
    try:
        if make_separation:
            separation.mkdir(mode=0o755)
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, made.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        servers = start_servers(made)
        yield made
    finally:
        for name in names:
            kill_all(name)
        for server in servers:
            server.wait(timeout=30)
        for name in names:
            subprocess.run(
                ["ip", "netns", "del", name],
                env=os.environ | {"PATH": PATH},
                capture_output=True,
                check=False,
                timeout=30,
            )
        if make_separation and separation.exists():
            separation.rmdir()
        shutil.rmtree(made.folder, ignore_errors=True)


def start_servers(hosts: Hosts) -> list[subprocess.Popen[bytes]]:
    """An sshd on each host with a key and a config of this test's own, and the `ssh` that knows them."""
    folder = hosts.folder
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True, timeout=30)
    public = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text("".join(f"[{address}]:2200 {public}\n" for address in hosts.addresses))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known\n"
        "StrictHostKeyChecking yes\nLogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=PATH)} -F {folder}/ssh_config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    servers = []
    for name, address in zip(hosts.names, hosts.addresses, strict=True):
        config = folder / f"sshd-{name}"
        config.write_text(
            f"ListenAddress {address}:2200\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        sshd = str(shutil.which("sshd", path=PATH))
        servers.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sshd, "-D", "-f", str(config)], env=os.environ | {"PATH": PATH}
            )
        )
    deadline = time.monotonic() + 30
    for name, address in zip(hosts.names, hosts.addresses, strict=True):
        command = ["ip", "netns", "exec", name, "ssh", "-p", "2200", address, "true"]
        while subprocess.run(
            command, env=hosts.environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=30
        ).returncode:
            assert time.monotonic() < deadline, f"no sshd answers at {address}"
            time.sleep(0.1)
    return servers


def kill_all(name: str) -> None:
    """End whatever still runs in a namespace of ours, by its ids."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        listed = subprocess.run(
            ["ip", "netns", "pids", name], env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=30
        )
        if listed.returncode or not listed.stdout.split():
            return
        for pid in map(int, listed.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def finish(command: list[str], environment: dict[str, str], code: int = 0) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
