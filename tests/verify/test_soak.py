"""A soak kills where it says, and sees what a run has lost."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.checkpoint import store
from diffmoe_ep.checkpoint.fragments import whole
from diffmoe_ep.checkpoint.housekeeping import verdict
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.config import Config, ConfigError, dump
from diffmoe_ep.verify import soak as soaking
from diffmoe_ep.verify.soak import FAULTS, Shape, Soaked, draw, shapes, soak
from train.runs import config

ROOT = Path(__file__).parents[2]
ALL = [Shape(1, 1, 0), Shape(2, 1, 1), Shape(2, 2, 2)]


@pytest.mark.parametrize("kills", [3, 10, 30])
def test_kills_are_drawn_as_promised(kills: int) -> None:
    drawn = draw(kills, 200, ALL, 5)
    steps = [kill.step for kill in drawn]
    assert steps == sorted(set(steps)) and len(steps) == kills and steps[0] > 0 and steps[-1] < 200
    assert sum(kill.place is not None for kill in drawn) == kills // 3
    assert sum(kill.fault is not None for kill in drawn) == max(1, kills // 5)
    before = [ALL[0], *(kill.shape for kill in drawn)]
    assert all(kill.shape != other for kill, other in zip(drawn, before, strict=False))
    assert drawn == draw(kills, 200, ALL, 5) != draw(kills, 200, ALL, 6)


def test_shapes_are_those_that_fit() -> None:
    given = config(Path("data"), Path("run"))  # batch 24, 8 experts
    assert shapes(given, 1) == [Shape(1, 1, zero) for zero in (0, 1, 2)]
    assert Shape(2, 2, 0) in shapes(given, 4) and Shape(4, 2, 1) in shapes(given, 4)
    assert {shape.expert for shape in shapes(given, 3) if shape.ranks == 3} == {1}  # 8 experts do not part into 3


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(4))
def test_damage_meets_the_newest_of_two_sound_ones(tmp_path: Path, fault: str, seed: int) -> None:
    rng = random.Random(seed)
    first = save(tmp_path, 1, [whole("x", torch.ones(9))], {})
    assert soaking._damage(tmp_path, fault, rng) == ""  # it is the only one
    second = save(tmp_path, 2, [whole("x", torch.ones(9))], {})
    assert soaking._damage(tmp_path, None, rng) == ""
    assert soaking._damage(tmp_path, fault, rng).startswith(", step-0000002/")
    assert verdict(second).problems and not verdict(first).problems
    assert soaking._damage(tmp_path, fault, rng) == ""


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Config, Config, list[dict[str, Any]]]:
    """An uncut run of ten steps of 24 samples, another place, and what its metrics would be if it were the same."""
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 11)]
    uncut, other = (config(tmp_path, tmp_path / name) for name in ("uncut", "other"))
    for run in (uncut, other):
        Path(run.folder).mkdir()
    write(uncut, lines)
    return uncut, other, lines


def write(run: Config, lines: list[dict[str, Any]]) -> None:
    (Path(run.folder) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compared(uncut: Config, other: Config, lines: list[dict[str, Any]]) -> Soaked:
    write(other, lines)
    result = Soaked(steps=10, allowed=1e-4)
    soaking._compare(uncut, other, result)
    return result


def test_what_a_run_has_lost_is_seen(two_runs: tuple[Config, Config, list[dict[str, Any]]]) -> None:
    uncut, other, lines = two_runs
    assert compared(uncut, other, lines).passed
    lost = compared(uncut, other, lines[:4] + lines[6:])
    assert (lost.lost, lost.repeated, lost.passed) == (48, 0, False)
    repeated = compared(uncut, other, lines[:4] + lines[3:])
    assert (repeated.lost, repeated.repeated, repeated.passed) == (0, 24, False)
    changed = compared(uncut, other, [*lines[:6], {"step": 7, "loss": 1 / 7 + 0.01}, *lines[7:]])
    assert (changed.largest, changed.largest_step, changed.passed) == (pytest.approx(0.01), 7, False)
    unnoticed = Soaked(steps=10, allowed=1e-4)
    unnoticed.damaged["flipped"] = 1  # and nothing was set aside
    assert not unnoticed.passed


@pytest.mark.parametrize(
    ("setting", "kills", "said"),
    [
        ([], 0, "--kills is 0; it must be at least 1 and less than 17"),
        ([], 17, "--kills is 17; it must be at least 1 and less than 17"),
        (["checkpoint.every=8"], 3, "a checkpoint every 8 of 20 steps: set checkpoint.every=2"),
    ],
)
def test_what_cannot_be_soaked_is_refused(tmp_path: Path, setting: list[str], kills: int, said: str) -> None:
    given = config(tmp_path, tmp_path / "run", "checkpoint.every=1", *setting)
    with pytest.raises(ConfigError, match=said):
        soak(given, tmp_path, kills, ALL[:1], 0, 1e-4, print)
    assert not (tmp_path / "uncut").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", [[], ["--one-shape"]], ids=["shapes", "one shape"])
def test_a_run_that_is_killed_three_times_is_the_uncut_one(digits: Path, tmp_path: Path, shape: list[str]) -> None:
    file = tmp_path / "config.yaml"
    settings = ["train.steps=40", "checkpoint.every=4", "train.optimizer.lr=1e-4"]
    file.write_text(dump(config(digits / "train", tmp_path / "run", *settings)))
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "diffmoe_ep", "soak", str(file), "--out", str(tmp_path / "out"), "--kills", "3",
         "--seed", "3", "--json", str(tmp_path / "found.json"), *shape],
        cwd=ROOT, env=kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["kills"] - found["missed"], found["lost"], found["repeated"]) == (3, 0, 0)
    assert found["in_saves"] >= 1
    assert found["largest"] == 0 if shape else found["largest"] < 1e-4
    assert found["set_aside"] == sum(found["damaged"].values())
    assert sum(found["shapes"].values()) == found["kills"] + 1
    assert store.read_meta(store.resolve(tmp_path / "out/soaked"))["step"] == 40
