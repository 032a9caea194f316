"""What launch/torchrun.sh would start, on one machine and where hosts meet, and what it says of mistakes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script on a machine without GPUs, with no variable that concerns ranks but those given."""
    ours = {"DIFFMOE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    command = ["bash", str(ROOT / "launch/torchrun.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=ours | environment, capture_output=True, text=True, timeout=120)


def shown(*arguments: str, **environment: str) -> list[str]:
    done = start("--print", *arguments, "configs/digits.yaml", "seed=3", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_machine() -> None:
    lines = shown("--gpus", "2")
    assert "export DS_ACCELERATOR=cpu" in lines
    assert lines[-2] == f"cd {ROOT}"
    started = f"{sys.executable} -m torch.distributed.run --nnodes 1 --nproc-per-node 2 --standalone --max-restarts 0 "
    assert lines[-1].startswith(started)
    assert lines[-1].endswith(f"--shutdown-timeout 30 -m diffmoe_ep train {ROOT}/configs/digits.yaml seed=3")
    assert " --nproc-per-node 1 " in shown()[-1]
    assert " --nproc-per-node 3 " in shown(CUDA_VISIBLE_DEVICES="2,5,7")[-1]


def test_the_host_where_others_meet_keeps_the_store() -> None:
    """By its address, whatever its name leads to; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        here = probe.getsockname()[0]
    mine = shown("--nnodes", "2", "--rdzv-endpoint", f"{here}:29500", "--rdzv-id", "a", "--rdzv-conf", "join_timeout=9")
    meeting = f"--rdzv-backend c10d --rdzv-endpoint {here}:29500 --rdzv-id a --rdzv-conf "
    assert f"{meeting}is_host=1\\,join_timeout=9 --local-addr {here} --max-restarts 0 " in mine[-1]
    another = shown("--nnodes", "1:4", "--rdzv-endpoint", "192.0.2.1")
    meeting = "--nnodes 1:4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 192.0.2.1:29400 --rdzv-id diffmoe"
    assert f"{meeting} --rdzv-conf is_host=0 --local-addr {here} --max-restarts 100 " in another[-1]
    for lines in (mine, another):
        (name,) = (line.split("=")[1] for line in lines if line.startswith("export GLOO_SOCKET_IFNAME="))
        assert (Path("/sys/class/net") / name).exists()
        assert name != "lo"


def test_a_name_that_is_not_known_yet_is_another_host() -> None:
    assert " --rdzv-conf is_host=0 --max-restarts " in shown("--nnodes", "2", "--rdzv-endpoint", "node-a.invalid")[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2"], "--nnodes is 2, but where do the hosts meet? Give all the same --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "3:2"], "--nnodes is 3:2; give a number of hosts, or MIN:MAX with MIN not above MAX"),
        (["--nnodes=0"], "--nnodes is 0; give a number of hosts"),
        (["--nnodes", "99999999999999999999"], "--nnodes is 99999999999999999999; give a number of hosts"),
        (["--rdzv-endpoint", "a:99999"], "--rdzv-endpoint is a:99999; give HOST:PORT, for example node1:29400"),
        (["--rdzv-endpoint", "a;b"], "--rdzv-endpoint is a;b; give HOST:PORT"),
        (["--rdzv-conf", "is_host"], "--rdzv-conf is is_host; give KEY=N,..., for example join_timeout=900"),
        (["--gpus", "two"], "--gpus is two; give a whole number, at least 1"),
        (["--max-restarts", "-1"], "--max-restarts wants a value; see ./launch/torchrun.sh --help"),
        (["--node-rank", "1"], "unknown option --node-rank; see ./launch/torchrun.sh --help"),
    ],
)
def test_mistakes_are_named_in_one_line(options: list[str], message: str) -> None:
    done = start(*options, "configs/digits.yaml")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("launch: " + message)
