"""Runs cases and counts what came of them: a clean error, the same meaning, another valid file, or anything else."""

import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from diffmoe_ep.config import UserError
from fuzz import mutate
from fuzz.subjects import Files, Subject

SECONDS = 20.0  # for one case; most take milliseconds
MEMORY = 2 << 30  # bytes of address space that a case may take beside what the process has
LONGEST = 20_000  # characters of a message
OUTCOMES = ("clean error", "same meaning", "another valid file", "anything else")


class Hang(BaseException):
    """A case that took too long; no loader catches it."""


@dataclass
class Count:
    """What came of the cases of one subject."""

    name: str
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    faults: list[str] = field(default_factory=list)
    """Of each case that ended in anything else: its number, and how."""


def count(subject: Subject, cases: range, seed: int = 0) -> Count:
    """Run the cases of these numbers; a case is the same whichever run before it."""
    counted = Count(subject.name)
    with tempfile.TemporaryDirectory() as place:
        original = _read(subject, subject.files, Path(place) / "case")
        for number in cases:
            drawn = random.Random(f"{seed} {subject.name} {number}")
            outcome, told = _outcome(subject, drawn, Path(place) / "case", original)
            counted.outcomes[outcome] += 1
            if outcome == "anything else":
                counted.faults.append(f"{subject.name}, seed {seed}, case {number}: {told}")
    return counted


def _outcome(subject: Subject, drawn: random.Random, place: Path, original: object) -> tuple[str, str]:
    files, name = dict(subject.files), drawn.choice(subject.changed)
    replaced = drawn.random() < 0.05
    if not replaced:
        aims = subject.aims.get(name)
        if aims and drawn.random() < 0.5:
            files[name] = mutate.inside(drawn, files[name], *drawn.choice(aims))
        else:
            files[name] = mutate.content(drawn, files[name])
        if subject.sign is not None and not name.endswith("SHA256SUMS") and drawn.random() < 0.8:
            subject.sign(files)
    try:
        with _limits():
            found = _read(subject, files, place, drawn if replaced else None, name)
            same = found == original
            if same or subject.valid(found):
                return ("same meaning" if same else "another valid file"), ""
            return "anything else", f"{name} reads as what the format does not allow: {str(found)[:200]}"
    except UserError as error:
        text = str(error)
        if 0 < len(text) < LONGEST:
            return "clean error", ""
        return "anything else", f"{name}: a message of {len(text)} characters"
    except (Exception, Hang):
        return "anything else", f"{name}: {traceback.format_exc()}"


def _read(
    subject: Subject, files: Files, place: Path, drawn: random.Random | None = None, replaced: str = ""
) -> object:
    shutil.rmtree(place, ignore_errors=True)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    if drawn is not None:
        mutate.replace(drawn, place / replaced)
    return subject.read(place)


@contextmanager
def _limits() -> Iterator[None]:
    """Within: an alarm after `SECONDS`, and no more than `MEMORY` beside what is there."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS:g} s")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # pytest's own, where it is that which runs this
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
