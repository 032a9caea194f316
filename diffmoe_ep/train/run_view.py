"""A run as its folder tells it to somebody who looks on, while it trains or afterwards; nothing is written there."""

import json
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from diffmoe_ep.checkpoint.store import latest
from diffmoe_ep.config import Config, ConfigError, load_stored
from diffmoe_ep.train.run_folder import RunFolder
from diffmoe_ep.train.run_lock import LOCK, holder

KEPT = ("loss", "grad_norm", "samples_per_second")  # whose curves are shown
QUIET_SECONDS = 60.0  # without a line, at least, until a run counts as quiet
MOST_EVENTS = 100  # that are kept

Record = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class State:
    """How a run is."""

    word: str  # starts, trains, is quiet, is finished, has stopped, died
    more: str = ""  # who, and what to do

    @property
    def is_bad(self) -> bool:
        """Whether somebody should look after it."""
        return self.word in ("died", "is quiet")


class RunView:
    """What is known of a run; `look` again for what is new."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a folder that is no run's."""
        self.folder = RunFolder(path)
        if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", LOCK)):
            raise ConfigError(f"{path} has no config.yaml, so it is no run of diffmoe train; name run folders")
        self.config: Config | None = None
        self.config_read: float | None = None  # when the file was written that was read
        self.checkpoint: Path | None = None
        self._forget(None)
        self.look()

    def look(self) -> None:
        """Read what has come since."""
        file = self.folder.path / "config.yaml"
        if file.is_file() and file.stat().st_mtime != self.config_read:
            self.config_read = file.stat().st_mtime
            self.config = load_stored(file)
        self._read_metrics()
        self.holder = holder(self.folder.path)
        with suppress(OSError):  # one is just being replaced
            self.checkpoint = latest(self.folder.checkpoints)

    # -- what is seen --------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        return None if self.config is None else self.config.train.steps

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return self.steps[-1] if self.steps else 0

    @property
    def age(self) -> float | None:
        """Seconds since the last line."""
        if not self.steps:
            return None
        try:
            written = datetime.fromisoformat(self.last["time"]).timestamp()
        except (KeyError, TypeError, ValueError):  # a line of before there were times
            written = self.written
        return max(0.0, time.time() - written)

    @property
    def state(self) -> State:
        """How the run is."""
        finished = self.total is not None and self.step >= self.total
        again = f"the same command goes on from {self.checkpoint.name if self.checkpoint else 'the start'}"
        if self.holder is None:
            if finished:
                return State("is finished")
            return State("has stopped", again) if self.steps else State("has not begun", again)
        who = f"process {self.holder.process} on {self.holder.host}"
        if not self.holder.is_alive:
            gone = "is gone" if self.holder.is_here else f"was last heard of {self.holder.heard_of:.0f} s ago"
            return State("died", f"{who} {gone}; {again}")
        if self.age is None or self.age > self.holder.held:
            return State("starts", f"{who} since {self.holder.since}")
        usual = max(self.gaps[-10:], default=0.0)
        if self.age > max(QUIET_SECONDS, 5 * usual):
            return State("is quiet", f"{who}; a line took {usual:.0f} s before")
        return State("trains", f"{who} since {self.holder.since}")

    def events(self) -> list[tuple[int, str]]:
        """What happened, by step: changes of the recipe, restarts, samples replaced, numbers that are not finite."""
        changes = []
        for line in _objects(self.folder.recipe):
            key, step, was, now = (line.get(name) for name in ("key", "step", "was", "now"))
            if isinstance(step, int):
                changes.append((step, f"{key}: {json.dumps(was)} until here, then {json.dumps(now)}"))
        return sorted([*self.happened, *changes], key=lambda event: event[0])

    def at(self, step: int) -> float | None:
        """The loss as it was last logged up to a step."""
        found = [loss for place, loss in zip(self.steps, self.curves["loss"], strict=True) if place <= step]
        return found[-1] if found else None

    # -- metrics.jsonl -------------------------------------------------------------------------------------------------

    def _read_metrics(self) -> None:
        """Read the whole lines that were appended; all anew where a resume has cut the file."""
        try:
            file = self.folder.metrics.open("rb")
        except OSError:
            self._forget(None)
            return
        with file:
            seen = os.fstat(file.fileno())
            if self.inode != seen.st_ino or seen.st_size < self.read_to:
                self._forget(seen.st_ino)
            self.written = seen.st_mtime
            file.seek(self.read_to)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be half written
        self.read_to += len(whole)
        for line in whole.splitlines():
            record = _parsed(line)
            if record is not None and isinstance(record.get("step"), int):
                self._take(record)

    def _forget(self, inode: int | None) -> None:
        self.inode, self.read_to, self.written = inode, 0, 0.0  # which file is read, up to where, when it was written
        self.steps: list[int] = []
        self.curves: dict[str, list[float]] = {key: [] for key in KEPT}
        self.gaps: list[float] = []  # seconds from line to line
        self.happened: list[tuple[int, str]] = []
        self.last: Record = {}

    def _take(self, record: Record) -> None:
        step = record["step"]
        self._note(step, record)
        while self.steps and self.steps[-1] >= step:  # logged again after a resume
            self.steps.pop()
            for values in self.curves.values():
                values.pop()
        self.steps.append(step)
        for key, values in self.curves.items():
            values.append(number(record, key))
        self.last = record

    def _note(self, step: int, record: Record) -> None:
        """Keep what is told of in `events`."""
        before, now = number(self.last, "seconds"), number(record, "seconds")
        if now < before:
            self.happened.append((self.step, "went on from a checkpoint"))
        elif now > before:
            self.gaps.append(now - before)
        replaced = _more(record, {} if now < before else self.last, "bad_samples")  # counted since the run (re)started
        if replaced:
            self.happened.append((step, f"{replaced} bad sample{' was' if replaced == 1 else 's were'} replaced"))
        if passed := _more(record, self.last, "passed_over"):  # counted over the whole run
            self.happened.append((step, f"{passed} step{' was' if passed == 1 else 's were'} passed over"))
        for key in ("loss", "grad_norm"):
            if key in record and not math.isfinite(number(record, key)):
                self.happened.append((step, f"{key} is {record[key]}"))
        del self.happened[:-MOST_EVENTS]


def _more(record: Record, before: Record, key: str) -> int:
    """By how much a count has grown."""
    now, last = number(record, key), number(before, key)
    grown = now - (0.0 if math.isnan(last) else last)
    return int(grown) if math.isfinite(grown) and grown > 0 else 0


def number(record: Record, key: str) -> float:
    """A number of a line; nan where it has none."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _objects(path: Path) -> list[Record]:
    """The lines of a file that are JSON objects."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [record for record in map(_parsed, lines) if record is not None]


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # half a line, or bytes of a broken disk
        return None
    return record if isinstance(record, dict) else None
