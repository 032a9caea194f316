"""One rank's own end is everyone's: a rank that stops for a reason of its own tells the others, and all leave with its
sentence and exit code.

While its peers wait for a rank that has stopped they wait inside a collective, and see no more than a closed connection
(gloo), or nothing until the timeout (NCCL). So what a rank has to say goes another way, through the store where the
ranks have met. A thread looks there once a second: it prints what it finds where its host has nobody else to say it,
and ends the process if the main thread cannot.

A process that ended without a word is found by calling the roll: the first rank that sees a collective fail calls, the
threads answer, and who does not is gone.
"""

import json
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from diffmoe_ep.config import UserError
from diffmoe_ep.parallel.collectives import gather_objects, largest
from diffmoe_ep.parallel.joining import in_time, ranks
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.processes import deaf

POLL_SECONDS = 1.0
HEARD_SECONDS = (
    10.0  # what the others get to hear of an end before its rank leaves; launchers end all once one has left
)
ROLL_SECONDS = 8.0  # what ranks get to answer
ANSWER_SECONDS = 5.0  # what the store gets to answer; behind a cut link it never does
LINGER_SECONDS = 30.0  # what the main thread gets to leave by itself; more than all of the above
AGAIN = "Start again: a training goes on from its last checkpoint"
PACKAGE = Path(__file__).parents[1]
COLLECTIVE = re.compile(r"gloo|nccl|ProcessGroup", re.IGNORECASE)  # in the errors of failed collectives


@dataclass(frozen=True)
class End:
    """Why all ranks end."""

    sentence: str
    exit_code: int
    teller: int
    """The rank that tells it on its host; on another host the first rank there does."""


class PeersEnd(UserError):
    """Another rank ended, and this one with it."""

    def __init__(self, end: End, said: bool) -> None:
        super().__init__(end.sentence)
        self.exit_code, self.said, self.named = end.exit_code, said, True


