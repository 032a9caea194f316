"""Hosts that do not share the run folder are told before anything is trained; a save looks again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffmoe_ep.checkpoint import saving, store
from diffmoe_ep.checkpoint.fragments import Fragment
from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.mesh import init_mesh
from diffmoe_ep.train import preflight
from ranks import run

pytestmark = pytest.mark.slow


def looked(rank: int, folders: list[Path]) -> str:
    """As a rank on a host of its own, with the run folder that it sees."""
    preflight._appears.__defaults__ = (0.5,)  # type: ignore[attr-defined]  # seconds of patience
    mesh = replace(init_mesh(1, 1, 1.0), host=f"host{rank}")
    try:
        preflight.check_shared(folders[rank], mesh)
    except ConfigError as error:
        return str(error)
    return ""


def test_hosts_that_do_not_share_the_folder_are_named(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "a", tmp_path / "b"
    for folder in (mine, theirs):
        folder.mkdir()
    assert run(2, looked, [mine, mine]) == ["", ""]
    found = run(2, looked, [mine, theirs])
    assert found[0] == found[1]
    assert f"rank 0: folder {mine} is not shared: host0 does not see there what host1 wrote" in found[0]
    assert f"rank 1: folder {theirs} is not shared: host1 does not see there what host0 wrote" in found[0]
    assert not list(mine.iterdir()) and not list(theirs.iterdir())


def saved(rank: int, folders: list[Path]) -> str:
    init_mesh(1, 1, 1.0)
    half = Fragment("x", (2, 1000), 1000 * rank, torch.ones(1000))
    try:
        saving.save(folders[rank], 2, [half], {}, rank=rank, world=2, keep_last=1)
    except store.CheckpointError as error:
        return str(error)
    return ""


def test_a_save_of_which_the_first_rank_sees_a_part_replaces_nothing(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "a", tmp_path / "b"
    before = saving.save(mine, 1, [Fragment("x", (2, 1000), 0, torch.zeros(2000))], {})
    (theirs / "step-0000002.partial").mkdir(parents=True)
    found = run(2, saved, [mine, theirs])
    assert found[0] == found[1]
    assert "wrote __1_0.distcp" in found[0] and "does not see it. The run folder has to lie on one" in found[0]
    assert store.latest(mine) == before
    assert store.read(before, ["x"])["x"].sum() == 0
