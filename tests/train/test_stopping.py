"""A run that is told to stop ends its step on all ranks, saves, and goes on to the bit; none outlives its launcher."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffmoe_ep.checkpoint import store
from diffmoe_ep.config import CheckpointConfig, Config, dump
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from diffmoe_ep.processes import LAUNCHER, SIGNALS, Process, serve
from diffmoe_ep.train import stopping, trainer
from diffmoe_ep.train.metrics import MACHINE_METRICS
from diffmoe_ep.train.stopping import TRY_AGAIN, Stopping
from ranks import run
from train.runs import config, layout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEPT = CheckpointConfig()


def told(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_METRICS} for line in lines]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


# -- ranks agree -------------------------------------------------------------------------------------------------------


def wishes(rank: int, told_rank: int, minutes: float) -> tuple[bool, bool]:
    mesh = init_mesh(1, 1, 1.0)
    kept = dataclasses.replace(KEPT, minutes=minutes)
    with mock.patch.object(stopping, "time") as time_:
        time_.monotonic.return_value = 0.0
        listening = Stopping(kept, mesh, 0)
        listening.told = rank == told_rank
        time_.monotonic.return_value = 90.0 if rank == 0 else 1e6
        return listening.agree(), listening.stops


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_agree_on_what_one_of_them_wishes(world: int) -> None:
    assert run(world, wishes, world - 1, 0.0) == [(True, True)] * world
    assert run(world, wishes, -1, 0.0) == [(False, False)] * world
    assert run(world, wishes, -1, 1.5) == [(True, False)] * world  # the clock's, as the first rank has it
    assert run(world, wishes, -1, 1.6) == [(False, False)] * world
    assert run(world, wishes, world - 1, 1.5) == [(True, True)] * world


# -- a run that is told ------------------------------------------------------------------------------------------------


def stopped(rank: int, given: Config, number: int = 0, at: tuple[int, ...] = ()) -> tuple[bool, int, bool]:
    """Train; the last rank gets a signal in each of these steps. Returns whether the run was finished, the step it came
    to, and whether signals are handled afterwards as before.
    """
    before = handlers()
    mesh = trainer.start_mesh(given)
    made = trainer.Trainer(given, mesh, *trainer.prepare(given, mesh))
    step = made.train_step

    def train_step(clock: Any) -> Any:
        for _ in range(at.count(made.step) if rank == mesh.size - 1 else 0):
            os.kill(os.getpid(), number)
        return step(clock)

    made.train_step = train_step  # type: ignore[method-assign]
    finished = made.run()
    return finished, made.step, handlers() == before


@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_told_run_saves_and_goes_on_to_the_bit(digits: Path, tmp_path: Path, world: int, number: int) -> None:
    def given(name: str) -> Config:
        return layout(config(digits / "train", tmp_path / name, "train.steps=5"), world, 1)

    assert run(world, stopped, given("uncut")) == [(True, 5, True)] * world
    assert run(world, stopped, given("cut"), number, (2, 2)) == [(False, 3, True)] * world  # twice, as launchers do
    assert store.read_meta(store.resolve(tmp_path / "cut"))["step"] == 3
    assert run(world, stopped, given("cut"), number, (4,)) == [(True, 5, True)] * world  # in its last step
    assert told(tmp_path / "cut") == told(tmp_path / "uncut")


def by_the_clock(rank: int, given: Config) -> list[str]:
    """Train while each look at the clock of the first rank finds ten seconds gone."""
    times = itertools.count(0, 10 if rank == 0 else 1000)
    with mock.patch.object(stopping, "time", mock.Mock(monotonic=lambda: float(next(times)))):
        stopped(rank, given)
    return sorted(path.name for path in (Path(given.folder) / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_saves_by_the_clock(digits: Path, tmp_path: Path, world: int) -> None:
    kept = ["train.steps=7", "checkpoint.minutes=0.5", "checkpoint.keep_last=9", "log.every=1000"]
    given = layout(config(digits / "train", tmp_path / "run", *kept), 1, 1)
    expected = [f"step-{step:07d}" for step in (3, 6, 7)]  # after half a minute, again after another, and at the end
    assert run(world, by_the_clock, given) == [expected] * world


def fails(rank: int, given: Config) -> bool:
    """Train until a step fails, beside a child that holds what this process had opened, as a data worker does."""
    before, children = handlers(), list[int]()

    def forward(*_: Any) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(60)
            os._exit(0)
        raise OSError("planted")

    with mock.patch.object(trainer.Engine, "forward", side_effect=forward), pytest.raises(OSError, match="planted"):
        stopped(rank, given)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    return handlers() == before and signal.set_wakeup_fd(-1) == -1


def test_handlers_are_restored_when_a_run_fails(digits: Path, tmp_path: Path) -> None:
    assert run(1, fails, config(digits / "train", tmp_path / "run")) == [True]


# -- a run that does not leave -----------------------------------------------------------------------------------------

STUCK = """
import sys, time
from diffmoe_ep.config import CheckpointConfig
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.stopping import Stopping
with Stopping(CheckpointConfig(grace_seconds=float(sys.argv[1])), Mesh(), int(sys.argv[2])):
    print("listens", flush=True)
    time.sleep(300)
