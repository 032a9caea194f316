"""A trace holds the steps that were asked for, on each rank, and costs no run."""

import gzip
import json
from pathlib import Path

import pytest

from diffmoe_ep.config import Config, ConfigError, from_tree
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.metrics import Clock
from diffmoe_ep.train.step_trace import StepTrace
from ranks import run
from train.runs import config


def steps_of(path: Path) -> set[str]:
    """Names of the steps in a trace, whose operations lie inside them."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("step ") and event.get("ph") == "X"]
    ends = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    products = [event["ts"] for event in events if event.get("name") in ("aten::addmm", "aten::mm")]
    assert products
    for start, end in ends:
        assert any(start <= place <= end for place in products)
    return {event["name"] for event in steps}


def goes_on(rank: int, given: Config) -> None:
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    training.Trainer(given, mesh, dataset, checkpoint).run()


@pytest.mark.slow
def test_each_rank_traces_the_steps_and_no_other(digits: Path, tmp_path: Path) -> None:
    given = config(digits / "train", tmp_path / "run", "train.steps=4", "log.profile=[2,3]")
    run(2, goes_on, given)
    found = sorted((tmp_path / "run/profile").iterdir())
    assert [path.name for path in found] == ["rank-00000.json.gz", "rank-00001.json.gz"]
    assert [steps_of(path) for path in found] == [{"step 2", "step 3"}] * 2


@pytest.mark.slow
def test_a_run_that_resumes_within_them_traces_the_rest_and_one_that_is_past_none(digits: Path, tmp_path: Path) -> None:
    data, folder = digits / "train", tmp_path / "run"
    run(1, goes_on, config(data, folder, "train.steps=2"))
    run(1, goes_on, config(data, folder, "train.steps=4", "log.profile=[2,3]"))
    assert steps_of(folder / "profile/rank-00000.json.gz") == {"step 3"}
    (folder / "profile/rank-00000.json.gz").unlink()
    run(1, goes_on, config(data, folder, "train.steps=5", "log.profile=[2,3]"))
    assert list((folder / "profile").iterdir()) == []


def test_a_trace_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("no folder")
    trace = StepTrace((1, 1), tmp_path, Mesh(), Clock(0))
    with trace.step(1):
        pass
    told = capsys.readouterr().err
    assert f"the trace {tmp_path}/profile/rank-00000.json.gz could not be written" in told


@pytest.mark.parametrize("steps", ["[0,3]", "[5,4]", "[10,21]", "[1]"])
def test_steps_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"log\.profile"):
        from_tree({}, ["train.steps=20", f"log.profile={steps}"])


def test_too_many_steps_are_refused() -> None:
    from_tree({}, ["log.profile=[11,110]"])
    with pytest.raises(ConfigError, match=r"log\.profile is \[11, 111\]; .* at most 100 steps from 1 to train\.steps"):
        from_tree({}, ["log.profile=[11,111]"])
