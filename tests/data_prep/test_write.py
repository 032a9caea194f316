"""Writing a dataset: reproducible bytes, nothing half-written under a final name, a cut or damaged folder completed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import write
from data_prep.write import Sample, existing_dataset, write_dataset
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.shards import Dataset

FACTS = Manifest("tiny", "pixels", (1, 2, 2), "uint8", 1.0, 0.0, 3, (), "made up")
NAMES = ["manifest.json", *(f"tiny-00000{number}.{end}" for number in range(3) for end in ("index.npy", "tar"))]


def samples(count: int = 7) -> list[Sample]:
    return [(f"k{number}", encode(np.full((1, 2, 2), number, np.uint8), number % 3, FACTS)) for number in range(count)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    told: list[int] = []
    write_dataset(tmp_path / "one", samples(), FACTS, 3, told.append)
    write_dataset(tmp_path / "two", iter(samples()), FACTS, 3)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(content(tmp_path / "one")) == NAMES
    assert told == [3, 3, 1]


def test_a_finished_dataset_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    assert existing_dataset(folder, FACTS, 3) is None
    write_dataset(folder, samples(), FACTS, 3)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def unread() -> Sample:
        raise AssertionError("the source was read although the dataset is there")

    found = write_dataset(folder, (unread() for _ in range(7)), FACTS, 3)
    assert found.manifest.num_samples == 7
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert existing_dataset(folder, FACTS, 3) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_dataset_is_completed_and_whole_shards_kept(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "tiny"
    write_dataset(folder, samples(), FACTS, 3)
    before, inodes = content(folder), {path.name: path.stat().st_ino for path in folder.iterdir()}
    changed = bytearray(before[name])
    changed[len(changed) // 2] ^= 255
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes(changed if damage == "changed" else before[name][: len(changed) // 2])
    assert existing_dataset(folder, FACTS, 3) is None
    write_dataset(folder, samples(), FACTS, 3)
    assert content(folder) == before
    if name != "manifest.json":
        shard = name.split(".")[0]
        kept = [other for other in NAMES if other.endswith(".tar") and not other.startswith(shard)]
        assert [(folder / other).stat().st_ino for other in kept] == [inodes[other] for other in kept]


def test_a_finished_dataset_of_format_1_is_left_alone(tmp_path: Path) -> None:
    """A folder of an earlier version is the same dataset, though it does not say as much of itself."""
    folder, manifest = tmp_path / "tiny", replace(FACTS, image_size=8)
    written = write_dataset(folder, samples(), manifest, 3).manifest
    (folder / "manifest.json").write_text(replace(written, format=1).to_json())
    before = content(folder)
    found = existing_dataset(folder, manifest, 3)
    assert found is not None and found.manifest.format == 1
    assert content(folder) == before
    with pytest.raises(DataError, match="holds another data set"):
        existing_dataset(folder, replace(manifest, num_classes=11), 3)


def test_a_run_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"

    def cut() -> list[Sample]:
        yield from samples()[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, cut(), FACTS, 3)
    assert sorted(content(folder)) == ["journal.jsonl", "tiny-000000.index.npy", "tiny-000000.tar"]
    with pytest.raises(DataError, match="no manifest"):
        Dataset.open(folder)
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"name": "tiny-0000')  # torn in the middle of a line
    (folder / "tiny-000001.tar.partial").write_bytes(b"half")
    inode = (folder / "tiny-000000.tar").stat().st_ino
    write_dataset(folder, samples(), FACTS, 3)
    write_dataset(tmp_path / "uncut", samples(), FACTS, 3)
    assert content(folder) == content(tmp_path / "uncut")
    assert (folder / "tiny-000000.tar").stat().st_ino == inode


def test_a_kept_shard_holds_the_samples_that_are_asked_for(tmp_path: Path) -> None:
    """Without its manifest, a folder of other samples under the same name is written anew."""
    folder = tmp_path / "tiny"
    write_dataset(folder, samples(9), FACTS, 3)
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    lines = [write._journal_head(FACTS, 3), *map(json.dumps, entries)]
    (folder / "manifest.json").unlink()
    (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    other = [(key, fields | {"cls": b"2"}) for key, fields in samples(5)]
    write_dataset(folder, other, FACTS, 3)
    write_dataset(tmp_path / "new", other, FACTS, 3)
    assert content(folder) == content(tmp_path / "new")


def test_other_data_are_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_dataset(folder, samples(), FACTS, 3)
    before = content(folder)
    with pytest.raises(DataError, match=r"holds another data set \(tiny, pixels"):
        write_dataset(folder, samples(), replace(FACTS, scale=2.0), 3)
    with pytest.raises(DataError, match="shards of 3 samples, not 2; use --shard-size 3"):
        write_dataset(folder, samples(), FACTS, 2)
    with pytest.raises(DataError, match="holds other files"):
        write_dataset(folder, samples(), replace(FACTS, name="huge"), 3)
    assert content(folder) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(DataError, match=r"holds other files \(cat\.jpg\); choose another"):
        write_dataset(tmp_path / "photos", samples(), FACTS, 3)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot prepare .*file.* choose a folder that you may write to"):
        write_dataset(tmp_path / "file", samples(), FACTS, 3)
    with pytest.raises(DataError, match=r"cannot prepare .*Not a directory"):
        write_dataset(tmp_path / "file" / "below", samples(), FACTS, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([samples()[0], samples()[0]], "keys must differ"),
        ([("a.b", samples()[0][1])], "keys must differ and consist"),
        ([("../a", samples()[0][1])], "keys must differ and consist"),
        ([("a", {"cls": b"1"})], r"has fields \['cls'\]"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, bad: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "tiny", bad, FACTS, 3)
    with pytest.raises(ValueError, match="shard_size is 0"):
        write_dataset(tmp_path / "tiny", samples(), FACTS, 0)


def test_a_source_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        write_dataset(tmp_path / "tiny", [], FACTS, 3)
