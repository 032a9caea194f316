"""A run goes on from the newest checkpoint that is as it was saved; damaged newer ones are told and kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.checkpoint import saving, store
from diffmoe_ep.checkpoint.dcp import ChunkWriter
from diffmoe_ep.checkpoint.fragments import Fragment, not_finite, whole
from diffmoe_ep.checkpoint.sound import newest_sound, set_aside
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from ranks import run

pytestmark = pytest.mark.slow


def three(root: Path) -> list[Path]:
    """Checkpoints of steps 1 to 3; newest last."""
    return [saving.save(root, step, [whole("x", torch.full((100,), step))], {}, keep_last=3) for step in (1, 2, 3)]


FILES = [".metadata", "SHA256SUMS", "__0_0.distcp", "meta.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty", "missing", "folder"])
def test_a_damaged_newest_one_is_told_and_kept_and_the_next_is_taken(tmp_path: Path, name: str, fault: str) -> None:
    *_, second, third = three(tmp_path)
    path = third / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault != "missing":
        content[len(content) // 2] ^= 1
        path.write_bytes({"flipped": content, "truncated": content[: len(content) // 2], "empty": b""}[fault])
    found, damage = newest_sound(tmp_path, Mesh())
    assert found == second and list(damage) == [third]
    assert str(third) in damage[third] and ("is damaged" in damage[third] or "is not a complete" in damage[third])
    (aside,) = set_aside(list(damage))
    assert aside == tmp_path / "step-0000003.damaged" and aside.is_dir()
    assert newest_sound(tmp_path, Mesh()) == (second, {})
    assert store.latest(tmp_path) == second


@pytest.mark.parametrize(
    "content", ["step-0000002\n", "step-0000009\n", "step-" + "9" * 5000, "", "\0\xff", "../step-0000001"]
)
def test_whatever_latest_says_is_the_name_of_one_or_nothing(tmp_path: Path, content: str) -> None:
    _, second, third = three(tmp_path)
    (tmp_path / "latest").write_text(content, encoding="latin-1")
    assert newest_sound(tmp_path, Mesh()) == (second if content == "step-0000002\n" else third, {})


def test_a_run_that_went_back_does_not_go_on_from_its_later_steps(tmp_path: Path) -> None:
    first, second, _ = three(tmp_path)
    (tmp_path / "latest").write_text("step-0000002\n")
    (second / "meta.json").write_text("{}")
    assert newest_sound(tmp_path, Mesh())[0] == first


def test_a_run_never_starts_anew_in_the_place_of_a_lost_one(tmp_path: Path) -> None:
    folders = three(tmp_path)
    for folder in folders:
        (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound: .*step-0000003.*step-0000001") as raised:
        newest_sound(tmp_path, Mesh())
    assert "Put a sound copy there, or give this run another folder" in str(raised.value)
    assert sorted(tmp_path.glob("step-*")) == folders
    assert newest_sound(tmp_path / "none", Mesh()) == (None, {})


def on_ranks(rank: int, root: Path) -> tuple[Path | None, dict[Path, str]]:
    mesh = init_mesh(1, 1, 1.0)
    for step in (1, 2):
        half = Fragment("x", (2, 100), 100 * rank, torch.full((100,), float(step)))
        folder = saving.save(root, step, [half], {}, rank=rank, world=2)
    if rank == 0:
        content = (folder / "__1_0.distcp").read_bytes()
        (folder / "__1_0.distcp").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    mesh.agree(None)
    return newest_sound(root, mesh)


def test_ranks_look_at_their_shares_and_agree(tmp_path: Path) -> None:
    first, second = run(2, on_ranks, tmp_path)
    assert first == second == (tmp_path / "step-0000001", first[1])
    assert "its file __1_0.distcp is not as it was saved" in first[1][tmp_path / "step-0000002"]


def test_what_a_disk_loses_while_saving_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saving.save(tmp_path, 1, [whole("x", torch.ones(100))], {}, keep_last=1)
    original = ChunkWriter.write_data

    def loses(self: ChunkWriter, *args: Any) -> Any:
        written = original(self, *args)
        path = Path(self.path) / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-4] + b"lost")
        return written

    monkeypatch.setattr(ChunkWriter, "write_data", loses)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp does not hold what .* wrote"):
        saving.save(tmp_path, 2, [whole("x", torch.zeros(100))], {}, keep_last=1)
    assert store.latest(tmp_path) == first and newest_sound(tmp_path, Mesh()) == (first, {})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_found(value: float) -> None:
    good, bad = whole("good", torch.ones(3)), whole("bad", torch.tensor([1.0, value]))
    assert not_finite([good, bad]) == "bad"
    assert not_finite([good, whole("count", torch.tensor(2**60)), whole("none", torch.zeros(0))]) is None
    assert not_finite([]) is None
