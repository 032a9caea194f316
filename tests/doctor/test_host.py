"""Each fault of a host is named with its remedy: little shared memory, low limits, stale locks, full disks, clocks."""

import os
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from diffmoe_ep.doctor import host
from diffmoe_ep.doctor.finding import Finding


class Space(NamedTuple):
    f_frsize: int
    f_blocks: int
    f_bavail: int
    f_files: int
    f_favail: int


def one(findings: Any, name: str) -> Finding:
    """The only finding of that name."""
    (found,) = [finding for finding in findings if finding.name == name]
    assert isinstance(found, Finding)
    return found


def space(total: int, free: int, files: int = 10**6) -> Any:
    """A file system of this size, whichever is asked for."""
    made = Space(4096, total // 4096, free // 4096, 10**6, files)
    return mock.patch.object(os, "statvfs", return_value=made)


@pytest.mark.parametrize(
    ("total", "needed", "state"),
    [(64 << 20, 0, "problem"), (512 << 20, 0, "note"), (8 << 30, 0, "ok"), (8 << 30, 9 << 30, "problem"),
     (64 << 20, 1 << 20, "ok")],
)  # fmt: skip
def test_shared_memory(tmp_path: Path, total: int, needed: int, state: str) -> None:
    with space(total, total):
        found = one(host.shared_memory(needed, tmp_path), "shared memory")
    assert found.state == state
    assert found.values["total_bytes"] == total
    assert state == "ok" or "--shm-size" in found.remedy


def test_what_killed_runs_left_in_shared_memory(tmp_path: Path) -> None:
    with (tmp_path / "torch_1_2_3").open("wb") as file:
        file.truncate(2 << 30)
    with space(8 << 30, 8 << 30):
        found = one(host.shared_memory(0, tmp_path), "left in memory")
    assert found.state == "note"
    assert "1 files of 2.15 GB" in found.found


def test_limits() -> None:
    low = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_NPROC: 512, resource.RLIMIT_MEMLOCK: 1 << 16}
    high = dict.fromkeys(low, resource.RLIM_INFINITY)
    states = {found.name: found.state for found in host.limits(True, low)}
    assert states == {"open files": "note", "processes": "note", "locked memory": "problem"}
    assert one(host.limits(False, low), "locked memory").state == "ok"  # nothing locks it without InfiniBand
    with mock.patch.object(host, "_limit", return_value=None):
        assert {found.state for found in host.limits(True, high)} == {"ok"}
    with mock.patch.object(host, "_limit", return_value=100):  # of the control group
        assert "100 processes" in one(host.limits(True, high), "processes").found


def test_a_build_lock_that_was_left_behind(tmp_path: Path) -> None:
    assert one(host.build_locks([tmp_path, tmp_path / "absent"]), "build locks").found == "none"
    lock = tmp_path / "py311_cpu" / "shm comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert one(host.build_locks([tmp_path]), "build lock").state == "note"
    found = one(host.build_locks([tmp_path], now=time.time() + 3600), "build lock")
    assert found.state == "problem"
    assert found.remedy == f"rm '{lock}'"
    assert "60 minutes old" in found.found


@pytest.mark.parametrize(
    ("free", "needed", "files", "state"),
    [(10**11, 0, 10**6, "ok"), (5 * 10**9, 0, 10**6, "note"), (10**8, 0, 10**6, "problem"),
     (10**11, 2 * 10**11, 10**6, "problem"), (5 * 10**9, 2 * 10**9, 10**6, "ok"), (10**11, 0, 3, "problem")],
)  # fmt: skip
def test_disk(tmp_path: Path, free: int, needed: int, files: int, state: str) -> None:
    with space(10**12, free, files):
        found = one(host.disk("disk", tmp_path / "not" / "yet", needed, "checkpoints to come"), "disk")
    assert found.state == state
    assert found.values["path"] == str(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert {found.state for found in host.writable(tmp_path / "run")} == {"ok"}
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind
    with mock.patch.object(host.tempfile, "NamedTemporaryFile", side_effect=PermissionError(13, "Permission denied")):
        (found,) = host.writable(tmp_path / "run")
    assert found.state == "problem"
    assert f"{tmp_path} cannot be written (Permission denied)" in found.found


def test_a_file_server_with_another_clock(tmp_path: Path) -> None:
    found = one(host.writable(tmp_path, now=time.time() - 90), "clock")
    assert found.state == "problem"
    assert "90.0 s ahead of this host's" in found.found
    assert "chrony" in found.remedy


def test_more_threads_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    with mock.patch.object(host, "_quota", return_value=None):
        assert one(host.cores(0, 4), "cores").state == "ok"
        found = one(host.cores(cores, 2), "cores")
    assert found.state == "note"
    assert f"OMP_NUM_THREADS={max(1, cores // 2)}" in found.remedy


def test_memory_that_the_plan_does_not_find() -> None:
    assert one(host.memory(), "memory").state == "ok"
    found = one(host.memory(10**15, 2), "memory")
    assert found.state == "problem"
    assert "for each of 2 ranks" in found.found
