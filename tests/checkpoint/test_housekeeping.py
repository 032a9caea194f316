"""A run's checkpoints are told as they are, damage is found, and pruning never takes the newest sound one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffmoe_ep.checkpoint import store
from diffmoe_ep.checkpoint.fragments import whole
from diffmoe_ep.checkpoint.housekeeping import plan, to_verify, verdict
from diffmoe_ep.checkpoint.saving import save, superfluous
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.cli import main
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.run_lock import RunLock

FILES = [".metadata", "SHA256SUMS", "__0_0.distcp", "meta.json"]


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 to 50, the newest last."""
    meta = {"ranks": 4, "config": {"parallel": {"expert_parallel": 2, "zero_stage": 1}}}
    for step in range(10, 60, 10):
        save(tmp_path / "run/checkpoints", step, [whole("x", torch.full((100,), step))], meta, keep_last=9)
    return tmp_path / "run"


def at(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:07d}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, 3),
    "missing": Path.unlink,
}


def called(*arguments: object) -> int | str | None:
    try:
        main([str(word) for word in arguments])
    except SystemExit as end:
        return end.code
    return 0


def steps(run: Path) -> list[int]:
    return sorted(store.steps_in(run / "checkpoints"))


def test_a_list_tells_each_as_it_is(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at(a_run, 20) / "__0_0.distcp").unlink()
    flip(at(a_run, 30) / "meta.json")
    (at(a_run, 40) / ".metadata").unlink()
    at(a_run, 10).rename(at(a_run, 10).with_name("step-0000010.damaged"))
    shutil.copytree(at(a_run, 50), at(a_run, 60).with_name("step-0000060.partial"))
    assert called("checkpoint", "list", a_run) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("step-")}
    assert "set aside as damaged" in rows["step-0000010.damaged"]
    assert "DAMAGED: it lacks __0_0.distcp" in rows["step-0000020"]
    assert "DAMAGED: is damaged: its file meta.json is not as it was saved" in rows["step-0000030"]
    assert "DAMAGED: is not a complete checkpoint" in rows["step-0000040"]
    assert rows["step-0000050"].endswith("4 ranks, EP 2, ZeRO 1  complete, latest")
    assert "unfinished" in rows["step-0000060.partial"]
    assert f"6 folders in {a_run / 'checkpoints'}" in out


def test_a_list_knows_the_ranks_of_checkpoints_that_do_not_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoints", 1, [whole("x", torch.zeros(3))], {})
    assert called("checkpoint", "list", tmp_path) == 0
    assert "1 rank, EP ?, ZeRO ?  complete, latest" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_found_and_named(a_run: Path, capsys: pytest.CaptureFixture[str], name: str, fault: str) -> None:
    assert called("checkpoint", "verify", a_run) == 0
    assert capsys.readouterr().out.endswith("5 of 5 checkpoints are sound\n")
    DAMAGE[fault](at(a_run, 30) / name)
    assert called("checkpoint", "verify", a_run) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "DAMAGED" in line] == [lines[2]]
    assert lines[2].startswith(f"{at(a_run, 30)}: DAMAGED: ") and (name in lines[2] or name == "SHA256SUMS")
    assert lines[-1] == "4 of 5 checkpoints are sound"
    assert called("checkpoint", "verify", at(a_run, 30)) == 1
    assert called("checkpoint", "verify", at(a_run, 40)) == 0


def test_all_damage_of_a_checkpoint_is_named(a_run: Path) -> None:
    flip(at(a_run, 30) / "meta.json")
    (at(a_run, 30) / "__0_0.distcp").unlink()
    problems = verdict(at(a_run, 30)).problems
    assert problems == ("__0_0.distcp is missing", "meta.json is not as it was saved (by SHA256SUMS)")


def test_what_is_no_run_is_refused(a_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoints \(looked for folders step-\* in"):
        to_verify(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        verdict(at(a_run, 70))
    for step in range(10, 60, 10):
        at(a_run, step).rename(f"{at(a_run, step)}.partial")
    with pytest.raises(CheckpointError, match="was not finished when its run ended"):
        to_verify(Path(f"{at(a_run, 20)}.partial"))
    with pytest.raises(CheckpointError, match="there is none to verify"):
        to_verify(a_run)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(1, 0, [10, 20, 30, 40]), (2, 0, [10, 20, 30]), (1, 20, [10, 30]), (9, 0, []), (5, 7, []), (4, 10, [])],
)
def test_what_may_go(keep_last: int, keep_every: int, expected: list[int]) -> None:
    assert superfluous([50, 10, 30, 20, 40], keep_last, keep_every) == expected


def test_pruning_shows_first_and_removes_when_told(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint", "prune", a_run, "--keep-last", 1, "--keep-every", 20]
    assert called(*words) == 0
    assert steps(a_run) == [10, 20, 30, 40, 50]
    assert "nothing was removed; --remove removes what may go" in capsys.readouterr().out
    assert called(*words, "--remove") == 0
    assert steps(a_run) == [20, 40, 50]
    assert f"removed  {at(a_run, 10)}" in capsys.readouterr().out
    assert not list((a_run / "checkpoints").glob("*.partial"))


def test_the_newest_sound_one_stays(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (30, 40, 50):
        flip(at(a_run, step) / "__0_0.distcp")
    assert called("checkpoint", "prune", a_run, "--keep-last", 1, "--remove") == 0
    assert steps(a_run) == [20, 50]
    assert f"stays  {at(a_run, 20)}  (the newest sound one)" in capsys.readouterr().out
    flip(at(a_run, 20) / "__0_0.distcp")
    assert called("checkpoint", "prune", a_run, "--keep-last", 1, "--remove") == 2
    assert steps(a_run) == [20, 50]


def test_what_a_run_that_went_back_has_left_stays(a_run: Path) -> None:
    (a_run / "checkpoints/latest").write_text("step-0000030\n")
    planned = plan(a_run / "checkpoints", 1, 0)
    assert (planned.go, planned.sound) == ((at(a_run, 10), at(a_run, 20)), at(a_run, 30))
    assert planned.stay == (at(a_run, 30), at(a_run, 40), at(a_run, 50))


def test_a_run_in_training_is_not_pruned(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = {"host": "elsewhere", "process": 7, "since": "now"}
    (a_run / "lock.json").write_text(json.dumps(there))  # as a training on another host has left it a moment ago
    assert called("checkpoint", "prune", a_run, "--keep-last", 1, "--remove") == 2
    assert "is in use: process 7 on elsewhere has trained there since now" in capsys.readouterr().err
    assert steps(a_run) == [10, 20, 30, 40, 50]
    (a_run / "lock.json").unlink()
    with RunLock(a_run, Mesh()):
        pass
    assert called("checkpoint", "prune", a_run, "--keep-last", 1, "--remove") == 0
    assert steps(a_run) == [50]


@pytest.mark.parametrize(("option", "value"), [("--keep-last", 0), ("--keep-every", -1)])
def test_numbers_out_of_range_are_refused(
    a_run: Path, capsys: pytest.CaptureFixture[str], option: str, value: int
) -> None:
    assert called("checkpoint", "prune", a_run, f"{option}={value}") == 2
    assert f"{option} is {value}; it must be at least" in capsys.readouterr().err
    assert called("checkpoint", "prune", a_run / "checkpoints") == 2
    assert "is no run folder; name the one in which it lies" in capsys.readouterr().err
