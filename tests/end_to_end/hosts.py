"""Two hosts made of two network namespaces, for tests that train over several hosts on one machine.

Needs root and Debian's iproute2, and for ssh between them openssh-server and pdsh.
"""

import contextlib
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

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing(ssh: bool) -> str | None:
    """What this machine lacks for two hosts of its own, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    programs = {"ip": "iproute2"}
    if ssh:
        programs |= {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
    for program, package in programs.items():
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


@contextlib.contextmanager
def two_hosts(folder: Path, ssh: bool) -> Iterator[Hosts]:
    """Two hosts, which are gone with all that runs on them at the end, however that comes."""
    number = os.getpid()
    names = (f"hosts{number}a", f"hosts{number}b")
    network = f"10.{100 + number % 100}.{number // 100 % 250}"
    made = Hosts(names, (f"{network}.1", f"{network}.2"), folder, 20000 + number % 10000)
    separation = Path("/run/sshd")  # sshd wants it, and a machine where no sshd is started has none
    make_separation = ssh and not separation.exists()
    servers: list[subprocess.Popen[bytes]] = []
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
        if ssh:
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
