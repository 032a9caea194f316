"""What is seen of a run from outside: lines as they come, whole ones alone; who has it, and what happened."""

import json
import math
import os
import platform
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffmoe_ep.config import ConfigError, dump, from_tree
from diffmoe_ep.train import run_view
from diffmoe_ep.train.run_lock import LOCK, SINCE, Holder
from diffmoe_ep.train.run_view import RunView


def line(step: int, **more: Any) -> str:
    """A line of metrics.jsonl."""
    known = {
        "step": step, "loss": 1 / step, "grad_norm": 0.5, "seconds": 10.0 * step, "bad_samples": 0,
        "samples_per_second": 100.0, "time": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    return json.dumps(known | more) + "\n"


def folder(path: Path, *lines: str, steps: int = 100) -> Path:
    """The folder of a run that has logged these lines."""
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(dump(from_tree({"train": {"steps": steps}})))
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def append(path: Path, text: str | bytes) -> None:
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def test_only_whole_lines_are_read_and_none_twice(tmp_path: Path) -> None:
    run = folder(tmp_path, line(1), line(2), line(3)[:20])
    view = RunView(run)
    assert (view.steps, view.step) == ([1, 2], 2)
    append(run, line(3)[20:] + line(4))
    view.look()
    view.look()
    assert view.steps == [1, 2, 3, 4]
    assert view.curves["loss"] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert (view.at(2), view.at(3), view.at(0)) == (1 / 2, 1 / 3, None)


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    run = folder(tmp_path, line(1))
    append(run, b'\xff\xfe\n{"step": "2"}\n[1]\n7\n{"step": 2, "loss": "high"}\n\n' + line(3).encode())
    view = RunView(run)
    assert view.steps == [1, 2, 3]
    assert math.isnan(view.curves["loss"][1])


def test_a_file_that_a_resume_has_cut_is_read_anew(tmp_path: Path) -> None:
    run = folder(tmp_path, *map(line, range(1, 6)))
    view = RunView(run)
    aside = run / "aside"
    aside.write_text(line(1) + line(2) + line(3, loss=9.0) + line(4) + line(5) + line(6))
    aside.replace(run / "metrics.jsonl")
    view.look()
    assert view.steps == [1, 2, 3, 4, 5, 6]
    assert view.at(3) == 9.0
    (run / "metrics.jsonl").unlink()
    view.look()
    assert (view.steps, view.age, view.state.word) == ([], None, "has not begun")


def test_what_happened_is_told_by_step(tmp_path: Path) -> None:
    run = folder(
        tmp_path, line(1), line(2, bad_samples=2, passed_over=1), line(3, bad_samples=2, passed_over=1),
        line(4, seconds=1.0, bad_samples=1, passed_over=1), line(5, seconds=2.0, loss=math.nan, bad_samples=1),
    )  # fmt: skip
    change = {"key": "train.optimizer.lr", "step": 3, "was": 1e-3, "now": 1e-4}
    (run / "recipe.jsonl").write_text(json.dumps(change) + "\n{half")
    assert RunView(run).events() == [
        (2, "2 bad samples were replaced"),
        (2, "1 step was passed over"),
        (3, "went on from a checkpoint"),
        (3, "train.optimizer.lr: 0.001 until here, then 0.0001"),
        (4, "1 bad sample was replaced"),
        (5, "loss is nan"),
    ]


def test_a_folder_of_no_run_is_refused_and_one_that_begins_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.yaml, so it is no run of diffmoe train; name run folders"):
        RunView(tmp_path)
    (tmp_path / LOCK).write_text("")
    assert RunView(tmp_path).state.word == "has not begun"


def held(**told: Any) -> Any:
    known = {
        "process": 7, "host": platform.node(), "since": time.strftime(SINCE, time.localtime(time.time() - 3600)),
        "is_here": True, "is_alive": True, "heard_of": 2.0,
    }  # fmt: skip
    return mock.patch.object(run_view, "holder", return_value=Holder(**(known | told)))


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def test_a_state_says_who_has_the_run_and_what_to_do(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", line(1), line(2))
    assert (RunView(run).state.word, RunView(run).state.more) == (
        "has stopped",
        "the same command goes on from the start",
    )
    with held():
        assert RunView(run).state.word == "trains"
        assert RunView(run).state.more.startswith(f"process 7 on {platform.node()} since ")
    with held(is_alive=False):
        state = RunView(run).state
        assert (state.word, state.is_bad) == ("died", True)
        assert state.more == f"process 7 on {platform.node()} is gone; the same command goes on from the start"
    with held(is_alive=False, is_here=False, host="other", heard_of=99.0):
        assert RunView(run).state.more.startswith("process 7 on other was last heard of 99 s ago; ")
    append(run, line(100))
    assert RunView(run).state.word == "is finished"


def test_a_run_without_a_line_for_long_is_quiet_by_its_own_pace(tmp_path: Path) -> None:
    slow = folder(tmp_path / "slow", line(1, seconds=100.0), line(2, seconds=500.0, time=ago(1500)))
    quick = folder(tmp_path / "quick", line(1, seconds=1.0), line(2, seconds=2.0, time=ago(70)))
    with held():
        assert RunView(slow).state.word == "trains"
        assert RunView(quick).state.word == "is quiet"
    with held(since=time.strftime(SINCE)):  # has just gone on, and builds its model
        assert RunView(quick).state.word == "starts"


def test_lines_without_a_time_are_as_old_as_their_file(tmp_path: Path) -> None:
    run = folder(tmp_path, line(1, time=None))
    os.utime(run / "metrics.jsonl", (time.time() - 500,) * 2)
    age = RunView(run).age
    assert age is not None and 499 < age < 600