class CommonEnd:
    """`with CommonEnd(mesh):` whatever ends one rank in it ends all; collective at its beginning and at its good end.

    What this rank raises leaves as it came, after the others have heard of it. What it raises because another rank
    ended is replaced by PeersEnd, with that rank's sentence and exit code.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._store: dist.Store | None = None
        if mesh.store is not None:  # a connection of its own, for a store serves one call at a time
            self._store = mesh.store.clone()  # type: ignore[attr-defined]  # torch's stubs do not know it
        self._main = threading.get_ident()
        self._place = ""  # where the main thread was when it failed
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self._gone = 0  # ranks that cannot hear
        self._hearing = threading.Lock()
        self._heard: End | None = None  # by the thread or by the main one
        self._answered = False

    def __enter__(self) -> Self:
        self.hosts = gather_objects(self.mesh.host, self.mesh.world)
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="common end", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                error = self._part()
            if error is None or self._store is None:
                return
            self._place = _place(traceback.extract_tb(error.__traceback__))
            mine = None if _is_collectives(error) else self._mine(error)
            with deaf():
                end = self._settle(mine)
            if mine is None or (end != mine and isinstance(error, Exception) and not _everywhere(error)):
                raise PeersEnd(end, said=end.teller != self.mesh.rank) from error
        finally:
            self._left.set()
            if self._thread is not None:  # an interpreter that ends while a thread is in the store aborts
                self._thread.join(ANSWER_SECONDS)

    # -- ending --------------------------------------------------------------------------------------------------------

    def _part(self) -> BaseException | None:
        """Let no rank leave before all are done, for one that serves the store would seem lost; what failed, if any."""
        try:
            largest(0, self.mesh.control)
        except RuntimeError as error:
            return error
        return None

    def _mine(self, error: BaseException) -> End:
        """What this rank has to say."""
        rank, host = self.mesh.rank, self.mesh.host
        if isinstance(error, UserError):
            sentence = str(error) if error.everywhere else f"rank {rank}: {error}"
            return End(sentence, error.exit_code, 0 if error.everywhere else rank)
        if isinstance(error, KeyboardInterrupt):
            return End(f"rank {rank} on {host} was interrupted", 130, rank)
        what = next(iter(str(error).splitlines()), "")
        sentence = f"rank {rank} on {host} ended with {type(error).__name__}: {what}; its own output has the traceback"
        return End(sentence, 1, rank)

    def _settle(self, mine: End | None) -> End:
        """Find the end that holds for all, and let the others hear it; in bounded time, also where a link is cut and
        calls to the store do not return.
        """
        store = self._store
        assert store is not None

        def settle() -> End:
            end = self._heard or self._agree_on(mine)
            self._hear(end)
            self._await_heard()
            return end

        end = None
        try:
            if in_time(lambda: (store.check(["end"]),), time.monotonic() + ANSWER_SECONDS) is not None:
                end = in_time(settle, time.monotonic() + LINGER_SECONDS)
        except dist.DistError:
            pass  # it is gone, as where it does not answer
        return end or self._heard or mine or self._lost()

    def _agree_on(self, mine: End | None) -> End:
        """The end that holds for all: the first one that was told, or what the roll shows where none was."""
        assert self._store is not None
        try:
            if mine is not None:
                return self._tell(mine)
            if self._store.check(["end"]):
                return self._told()
            caller = int(self._store.compare_set("roll", "", str(self.mesh.rank)))
            deadline = time.monotonic() + ROLL_SECONDS * (1 if caller == self.mesh.rank else 2)
            answers = [f"here/{rank}" for rank in range(self.mesh.size)]
            while time.monotonic() < deadline:
                if self._store.check(["end"]):
                    return self._told()
                if caller == self.mesh.rank and self._store.check(answers):
                    break
                time.sleep(POLL_SECONDS / 10)
            return self._tell(End(self._called(), 1, self.mesh.rank))
        except dist.DistError:
            return mine or self._lost()

    def _called(self) -> str:
        """What the roll shows: who does not answer, or where all are."""
        assert self._store is not None
        here = [self._store.check([f"here/{rank}"]) for rank in range(self.mesh.size)]
        gone = [rank for rank, answered in enumerate(here) if not answered]
        self._gone = len(gone)
        if gone:
            hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in gone))
            return (
                f"{ranks(gone)} on {hosts} ended without a word: killed, for lack of memory perhaps, or its host is "
                f"down or cut off. See its output and the host's log (dmesg). {AGAIN}"
            )
        places: dict[str, list[int]] = {}
        for rank in range(self.mesh.size):
            places.setdefault(self._store.get(f"here/{rank}").decode(), []).append(rank)
        where = "; ".join(f"{ranks(numbers)} at {place}" for place, numbers in list(places.items())[:4])
        return (
            "the ranks lost each other, or one waited longer than parallel.timeout_minutes, and all still run: "
            f"{where}. {AGAIN}"
        )

    def _lost(self) -> End:
        """Where the store itself is gone: every rank sees it for itself, and one of each host tells it."""
        others = [rank for rank in range(1, self.mesh.size) if self.hosts[rank] == self.mesh.host]
        sentence = (
            f"rank 0 on {self.hosts[0]}, or the launcher, where the ranks had met, ended without a word or is cut "
            f"off. See its output and the host's log (dmesg). {AGAIN}"
        )
        return End(sentence, 1, others[0] if others else 0)

    def _tell(self, end: End) -> End:
        """Tell the others, unless somebody has told another end already, which then holds."""
        assert self._store is not None
        return End(**json.loads(self._store.compare_set("end", "", json.dumps(asdict(end)))))

    def _told(self) -> End:
        assert self._store is not None
        return End(**json.loads(self._store.get("end")))

    def _await_heard(self) -> None:
        """Wait until all ranks have heard, or a little."""
        assert self._store is not None
        deadline = time.monotonic() + HEARD_SECONDS
        try:
            while self._store.add("heard", 0) < self.mesh.size - self._gone and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 10)
        except dist.DistError:
            return  # nobody can hear any more

    # -- hearing -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Answer the roll and hear of an end; the main thread may be where nothing reaches it."""
        assert self._store is not None
        while not self._left.wait(POLL_SECONDS):
            try:
                if not self._store.check(["end"]):
                    self._answer()
                    continue
                end = self._told()
            except dist.DistError:
                if self._left.wait(HEARD_SECONDS):
                    return
                end = self._lost()
            self._hear(end)
            if not self._left.wait(LINGER_SECONDS):
                if end.teller == self.mesh.rank:
                    _say(end)
                os._exit(end.exit_code)
            return

    def _answer(self) -> None:
        assert self._store is not None
        if not self._answered and self._store.check(["roll"]):
            frame = sys._current_frames().get(self._main)
            place = self._place or (_place(traceback.extract_stack(frame)) if frame is not None else "its end")
            self._store.set(f"here/{self.mesh.rank}", place)
            self._answered = True

    def _hear(self, end: End) -> None:
        """Say it, once, where this host has no other to say it, and let the teller know."""
        assert self._store is not None
        with self._hearing:
            if self._heard is not None:
                return
            self._heard = end  # before the teller knows: it may leave then, and the store with it
            if self.mesh.host != self.hosts[end.teller] and self.mesh.rank == self.hosts.index(self.mesh.host):
                _say(end)
            try:
                self._store.add("heard", 1)
            except dist.DistError:
                return  # the teller has left


def _say(end: End) -> None:
    try:
        print(f"diffmoe: error: {end.sentence}", file=sys.stderr, flush=True)
    except OSError:
        return  # nobody reads any more


def _everywhere(error: BaseException) -> bool:
    return isinstance(error, UserError) and error.everywhere


def _is_collectives(error: BaseException | None) -> bool:
    """Whether an error comes from a collective that failed, and so from another rank."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and COLLECTIVE.search(str(error))):
            return True
        error = error.__cause__
    return False


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line of this package in a stack."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if PACKAGE in path.parents and path != Path(__file__):
            return f"{path.relative_to(PACKAGE)}:{frame.lineno} ({frame.name})"
    return "outside of the package"
