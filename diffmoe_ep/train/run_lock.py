"""One training in a run folder at a time: a lock, held by the first rank, that tells who holds it.

The lock is the operating system's (fcntl), so that it ends with its process, however that ends, and data workers do not
inherit it. Where hosts do not share such locks, as on some network disks, the file's time tells: its holder touches it
every few seconds.
"""

import fcntl
import json
import os
import platform
import struct
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffmoe_ep.config.foreign import parse_json
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.run_folder import RunFolder

LOCK = "lock.json"
SINCE = "%Y-%m-%d %H:%M:%S %z"
TOUCH_SECONDS = 5.0
STALE_SECONDS = 60.0  # a holder on another host that was not heard of for so long is gone


class RunLock:
    """`with RunLock(folder, mesh):` holds a run folder, which is made where it is missing; collective.

    Raises ConfigError, on every rank alike, where the folder cannot be written or another training holds it.
    """

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.folder, self.mesh = folder, mesh
        self.path = folder / LOCK
        self.descriptor: int | None = None
        self.released = threading.Event()

    def __enter__(self) -> Self:
        self.mesh.agree(RunFolder(self.folder).problem())
        problem = None
        if self.mesh.is_first:
            try:
                problem = self._acquire()
            except OSError as error:
                problem = f"{self.path} cannot be locked ({error.strerror}); give another folder with folder=..."
        self.mesh.agree(problem)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.descriptor is not None:
            self.released.set()
            self.thread.join()
            os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = None

    def _acquire(self) -> str | None:
        """Take the lock, or say who has it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            remedy = "wait for its end, stop it, or give this run another folder"
            problem: str | None = f"{_holder(descriptor)}; {remedy}"
        else:
            problem = _elsewhere(descriptor)
        if problem is not None:
            os.close(descriptor)
            return f"{self.folder} is in use: {problem}"
        mine = {"host": platform.node(), "process": os.getpid(), "since": time.strftime(SINCE)}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
        self.descriptor = descriptor
        self.thread = threading.Thread(target=self._touch, args=(descriptor,), name="run lock", daemon=True)
        self.thread.start()
        return None

    def _touch(self, descriptor: int) -> None:
        while not self.released.wait(TOUCH_SECONDS):
            os.utime(descriptor)


@dataclass(frozen=True)
class Holder:
    """Who has a run folder, or left it without freeing it."""

    process: int | str
    host: str
    since: str
    is_here: bool  # whether it is a process of this host
    is_alive: bool  # whether it holds the folder still
    heard_of: float  # seconds since its last sign of life

    @property
    def held(self) -> float:
        """Seconds since it took the folder; 0 where that is not known."""
        try:
            return max(0.0, time.time() - datetime.strptime(self.since, SINCE).timestamp())
        except ValueError:
            return 0.0


def holder(folder: Path) -> Holder | None:
    """Who has a run folder, as somebody sees who is not that process and takes no lock; None where nobody has it.

    Not for the holder itself: a process that closes the file frees its own lock.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        told, age = _read(descriptor), max(0.0, time.time() - os.fstat(descriptor).st_mtime)
        locked = _is_locked(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if not told:
        return None
    is_here = told.get("host") == platform.node()
    process, host, since = (told.get(key, "?") for key in ("process", "host", "since"))
    return Holder(process, str(host), str(since), is_here, locked or (not is_here and age <= STALE_SECONDS), age)


def _is_locked(descriptor: int) -> bool:
    """Whether another process has the lock of a file; asks, and takes none."""
    flock = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process
    asked = struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind: int = struct.unpack(flock, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK


def _elsewhere(descriptor: int) -> str | None:
    """Whether a process on another host, whose lock is not seen here, still gives signs of life."""
    age = time.time() - os.fstat(descriptor).st_mtime
    if _read(descriptor).get("host", platform.node()) == platform.node() or age > STALE_SECONDS:
        return None
    left = STALE_SECONDS - age
    return f"{_holder(descriptor)} and was heard of {age:.0f} s ago; if it is gone, start again in {left:.0f} s"


def _holder(descriptor: int) -> str:
    process, host, since = (_read(descriptor).get(key, "?") for key in ("process", "host", "since"))
    return f"process {process} on {host} has trained there since {since}"


def _read(descriptor: int) -> dict[str, Any]:
    """What a lock file says; nothing where it is empty or not ours."""
    try:
        content = parse_json(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
