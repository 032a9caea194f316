"""A run folder is one training's: a second one is told who has it, and whatever ends the first frees it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from diffmoe_ep.train import run_lock
from diffmoe_ep.train.run_lock import LOCK, STALE_SECONDS, RunLock, holder
from ranks import run

pytestmark = pytest.mark.slow

HOLD = """
import sys, time
from pathlib import Path
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.run_lock import RunLock

with RunLock(Path(sys.argv[1]), Mesh()):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Another process that trains in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def refused(rank: int, folder: Path) -> str:
    try:
        with RunLock(folder, init_mesh(1, 1, 1.0)):
            return "held"
    except ConfigError as error:
        return str(error)


def test_the_second_names_the_first_on_every_rank_and_a_kill_frees_the_folder(
    tmp_path: Path, held: subprocess.Popen[str]
) -> None:
    found = run(2, refused, tmp_path)
    assert found[0] == found[1]
    assert f"{tmp_path} is in use: process {held.pid} on {os.uname().nodename} has trained there since" in found[0]
    assert "wait for its end, stop it, or give this run another folder" in found[0]
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert run(2, refused, tmp_path) == ["held", "held"]


def test_who_looks_on_sees_the_holder_and_takes_nothing(tmp_path: Path, held: subprocess.Popen[str]) -> None:
    seen = holder(tmp_path)
    assert seen is not None
    assert (seen.process, seen.host, seen.is_here, seen.is_alive) == (held.pid, os.uname().nodename, True, True)
    assert seen.heard_of < 60 and seen.held < 600
    assert "is in use" in run(1, refused, tmp_path)[0]  # still
    held.kill()
    held.wait()
    gone = holder(tmp_path)
    assert gone is not None and not gone.is_alive
    assert run(1, refused, tmp_path) == ["held"]
    assert holder(tmp_path) is None  # it was left in order
    assert holder(tmp_path / "nowhere") is None


def test_a_holder_elsewhere_is_alive_while_it_gives_signs(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "another", "process": 7, "since": "noon"}))
    seen = holder(tmp_path)
    assert seen is not None and seen.is_alive and not seen.is_here and seen.held == 0
    past = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / LOCK, (past, past))
    seen = holder(tmp_path)
    assert seen is not None and not seen.is_alive and seen.heard_of > STALE_SECONDS


def test_leaving_frees_the_folder_after_an_error_too(tmp_path: Path) -> None:
    def fails() -> None:
        with RunLock(tmp_path / "new", Mesh()):
            assert json.loads((tmp_path / "new" / LOCK).read_text())["process"] == os.getpid()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (tmp_path / "new" / LOCK).read_text() == ""
    with RunLock(tmp_path / "new", Mesh()):
        pass


def test_a_holder_whose_lock_is_not_seen_is_known_by_its_signs_of_life(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "another", "process": 7, "since": "noon"}))
    with pytest.raises(
        ConfigError, match=r"process 7 on another has trained there since noon and was heard of 0 s ago"
    ):
        RunLock(tmp_path, Mesh()).__enter__()
    past = time.time() - STALE_SECONDS - 1
    os.utime(path, (past, past))
    with RunLock(tmp_path, Mesh()):
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.01)
    with RunLock(tmp_path, Mesh()):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while os.stat(tmp_path / LOCK).st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - os.stat(tmp_path / LOCK).st_mtime < 60


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 50, '{"host": 5}'])
def test_a_file_that_is_no_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    past = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / LOCK, (past, past))
    with RunLock(tmp_path, Mesh()):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_what_cannot_be_a_lock_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LOCK
    {"folder": path.mkdir, "link": lambda: path.symlink_to("elsewhere"), "fifo": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(ConfigError, match=r"lock\.json cannot be locked \(.+\); give another folder"):
        RunLock(tmp_path, Mesh()).__enter__()
    assert not (tmp_path / "elsewhere").exists()