"""


def stuck(grace: float, step: int) -> subprocess.Popen[str]:
    """A process that does not come to the end of its step."""
    made = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(grace), str(step)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert made.stdout is not None and made.stdout.readline() == "listens\n"
    return made


@pytest.mark.timeout(300)
def test_a_run_that_is_not_out_in_time_is_ended() -> None:
    process = stuck(1.0, 40)
    process.send_signal(signal.SIGUSR1)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == TRY_AGAIN
    expected = "rank 0 is not out 1 s after a signal (checkpoint.grace_seconds) and leaves now; "
    assert error.endswith(f"{expected}the last checkpoint is step 40\n")


@pytest.mark.timeout(300)
def test_a_second_signal_leaves_at_once_and_an_echo_does_not() -> None:
    process = stuck(1000.0, 0)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(stopping.ECHO_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == TRY_AGAIN
    assert error.endswith("rank 0 is told again and leaves at once; there is no checkpoint yet\n")


def test_listening_outside_the_main_thread_changes_nothing() -> None:
    before = handlers()
    with mock.patch("threading.main_thread"), Stopping(KEPT, Mesh(), 0) as listening:
        assert handlers() == before
        assert not listening.agree()


# -- who ends with whom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "launches"),
    [
        ("torch.distributed.run", True),
        ("deepspeed.launcher.launch", True),
        ("/usr/bin/torchrun", True),
        ("deepspeed", True),
        ("diffmoe_ep", False),
        ("/data/deepspeed.json", False),
        ("/src/deepspeed/train.py", False),
    ],
)
def test_launchers_are_known_by_their_command_lines(word: str, launches: bool) -> None:
    assert bool(LAUNCHER.fullmatch(word)) == launches


def test_a_process_is_alive_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = Process.of(child.pid)
    assert process is not None and process.is_alive and process.parent == os.getpid() and not process.is_launcher
    assert not dataclasses.replace(process, started=process.started + 1).is_alive
    child.kill()
    wait_for(lambda: not process.is_alive)  # though nobody has waited for it
    child.wait()
    assert Process.of(child.pid) is None


def work(pipe: Any) -> None:
    serve(os.getppid())
    pipe.send("serves")
    time.sleep(300)


def test_a_worker_obeys_its_parent_alone() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(theirs,), daemon=True)
    worker.start()
    assert ours.poll(60) and ours.recv() == "serves"
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)  # from a stranger
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


# -- under launchers ---------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), "-m"]


def deepspeed() -> list[str]:
    launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", "", "--num_gpus", "2", "--master_port", port()]
    return [*launcher, "--no_local_rank", "--module"]


def below(pid: int) -> Iterator[Process]:
    """All processes that a process has started, and those that they have."""
    for entry in Path("/proc").iterdir():
        process = Process.of(int(entry.name)) if entry.name.isdigit() else None
        if process is not None and process.parent == pid:
            yield process
            yield from below(process.pid)


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait for it; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not come about"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture
def endless(digits: Path, tmp_path: Path) -> Iterator[Callable[[Callable[[], list[str]]], subprocess.Popen[str]]]:
    """Starts an endless run in tmp_path/run on two ranks, each with a data worker, and returns once it has trained."""
    processes: list[Process] = []

    def start(launcher: Callable[[], list[str]]) -> subprocess.Popen[str]:
        file = tmp_path / "config.yaml"
        made = config(
            digits / "train", tmp_path / "run", "train.steps=1000000", "data.workers=1", "checkpoint.keep_last=100"
        )
        file.write_text(dump(made))
        command = [sys.executable, *launcher(), "diffmoe_ep", "train", str(file)]
        log = (tmp_path / "log").open("w")
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, text=True
        )
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: running.poll() is not None or (metrics.exists() and bool(metrics.read_text())), 240)
        assert running.poll() is None, (tmp_path / "log").read_text()
        processes.extend(below(running.pid))
        return running

    yield start
    for process in processes:
        if process.is_alive:
            os.kill(process.pid, signal.SIGKILL)


def is_rank(process: Process, rank: int) -> bool:
    variables = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
    return f"RANK={rank}" in variables and Process.of(process.parent).is_launcher  # type: ignore[union-attr]


def final_step(tmp_path: Path) -> int:
    step = store.read_meta(store.resolve(tmp_path / "run"))["step"]
    assert told(tmp_path / "run")[-1]["step"] == step
    assert f"run stopped at step {step} of 1000000" in (tmp_path / "log").read_text()
    return int(step)


@pytest.mark.timeout(600)
def test_a_signal_to_one_rank_ends_both_with_the_code_to_try_again(endless: Any, tmp_path: Path) -> None:
    running = endless(deepspeed)
    for process in [process for process in below(running.pid) if is_rank(process, 1)]:
        os.kill(process.pid, signal.SIGUSR1)
    assert running.wait(120) == TRY_AGAIN  # deepspeed's code is that of the first rank to leave; torchrun's always 1
    assert final_step(tmp_path) >= 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "number"), [(torchrun, signal.SIGTERM), (torchrun, signal.SIGKILL), (deepspeed, signal.SIGKILL)]
)
def test_ranks_and_workers_end_with_their_launcher(endless: Any, tmp_path: Path, launcher: Any, number: int) -> None:
    running = endless(launcher)
    processes = list(below(running.pid))
    assert len(processes) >= 4  # two ranks with a worker each
    running.send_signal(number)
    wait_for(lambda: not any(process.is_alive for process in processes), 60)
    assert running.wait(60) != 0
    assert final_step(tmp_path) >= 1
