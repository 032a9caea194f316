"""Whatever becomes of a file that a loader reads, it is a clean error, the same meaning or another that the format
allows; never a traceback, a hang or memory without bound. `python -m fuzz` runs more cases of the same.
"""

import time
from pathlib import Path

import pytest

from diffmoe_ep.config import ConfigError
from fuzz import count as counting
from fuzz.count import count
from fuzz.subjects import MAKERS, Subject, subjects

pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy`")


@pytest.fixture(scope="module")
def made() -> list[Subject]:
    return subjects()


@pytest.mark.parametrize("number", range(len(MAKERS)))
@pytest.mark.parametrize(
    "cases", [range(15), pytest.param(range(1000, 1250), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_damaged_file_is_refused_or_means_what_its_format_allows(
    made: list[Subject], number: int, cases: range
) -> None:
    counted = count(made[number], cases)
    assert counted.faults == []
    assert sum(counted.outcomes.values()) == len(cases)
    assert (counted.outcomes["clean error"] and counted.outcomes["clean error"] < len(cases)) or len(cases) < 100


def fails(folder: Path) -> bytes:
    raise KeyError("step")


def hangs(folder: Path) -> bytes:
    while (folder / "x").exists():
        time.sleep(0.01)
    return b""


def grows(folder: Path) -> bytes:
    return bytes(counting.MEMORY + (1 << 30))


def talks(folder: Path) -> bytes:
    raise ConfigError("no" * counting.LONGEST)


def lies(folder: Path) -> bytes:
    return b"another"


@pytest.mark.parametrize("planted", [fails, hangs, grows, talks, lies])
def test_each_planted_fault_is_counted(planted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> object:
        calls.append(folder)
        return b"sound" if len(calls) == 1 else planted(folder)  # type: ignore[operator]

    calls: list[Path] = []
    monkeypatch.setattr(counting, "SECONDS", 0.3)
    monkeypatch.setattr(counting.mutate, "replace", lambda drawn, path: None)
    counted = count(Subject("planted", {"x": b"sound"}, ("x",), read, lambda found: False), range(2))
    assert counted.outcomes["anything else"] == len(counted.faults) == 2


def test_a_case_is_the_same_whichever_run_before_it(made: list[Subject]) -> None:
    subject = next(subject for subject in made if subject.name == "prompts")
    all_at_once = count(subject, range(40)).outcomes
    parts = [count(subject, range(first, first + 20)).outcomes for first in (20, 0)]
    assert all_at_once == {name: sum(part[name] for part in parts) for name in all_at_once}
