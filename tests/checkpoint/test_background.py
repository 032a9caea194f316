"""Training waits for a copy alone; what is written is of that moment; what fails is told on all ranks."""

import contextlib
import io
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffmoe_ep.checkpoint import background, store
from diffmoe_ep.checkpoint.background import Saver
from diffmoe_ep.checkpoint.fragments import Fragment, whole
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.config import CheckpointConfig, override
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.stopping import Stopping
from ranks import RankError, run
from train.runs import config

pytestmark = pytest.mark.slow

BESIDE, NOT = CheckpointConfig(keep_last=9), CheckpointConfig(keep_last=9, background=False)
NUMEL = 10_000


def part(mesh: Mesh, value: float) -> Fragment:
    """This rank's part of a tensor."""
    return Fragment("x", (mesh.size, NUMEL), mesh.rank * NUMEL, torch.full((NUMEL,), value))


@contextlib.contextmanager
def held_back() -> Any:
    """Nothing is written until the event is set."""
    gate, save = threading.Event(), background.save

    def later(*args: Any, **options: Any) -> Any:
        assert gate.wait(120)
        return save(*args, **options)

    with mock.patch.object(background, "save", later):
        yield gate


def moments(rank: int, root: Path) -> dict[str, Any]:
    """What a save in the background leaves to the training, and what is found afterwards."""
    mesh, complete = init_mesh(1, 1, 1.0), list[int]()
    piece = part(mesh, 1.0)
    with (
        Saver(root, BESIDE, mesh, 1.0) as saver,
        held_back() as gate,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        saver.save(1, [piece], {"a": 1}, complete.append)
        early = store.latest(root), list(complete), saver.failed
        piece.data.fill_(2.0)
        place = [copy.data_ptr() for copy in saver._copies]
        threading.Timer(0.3, gate.set).start()
        saver.save(2, [piece], {"a": 2}, complete.append)
        piece.data.fill_(3.0)
        assert [copy.data_ptr() for copy in saver._copies] == place
        middle = store.latest(root) == root / "step-0000001" or complete == [1, 2], complete[:1]
        saver.finish()
        late = list(complete)
        saver.finish()
    return {"early": early, "middle": middle, "late": late, "said": said.getvalue()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_written_is_of_the_moment_of_the_save(tmp_path: Path, world: int) -> None:
    found = run(world, moments, tmp_path)
    for rank, each in enumerate(found):
        assert each["early"] == (None, [], False)
        assert each["middle"] == (True, [1])
        assert each["late"] == [1, 2]
        waits = "the checkpoint of step 2 waits for that of step 1, which is still written\n"
        assert each["said"] == (waits if rank == 0 else "")
    for step in (1, 2):
        folder = tmp_path / f"step-{step:07d}"
        assert store.read(folder, ["x"])["x"].unique().tolist() == [float(step)]
        assert store.read_meta(folder)["meta"] == {"a": step}
        store.verify(folder)


def both(rank: int, root: Path) -> None:
    mesh = init_mesh(1, 1, 1.0)
    generator = torch.Generator().manual_seed(rank)
    own = Fragment("x", (mesh.size, 3, NUMEL), rank * 3 * NUMEL, torch.randn(3 * NUMEL, generator=generator))
    rest = [whole("step", torch.tensor(2**60 + 1)), whole("half", torch.ones(7, 5).bfloat16())] if rank == 0 else []
    for name, kept in (("beside", BESIDE), ("not", NOT)):
        with Saver(root / name, kept, mesh, 1.0) as saver:
            saver.save(1, [own, *rest], {}, lambda _: None)
            saver.finish()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_files_are_written_either_way(tmp_path: Path, world: int) -> None:
    run(world, both, tmp_path)
    first, second = (sorted((tmp_path / name / "step-0000001").iterdir()) for name in ("beside", "not"))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        assert one.name in (".metadata", "SHA256SUMS") or one.read_bytes() == other.read_bytes(), one.name
    one, other = (store.read(tmp_path / name / "step-0000001", ["x", "step", "half"]) for name in ("beside", "not"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def full_disk(rank: int, root: Path, leaves: bool) -> tuple[bool, str]:
    """The last rank's disk takes no more than the first checkpoint; returns whether all wish to save because of it."""
    mesh = init_mesh(1, 1, 1.0)
    stopping = Stopping(BESIDE, mesh, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Saver(root, BESIDE, mesh, 1.0) as saver:
        saver.save(1, [part(mesh, 1.0)], {}, stopping.saved)
        saver.finish()
        if rank == mesh.size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (NUMEL, limits[1]))
        saver.save(2, [part(mesh, 2.0)], {}, stopping.saved)
        while not (wished := stopping.agree(saver.failed)):
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(CheckpointError) as caught:
            saver.finish() if leaves else saver.save(3, [part(mesh, 3.0)], {}, stopping.saved)
    assert stopping.last_step == 1 and caught.value.everywhere
    return wished, str(caught.value)


@pytest.mark.parametrize("leaves", [False, True], ids=["at the next save", "at the end"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_failure_is_heard_by_all_ranks(tmp_path: Path, world: int, leaves: bool) -> None:
    found = run(world, full_disk, tmp_path, leaves)
    assert found == [found[0]] * world
    assert found[0][0]
    assert found[0][1].startswith(f"cannot save the checkpoint {tmp_path / 'step-0000002'}: ")
    assert "File too large" in found[0][1]
    assert store.latest(tmp_path) == tmp_path / "step-0000001"
    assert not (tmp_path / "step-0000003").exists()


def leaving(rank: int, root: Path, fails: bool) -> str:
    mesh = init_mesh(1, 1, 1.0)
    twice = whole("x", torch.ones(3))
    with (
        contextlib.redirect_stderr(io.StringIO()) as said,
        contextlib.suppress(ZeroDivisionError),
        held_back() as gate,
        Saver(root, BESIDE, mesh, 1.0) as saver,
    ):
        saver.save(1, [twice, twice] if fails else [part(mesh, 1.0)], {}, lambda _: None)
        threading.Timer(0.3, gate.set).start()
        raise ZeroDivisionError
    return said.getvalue()


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_being_written_is_finished_when_something_else_fails(tmp_path: Path, world: int) -> None:
    assert run(world, leaving, tmp_path / "a", False) == [""] * world
    assert store.latest(tmp_path / "a") == tmp_path / "a/step-0000001"
    for said in run(world, leaving, tmp_path / "b", True):
        assert said.startswith("the checkpoint of step 1 was not written either: cannot save the checkpoint ")
        assert "are given twice" in said
    assert store.latest(tmp_path / "b") is None


def no_memory(rank: int, root: Path) -> str:
    mesh = init_mesh(1, 1, 1.0)
    with Saver(root, BESIDE, mesh, 1.0) as saver, contextlib.ExitStack() as planted:
        if rank == mesh.size - 1:
            full = mock.Mock(empty=mock.Mock(side_effect=RuntimeError("DefaultCPUAllocator")))
            planted.enter_context(mock.patch.object(background, "torch", full))
        with pytest.raises(CheckpointError) as caught:
            saver.save(1, [part(mesh, 1.0)], {}, lambda _: None)
    return str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_no_room_for_the_copy_is_told_with_the_setting_that_helps(tmp_path: Path, world: int) -> None:
    text = "a checkpoint in the background needs a copy in host memory, which is full (DefaultCPUAllocator); "
    assert run(world, no_memory, tmp_path) == [text + "set checkpoint.background=false"] * world


def trains(rank: int, given: Any) -> None:
    """Train; the last rank's second save fails after it was written."""
    mesh, save = training.start_mesh(given), background.save

    def fails(root: Path, step: int, *args: Any, **options: Any) -> Any:
        if step == 4 and rank == mesh.size - 1:
            with mock.patch("diffmoe_ep.checkpoint.saving.sha256", return_value="lost"):
                return save(root, step, *args, **options)
        return save(root, step, *args, **options)

    with mock.patch.object(background, "save", fails):
        training.Trainer(given, mesh, *training.prepare(given, mesh)).run()


@pytest.mark.parametrize(("world", "steps"), [(1, 40), (2, 40), (2, 4)])
def test_a_training_ends_with_what_its_save_failed_with(digits: Path, tmp_path: Path, world: int, steps: int) -> None:
    given = override(
        config(digits / "train", tmp_path / "run", f"train.steps={steps}", "checkpoint.every=2"),
        ["log.every=1000", "checkpoint.keep_last=9"],
    )
    with pytest.raises(RankError) as caught:
        run(world, trains, given)
    assert len(caught.value.errors) == world
    for text in caught.value.errors.values():
        assert "CheckpointError" in text and "the disk loses data" in text
    assert store.latest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-0000002"
