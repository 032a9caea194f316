"""How a run ends before its last step, and saves by the clock: what a rank is told becomes what all ranks do.

Signals and the clock reach ranks at different moments, and a checkpoint is written by all ranks after the same step. So
the ranks agree at the end of each: the largest of their wishes holds. That is one number over gloo, a tenth of a
millisecond; it waits for no device, and every rank has come as far when it has it, so none can be a step ahead. (A key
in the launcher's store would save the round, but a rank may have looked just before it was set.)
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from diffmoe_ep.config import CheckpointConfig
from diffmoe_ep.parallel.collectives import largest
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.processes import SIGNALS

TRY_AGAIN = 75  # exit code of a run that was told to stop: EX_TEMPFAIL of sysexits.h
ECHO_SECONDS = 3.0  # launchers pass one Ctrl-C on several times: what comes so soon is no second one
END = b"\0"  # to the thread; no signal has this number
NOTHING, SAVE, STOP = range(3)  # what a rank can wish


class Stopping:
    """Listens, while it is entered, for SIGINT, SIGTERM and SIGUSR1, and for the clock.

    The first signal stops the run after the step in hand; a second one ends this process at once with TRY_AGAIN, and so
    does the time, `checkpoint.grace_seconds` after the first. Handlers do no more than note a signal. A thread does the
    rest, which hears of signals even while the main thread waits inside a collective and no handler can run.
    """

    def __init__(self, config: CheckpointConfig, mesh: Mesh, step: int) -> None:
        """step: that of the newest checkpoint; 0 if there is none."""
        self.config, self.mesh = config, mesh
        self.told = False  # whether this rank got a signal
        self.stops = False  # whether the ranks have agreed to stop
        self.last_step, self.last_time = step, time.monotonic()  # of the newest complete one; of when one was taken
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that Python lets handle signals
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def agree(self, failed: bool = False) -> bool:
        """Whether a checkpoint is due whatever the step: because all stop, by the first rank's clock, or because the
        one before has failed on a rank, which all hear when they save; collective, once after each step.
        """
        clock = self.mesh.is_first and 0 < 60 * self.config.minutes <= time.monotonic() - self.last_time
        wish = largest(STOP if self.told else SAVE if clock or failed else NOTHING, self.mesh.control)
        self.stops = wish == STOP
        return wish != NOTHING

    def saves(self) -> None:
        """Note that a checkpoint is taken now."""
        self.last_time = time.monotonic()

    def saved(self, step: int) -> None:
        """Note that the checkpoint of this step is complete."""
        self.last_step = step

    def part(self, step: int, steps: int, folder: Path) -> None:
        """Say where a stopped run stands, and leave no rank before it is said: launchers end all once one has left;
        collective.
        """
        if self.mesh.is_first:
            text = (
                f"{folder} stopped at step {step} of {steps}, as it was told, and is saved in "
                f"{folder}/checkpoints/step-{step:07d}; to go on, run the same command again"
            )
            with contextlib.suppress(OSError):  # nobody may be reading any more
                print(text, file=sys.stderr, flush=True)
        largest(NOTHING, self.mesh.control)

    def _listen(self) -> None:
        """Handle signals and start the thread; all is undone in reverse."""
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        thread = threading.Thread(target=self._watch, args=(reads,), name="signals", daemon=True)
        self._restore.callback(os.close, reads)
        self._restore.callback(os.close, writes)
        self._restore.callback(thread.join)
        self._restore.callback(os.write, writes, END)  # not by closing it: data workers have inherited it
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writes, warn_on_full_buffer=False))
        thread.start()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as that of a script's background job
                before = signal.signal(number, self._note)
                self._restore.callback(signal.signal, number, signal.SIG_DFL if before is None else before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.told = True

    def _watch(self, reads: int) -> None:
        """Hear of signals as they come, each a byte, and end this process when its time is over."""
        first: float | None = None
        grace = self.config.grace_seconds
        while True:
            left = None if first is None else max(0.0, first + grace - time.monotonic())
            if not select.select([reads], [], [], left)[0]:
                self._end(f"is not out {grace:g} s after a signal (checkpoint.grace_seconds) and leaves now")
            numbers = os.read(reads, 1024)
            if END in numbers:
                return
            if not set(SIGNALS) & set(numbers):
                continue
            if first is None:
                first, self.told = time.monotonic(), True
            elif time.monotonic() - first >= ECHO_SECONDS:
                self._end("is told again and leaves at once")

    def _end(self, why: str) -> NoReturn:
        """End this process as it stands; its data workers follow."""
        last = f"the last checkpoint is step {self.last_step}" if self.last_step else "there is no checkpoint yet"
        with contextlib.suppress(OSError):
            os.write(2, f"rank {self.mesh.rank} {why}; {last}\n".encode())
        os._exit(TRY_AGAIN)


def leave() -> NoReturn:
    """End this process for a scheduler to start it again; deaf to what launchers send to ranks that are not the first
    to leave.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(TRY_AGAIN)
