"""Law of faults: bad bytes are replaced at the listed positions and nowhere else; shards that cannot be had change
nothing but the time.
"""

import io
import os
import re
import shutil
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader.streams import open_stream
from data_prep.write import write_dataset
from diffmoe_ep.config import DataConfig
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.remote.fetch import Unavailable
from diffmoe_ep.data.shards import Dataset, Opened, load_index

MANIFEST = Manifest("tiny", "pixels", (1, 1, 2), "float32", 1.0, 0.0, 200, (), "made up")
NUM_SAMPLES, SHARD_SIZE, MICRO_STEP = 60, 10, 12
STEPS = 15  # three epochs


def write_tiny(folder: Path) -> Dataset:
    """Sixty samples in shards of ten; sample number n holds n + 1 and has label n."""
    content = [
        (f"k{number:03d}", np.full(MANIFEST.stored_shape, number + 1, np.float32)) for number in range(NUM_SAMPLES)
    ]
    return write_dataset(
        folder, [(key, encode(array, int(key[1:]), MANIFEST)) for key, array in content], MANIFEST, SHARD_SIZE
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("clean") / "tiny")


@pytest.fixture
def folder(clean: Dataset, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(clean.folder, tmp_path / "tiny"))


def make(dataset: Dataset | Mixture, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "seed": 5,
        "batch": MICRO_STEP,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "condition_dropout": 0.0,
        "flip": False,
        "shuffle_block": 3,
        "workers": 0,
        "prefetch": 2,
        "max_bad_fraction": 0.5,
    }
    return open_stream(dataset, **settings | changes)


def labels(
    dataset: Dataset | Mixture, world: int, run: Path | None = None, steps: int = STEPS, **changes: Any
) -> list[int]:
    """The label (so the key) at each position, read by `world` ranks, and that the latent is of the same sample."""
    found: list[list[list[int]]] = []
    for rank in range(world):
        source = make(
            dataset, rank=rank, world=world, quarantine_file=run and quarantine.rank_file(run, rank), **changes
        )
        batches = list(islice(source, steps))
        source.close()
        for batch in batches:
            assert batch.latent[:, 0, 0, 1].tolist() == [label + 1 for label in batch.condition.tolist()]
        found.append([batch.condition.tolist() for batch in batches])
    return [label for micro_step in zip(*found, strict=True) for slice_ in micro_step for label in slice_]


def member(folder: Path, number: int, field: str) -> tuple[Path, int, int]:
    """Tar, offset and size of a member of sample `number`."""
    name = f"tiny-{number // SHARD_SIZE:06d}"
    row = load_index(folder / f"{name}.index.npy", MANIFEST.fields)[number % SHARD_SIZE][field]
    return folder / f"{name}.tar", int(row["offset"]), int(row["size"])


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def flipped_byte(folder: Path) -> set[int]:
    for number in (7, 31):
        path, offset, size = member(folder, number, "pixels.npy")
        overwrite(path, offset + size - 1, bytes([path.read_bytes()[offset + size - 1] ^ 1]))
    return {7, 31}


def truncated_tar(folder: Path) -> set[int]:
    """Cut within sample 26, after the dataset was opened: of a file of another size it says so at once."""
    path, offset, _ = member(folder, 26, "pixels.npy")
    os.truncate(path, offset + 3)
    return {26, 27, 28, 29}


def damaged_index(folder: Path) -> set[int]:
    """An offset of sample 44 points elsewhere."""
    path = folder / "tiny-000004.index.npy"
    index = np.load(path)
    index["pixels.npy"]["offset"][4] += 512
    np.save(path, index)
    return {44}


