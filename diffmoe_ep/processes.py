"""Which processes end together: launchers, the ranks that they started, and the ranks' data workers.

Nothing but Linux's /proc tells who started whom; elsewhere no launcher is known and nothing here has an effect.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what tells a run to stop
LAUNCHER = re.compile(
    r"torch\.distributed\.(run|launch)|deepspeed\.launcher\.(runner|launch)|(.*/)?(torchrun|deepspeed|ds)"
)
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Process:
    """A process that ran when it was looked at."""

    pid: int
    started: int  # clock ticks since boot: tells it from a later process of the same number
    parent: int = field(compare=False)

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process with this number, if it runs; one that has ended and waits to be noticed does not."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in ("Z", "X") else cls(pid, int(fields[19]), int(fields[1]))

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self

    @property
    def is_launcher(self) -> bool:
        """Whether its command line is that of torchrun or deepspeed (runner, or launch on each host)."""
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return False
        return any(map(LAUNCHER.fullmatch, words[:6]))


@functools.cache
def launchers() -> tuple[Process, ...]:
    """The launcher that started this process and those that started it, nearest first; as of the first call."""
    found: list[Process] = []
    process = Process.of(os.getppid())
    while process is not None and process.is_launcher:
        found.append(process)
        process = Process.of(process.parent)
    return tuple(found)


def follow_launchers() -> None:
    """Let this process get a SIGTERM soon after one of its launchers is gone, SIGKILL included.

    By looking once a second: the kernel's own notice (PR_SET_PDEATHSIG) is of a parent only, and under deepspeed what a
    user or a scheduler ends is the parent's parent.
    """
    if not launchers():
        return

    def look() -> None:
        while all(launcher.is_alive for launcher in launchers()):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="launchers", daemon=True).start()


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Be deaf, in the main thread, to what launchers send to all ranks once one has ended: this one ends by itself, and
    has something to say before.
    """
    with contextlib.ExitStack() as restore:
        if threading.current_thread() is threading.main_thread():  # the only one that Python lets handle signals
            for number in SIGNALS:
                before = signal.signal(number, signal.SIG_IGN)
                restore.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
        yield


def serve(parent: int) -> None:
    """Make this process, just started, its parent's alone: it ends soon after the parent, or when the parent says so;
    what others tell it is the parent's business.

    Launchers and schedulers signal every process of a run: workers that ended at once would fail a rank which still has
    a step to finish.
    """
    signal.set_wakeup_fd(-1)  # the parent's
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the thread below, which learns who has sent one

    def listen() -> None:
        process, told = Process.of(parent), None
        while process is not None and process.is_alive:
            if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == parent:
                break
            told = signal.sigtimedwait(SIGNALS, POLL_SECONDS)
        os._exit(0)

    threading.Thread(target=listen, name="parent", daemon=True).start()