def rewritten(change: Callable[[int, dict[str, bytes]], object]) -> Callable[[Path], set[int]]:
    """Samples 13 and 50 are stored otherwise than the manifest announces, with checksums that fit."""

    def spoil(folder: Path) -> set[int]:
        dataset = Dataset.open(folder)
        for number in (13, 50):
            name = f"tiny-{number // SHARD_SIZE:06d}"
            index = np.load(folder / f"{name}.index.npy")
            contents = [dataset.read(number // SHARD_SIZE, sample) for sample in range(SHARD_SIZE)]
            change(number, contents[number % SHARD_SIZE])
            write_raw(folder / f"{name}.tar", index, contents)
            np.save(folder / f"{name}.index.npy", index)
        dataset.close()
        return {13, 50}

    return spoil


def write_raw(path: Path, index: np.ndarray, contents: list[dict[str, bytes]]) -> None:
    """A tar of these members, and where they lie in its index; a member that is absent has size 0 there."""
    with tarfile.open(path, "w") as tar:
        for row, fields in zip(index, contents, strict=True):
            for field in MANIFEST.fields:
                content = fields.get(field, b"")
                if field in fields:
                    entry = tarfile.TarInfo(f"{row['key'].decode()}.{field}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                row[field] = (tar.offset - (len(content) + 511) // 512 * 512, len(content), zlib.crc32(content))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def store(array: np.ndarray) -> Callable[[int, dict[str, bytes]], object]:
    return lambda number, fields: fields.update({"pixels.npy": npy(array)})


FAULTS: dict[str, Callable[[Path], set[int]]] = {
    "flipped byte": flipped_byte,
    "truncated tar": truncated_tar,
    "damaged index": damaged_index,
    "wrong dtype": rewritten(store(np.zeros((1, 1, 2), np.float64))),
    "wrong shape": rewritten(store(np.zeros((1, 2, 2), np.float32))),
    "NaN": rewritten(store(np.full((1, 1, 2), np.nan, np.float32))),
    "pickle": rewritten(store(np.array([{}], dtype=object))),
    "missing member": rewritten(lambda number, fields: fields.pop("cls")),
    "label out of range": rewritten(lambda number, fields: fields.update(cls=b"200")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_only_listed_positions_differ(clean: Dataset, folder: Path, tmp_path: Path, fault: str) -> None:
    expected = labels(clean, 1)
    dataset = Dataset.open(folder)  # before the fault: what is plain to see is told at the start
    bad = FAULTS[fault](folder)
    runs = {world: tmp_path / f"run{world}" for world in (1, 4)}
    found = {world: labels(dataset, world, run) for world, run in runs.items()}
    assert found[1] == found[4]
    listed = quarantine.read(runs[1])
    assert listed == quarantine.read(runs[4])
    assert {int(sample.key[1:]) for sample in listed if sample.key.startswith("k")} == bad
    positions = {position for sample in listed for position in sample.positions}
    assert positions == {position for position, label in enumerate(expected) if label in bad}
    assert {
        position for position, (one, other) in enumerate(zip(found[1], expected, strict=True)) if one != other
    } == positions
    assert not bad & set(found[1])
    assert all(str(folder) in sample.shard and sample.reason for sample in listed)
    epoch = [Counter(expected[first : first + NUM_SAMPLES]) for first in range(0, 180, 60)]
    assert all(len(counted) == NUM_SAMPLES for counted in epoch)


def emptied_tar(folder: Path) -> set[int]:
    """Nothing is left of the third shard."""
    os.truncate(folder / "tiny-000002.tar", 0)
    return set(range(20, 30))


def grown_tar(folder: Path) -> set[int]:
    """More bytes than were announced: what was announced is still there."""
    with (folder / "tiny-000002.tar").open("ab") as file:
        file.write(bytes(512))
    return set()


def truncated_index(folder: Path) -> set[int]:
    """The index of the last shard ends in the middle: nothing of the shard can be found."""
    path = folder / "tiny-000005.index.npy"
    os.truncate(path, path.stat().st_size // 2)
    return set(range(50, 60))


BEFORE = FAULTS | {"emptied tar": emptied_tar, "grown tar": grown_tar, "truncated index": truncated_index}


@pytest.mark.parametrize("fault", BEFORE)
def test_damage_before_the_start_is_as_damage_found_later(
    clean: Dataset, folder: Path, tmp_path: Path, fault: str
) -> None:
    """Opened as a run opens it that may replace samples."""
    expected, bad = labels(clean, 1), BEFORE[fault](folder)
    dataset = Mixture.open(DataConfig(folder=str(folder), max_bad_fraction=0.5))
    assert len(dataset.problems) == 1 or fault not in ("truncated tar", "emptied tar", "grown tar", "truncated index")
    found = {world: labels(dataset, world, tmp_path / f"run{world}") for world in (1, 4)}
    assert found[1] == found[4]
    listed = quarantine.read(tmp_path / "run1")
    assert listed == quarantine.read(tmp_path / "run4")
    positions = {position for sample in listed for position in sample.positions}
    assert positions == {position for position, label in enumerate(expected) if label in bad}
    assert {
        position for position, (one, other) in enumerate(zip(found[1], expected, strict=True)) if one != other
    } == positions


@pytest.mark.parametrize("fault", [truncated_tar, emptied_tar, grown_tar, truncated_index])
def test_damage_is_refused_where_nothing_may_be_replaced(folder: Path, fault: Callable[[Path], set[int]]) -> None:
    fault(folder)
    with pytest.raises(DataError, match=r"tiny-00000[25]\.(tar|index\.npy:) has \d+ bytes"):
        Mixture.open(DataConfig(folder=str(folder), max_bad_fraction=0.0))


@pytest.mark.parametrize("name", ["tiny-000003.tar", "tiny-000003.index.npy"])
def test_a_shard_that_is_missing_at_the_start_stops_by_name(folder: Path, name: str) -> None:
    truncated_tar(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{re.escape(name)} is missing; prepare") as caught:
        Mixture.open(DataConfig(folder=str(folder), max_bad_fraction=0.5))
    assert "tiny-000002" not in str(caught.value)


def test_substitutes_are_of_the_same_block(clean: Dataset, folder: Path, tmp_path: Path) -> None:
    """Three shards are shuffled together: what stands in for a sample of the first half of an epoch is of that half's
    shards.
    """
    dataset = Dataset.open(folder)
    flipped_byte(folder)
    expected, found = labels(clean, 1), labels(dataset, 1, tmp_path / "run")
    changed = [position for position in range(180) if expected[position] != found[position]]
    assert len(changed) == 6
    for position in changed:
        half = position // 30 * 30
        assert found[position] // SHARD_SIZE in {label // SHARD_SIZE for label in expected[half : half + 30]}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_list_the_same(folder: Path, tmp_path: Path, workers: int) -> None:
    dataset = Dataset.open(folder)
    flipped_byte(folder)
    found = labels(dataset, 1, tmp_path / "whole")
    assert labels(dataset, 1, tmp_path / "cut", steps=4, workers=workers) == found[:48]
    assert labels(dataset, 1, tmp_path / "cut", steps=13, samples_consumed=24, workers=workers) == found[24:]
    assert quarantine.read(tmp_path / "cut") == quarantine.read(tmp_path / "whole")


def test_faults_in_one_dataset_leave_the_others_alone(clean: Dataset, folder: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(folder)
    expected = labels(Mixture([clean, dataset], [1, 2]), 1)
    flipped_byte(folder)
    found = {world: labels(Mixture([clean, dataset], [1, 2]), world, tmp_path / f"run{world}") for world in (1, 4)}
    assert found[1] == found[4]
    positions = {position for sample in quarantine.read(tmp_path / "run4") for position in sample.positions}
    assert {position for position in range(180) if expected[position] != found[1][position]} == positions != set()
    assert {7, 31} & set(found[1])  # those of the sound dataset


def test_too_many_bad_samples_stop_at_once(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(folder)
    truncated_tar(folder)  # four of sixty
    run = quarantine.rank_file(tmp_path / "run", 0)
    source = make(dataset, max_bad_fraction=0.05, quarantine_file=run)
    told = (
        r"4 of 60 samples are bad, listed in .*run.quarantine-rank\*\.jsonl: more than data\.max_bad_fraction = 0\.05"
    )
    with pytest.raises(DataError, match=told) as caught:
        list(islice(source, STEPS))
    assert "\n" not in str(caught.value)
    assert source.samples_consumed < NUM_SAMPLES
    assert len(quarantine.read(tmp_path / "run")) == 4
    assert len(labels(dataset, 1, max_bad_fraction=0.07)) == 180


def test_ranks_together_may_have_too_many(folder: Path) -> None:
    """Each rank stays below the limit; their sum, which the trainer asks with, does not."""
    dataset = Dataset.open(folder)
    truncated_tar(folder)
    ranks = [make(dataset, rank=rank, world=4, max_bad_fraction=0.05) for rank in range(4)]
    for source in ranks:
        list(islice(source, 5))
        source.close()
    assert sum(source.num_bad for source in ranks) == 4
    ranks[0].check_bad(3)
    with pytest.raises(DataError, match="4 of 60 samples are bad") as caught:
        ranks[0].check_bad(4, everywhere=True)
    assert caught.value.everywhere


def test_a_block_of_bad_samples_ends(folder: Path) -> None:
    dataset = Dataset.open(folder)
    for path in folder.glob("*.tar"):
        os.truncate(path, 100)
    with pytest.raises(DataError, match=r"pixels\.npy is truncated|cls is truncated") as caught:
        next(make(dataset))
    assert "none of 29 other samples of its shuffle block" in str(caught.value)


def test_the_last_good_sample_of_a_block_stands_in(folder: Path, tmp_path: Path) -> None:
    """Reading in stored order, a shard is its own block: nine bad samples of ten are all replaced by the tenth."""
    dataset = Dataset.open(folder)
    path, offset, _ = member(folder, 21, MANIFEST.fields[0])
    os.truncate(path, offset)
    found = labels(dataset, 1, tmp_path / "run", steps=5, shuffle_block=0)
    assert found == [*range(20), *[20] * 10, *range(30, 60)]


class Flaky(Dataset):
    """A dataset whose shard 2 cannot be had for the first few times that it is asked for."""

    def __init__(self, dataset: Dataset, times: int) -> None:
        super().__init__(Path(dataset.folder), dataset.manifest)
        self.times = times

    def opened(self, shard: int) -> Opened:
        if shard == 2 and self.times:
            self.times -= 1
            raise Unavailable(f"{self.place('tiny-000002.tar')} is unavailable")
        return super().opened(shard)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses asked for, none of them made."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def test_what_cannot_be_had_is_waited_for(clean: Dataset, tmp_path: Path, pauses: list[float]) -> None:
    expected = labels(clean, 1)
    assert labels(Flaky(clean, 8), 1, tmp_path / "run", retries=8) == expected
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert quarantine.read(tmp_path / "run") == []


def test_what_cannot_be_had_at_all_stops_by_name(clean: Dataset, pauses: list[float]) -> None:
    source = make(Flaky(clean, 10**9), retries=2)
    with pytest.raises(Unavailable, match=r"tiny-000002\.tar is unavailable"):
        list(islice(source, STEPS))
    assert pauses == [1, 2]
    assert source.num_bad == 0


def test_a_missing_shard_is_waited_for(clean: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put back while the stream waits; no sample is replaced."""
    expected = labels(clean, 1)
    dataset = Dataset.open(folder)
    (folder / "tiny-000003.tar").rename(folder / "away")
    waited: list[float] = []

    def put_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 6:
            (folder / "away").rename(folder / "tiny-000003.tar")

    monkeypatch.setattr(time, "sleep", put_back)
    source = make(dataset, retries=8)
    assert [label for batch in islice(source, STEPS) for label in batch.condition.tolist()] == expected
    assert source.num_bad == 0
    assert waited == [1, 2, 4, 8, 16, 32]


def test_substitutes_that_cannot_be_had_are_waited_for(clean: Dataset, folder: Path, pauses: list[float]) -> None:
    """A substitute is passed over only for its bytes: else the order would depend on a server's mood."""
    dataset = Dataset.open(folder)
    flipped_byte(folder)
    expected = labels(dataset, 1)
    for number in range(6):

        class Moody(Dataset):
            asked = 0

            def opened(self, shard: int) -> Opened:
                if shard == number and shard not in self._open:  # noqa: B023  # called within the loop
                    self.asked += 1
                    if self.asked % 2:
                        raise Unavailable("not now")
                return super().opened(shard)

        assert labels(Moody(folder, dataset.manifest), 1, retries=1) == expected
    assert pauses


def test_no_fault_is_replaced_unless_allowed(folder: Path) -> None:
    dataset = Dataset.open(folder)
    flipped_byte(folder)
    with pytest.raises(DataError, match=r"tiny-00000[03]\.tar, key k0(07|31): pixels\.npy is damaged"):
        labels(dataset, 1, max_bad_fraction=0.0)


def test_a_manifest_of_fewer_classes_is_a_fault_of_many_samples(clean: Dataset) -> None:
    wrong = Dataset(Path(clean.folder), replace(clean.manifest, num_classes=40))
    with pytest.raises(DataError, match="samples are bad: more than"):
        labels(wrong, 1, max_bad_fraction=0.1)
