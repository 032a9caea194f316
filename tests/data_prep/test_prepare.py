"""Preparation on any number of ranks: the same bytes, whatever happens on the way, and bad samples listed but not
fatal.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep import imagenet, prepare, text_image
from data_prep.__main__ import main
from data_prep.encode import Encoding
from data_prep.prepare import Preparation, Report
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.shards import Dataset
from pictures import content, picture, tar

pytest.importorskip("PIL")
COUNT = 23  # pictures of which two are bad
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    for number in range(COUNT):
        path = folder / f"n{number % 3}" / f"p{number:02d}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number, kind="JPEG"))
    (folder / "n1" / "p04.JPEG").write_bytes(b"not a picture")
    (folder / "n2" / "p05.JPEG").write_bytes(picture(5, kind="JPEG")[:200])
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars in the manner of img2dataset, of 7, 5 and 4 samples; one sample has no caption, the second tar is cut
    short.
    """
    folder = tmp_path_factory.mktemp("tars")
    for unit, count in enumerate((7, 6, 4)):
        files = {}
        for number in range(count):
            key = f"{unit:05d}{number:04d}"
            files[f"{key}.jpg"] = picture(100 * unit + number, kind="JPEG")
            files[f"{key}.json"] = json.dumps({"caption": f"from json {key}", "status": "success"}).encode()
            if number % 2:
                files[f"{key}.txt"] = f"from text {key}\n".encode()
        if unit == 0:
            del files["000000002.json"]
        tar(folder / f"{unit:05d}.tar", files)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: whole.rindex(b"000010005.jpg") + 700])
    return folder


def preparation(
    source: Path, folder: Path, rank: int = 0, world: int = 1, max_bad: float = 0.5, shard_size: int = 4
) -> Preparation:
    found = (imagenet if "imagenet" in source.name else text_image).source(source, shard_size, 1)
    encoding = Encoding(image_size=8, batch=3, readers=2)
    manifest = encoding.manifest(found, "tiny", "made up")
    return Preparation(folder, found, encoding, manifest, shard_size, max_bad, rank, world, patience=0.05)


@pytest.fixture(scope="module")
def prepared(images: Path, tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files that one uncut process makes of each source."""
    found = {}
    for source in (images, tars):
        folder = tmp_path_factory.mktemp("prepared") / "tiny"
        assert preparation(source, folder).run() is not None
        found[source.name] = content(folder)
    return found


@pytest.mark.parametrize("name", ["images", "tars"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_same_bytes_for_any_number_of_ranks(
    name: str, world: int, request: pytest.FixtureRequest, prepared: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    source = request.getfixturevalue(name)
    reports = [preparation(source, tmp_path / "tiny", rank, world).run() for rank in reversed(range(world))]
    assert [report is None for report in reports] == [True] * (world - 1) + [False]
    assert content(tmp_path / "tiny") == prepared[source.name]


@pytest.mark.slow
def test_processes_that_run_at_once_meet_in_the_folder(
    images: Path, prepared: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "imagenet",
        "--source",
        str(images),
        "--out",
        str(tmp_path / "tiny"),
        "--image-size",
        "8",
        "--shard-size",
        "4",
        "--batch",
        "3",
        "--readers",
        "2",
        "--max-bad",
        "0.5",
        "--name",
        "tiny",
        "--license",
        "made up",
        "--patience",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "21 samples in 6 units (written); 2 bad, listed in bad.jsonl" in told[0]
    assert "this rank's 3 of 6 units are there" in told[1]
    assert content(tmp_path / "tiny") == prepared[images.name]


def test_rank_0_waits_for_the_others_and_says_who_is_missing(
    images: Path, prepared: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"4 of 6 units are not there .* ranks 1, 2 of 3 have stopped or never started; run the command"
    ):
        preparation(images, tmp_path / "tiny", 0, 3).run()
    waiting = replace(preparation(images, tmp_path / "tiny", 0, 3), patience=60.0)
    reports: list[Report | None] = []
    thread = threading.Thread(target=lambda: reports.append(waiting.run()))
    thread.start()
    preparation(images, tmp_path / "tiny", 2, 3).run()
    preparation(images, tmp_path / "tiny", 1, 3).run()
    thread.join(timeout=60)
    assert reports == [Report(seen=COUNT, bad=2, cut=0, made=0)]
    assert content(tmp_path / "tiny") == prepared[images.name]


@pytest.mark.parametrize("name", ["images", "tars"])
def test_a_repeated_run_makes_nothing(
    name: str, request: pytest.FixtureRequest, prepared: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    source, folder = request.getfixturevalue(name), tmp_path / "tiny"
    first = preparation(source, folder).run()
    assert first is not None and first.made > 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    told: list[int] = []
    assert preparation(source, folder).run(told.append) == replace(first, made=0)
    assert sum(told) == first.seen
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["images", "tars"])
def test_killed_at_any_write_it_goes_on_where_it_was(
    name: str,
    request: pytest.FixtureRequest,
    prepared: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut after the n-th file for every n, then run again: the same bytes, and whole shards are not made again."""
    source, folder = request.getfixturevalue(name), tmp_path / "tiny"
    renamed, budget = 0, 0
    replaced = Path.replace

    def mortal(self: Path, target: Path) -> Path:
        nonlocal renamed
        if renamed == budget:
            raise KeyboardInterrupt
        renamed += 1
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", mortal)
    runs = 0
    while True:
        renamed, budget, runs = 0, 5, runs + 1  # a run dies at its sixth file
        try:
            preparation(source, folder).run()
        except KeyboardInterrupt:
            continue
        break
    assert runs > 3
    assert content(folder) == prepared[source.name]


@pytest.mark.slow
def test_killed_with_sigkill_it_goes_on(images: Path, prepared: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """Two processes die by SIGKILL when the first shard is there; two others finish."""
    many = tmp_path / "imagenet-many"
    for copy in range(30):
        for number in range(0, COUNT, 6):
            path = many / f"n{number % 3}" / f"c{copy:02d}p{number:02d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(100 * copy + number, 200, 160, "JPEG"))
    preparation(many, tmp_path / "uncut").run()
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests/data_prep']; from test_prepare import "
        "preparation;"
        "preparation(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 2).run()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    folder = tmp_path / "tiny"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(many), str(folder), str(rank)], cwd=ROOT, env=environment)
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 120
    while not list(folder.glob("journal/tiny-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in processes]
    assert -signal.SIGKILL in codes
    assert not (folder / "manifest.json").exists()
    kept = {
        path.name: path.stat().st_ino
        for path in folder.glob("*.tar")
        if (folder / "journal" / f"{path.stem}.json").exists()
    }
    assert kept
    preparation(many, folder, 1, 2).run()
    preparation(many, folder, 0, 2).run()
    assert content(folder) == content(tmp_path / "uncut")
    assert {name: (folder / name).stat().st_ino for name in kept} == kept


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
@pytest.mark.parametrize(
    "file",
    [
        "tiny-000002.tar",
        "tiny-000002.index.npy",
        "journal/tiny-000002.json",
        "journal/tiny-000002.end.json",
        "journal/recipe.json",
    ],
)
def test_what_was_damaged_is_made_again(
    images: Path, prepared: dict[str, dict[str, bytes]], tmp_path: Path, damage: str, file: str
) -> None:
    folder = tmp_path / "tiny"
    preparation(images, folder).run()
    inodes = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    changed = bytearray((folder / file).read_bytes())
    changed[len(changed) // 2] ^= 255
    (folder / file).unlink()
    if damage != "gone":
        (folder / file).write_bytes(changed if damage == "changed" else changed[: len(changed) // 2])
    assert preparation(images, folder).run() is not None
    assert content(folder) == prepared[images.name]
    now = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    assert {name for name in now if now[name] != inodes[name]} <= {"tiny-000002.tar"}


def test_bad_samples_are_listed_and_leave_their_place_out(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    report = preparation(images, folder).run()
    assert report is not None and (report.seen, report.bad) == (COUNT, 2)
    listed = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert sorted(entry["place"] for entry in listed) == ["n1/p04.JPEG", "n2/p05.JPEG"]
    assert all(entry["reason"].startswith("does not decode") for entry in listed)
    dataset = Dataset.open(folder)
    dataset.verify()
    assert sum(dataset.sizes) == COUNT - 2
    assert max(dataset.sizes) == 4 and len(dataset.sizes) == 6  # the cut is by samples of the source
    keys = {dataset.address(shard, sample)[1] for shard, size in enumerate(dataset.sizes) for sample in range(size)}
    assert keys == {f"p{number:02d}" for number in range(COUNT)} - {"p04", "p05"}


def test_a_shard_of_bad_samples_only_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    for number in range(6):
        path = folder / f"n{number}" / f"p{number}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"bad" if number != 3 else picture(3))
    report = preparation(folder, tmp_path / "tiny", max_bad=0.9, shard_size=1).run()
    assert report == Report(seen=6, bad=5, cut=0, made=6)
    assert Dataset.open(tmp_path / "tiny").sizes == (1,)
    assert preparation(folder, tmp_path / "tiny", max_bad=0.9, shard_size=1).run() == replace(report, made=0)
    (folder / "n3" / "p3.png").write_bytes(b"bad" + bytes(5))
    with pytest.raises(DataError, match="no sample that can be used"):
        preparation(folder, tmp_path / "none", max_bad=1.0, shard_size=1).run()


def test_too_many_bad_samples_stop_it_and_the_list_is_there(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    with pytest.raises(
        DataError,
        match=r"\d of the \d+ samples seen so far are bad, more than --max-bad 0.05 of all \(n\d/p0[45].*--max-bad",
    ):
        preparation(images, folder, max_bad=0.05).run()
    assert (folder / "bad.jsonl").read_text().count("does not decode") >= 1
    assert not (folder / "manifest.json").exists()
    report = preparation(images, folder, max_bad=2 / COUNT).run()  # more allowed: what was made is kept
    assert report is not None and report.bad == 2 and report.made < 6


def test_no_rank_sees_too_many_but_all_together_do(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    for number in range(8):
        path = folder / "n0" / f"p{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bad" if number < 4 else picture(number))
    ranks = [preparation(folder, tmp_path / "tiny", rank, 4, max_bad=0.4, shard_size=1) for rank in range(4)]
    assert [rank.run() for rank in ranks[1:]] == [None] * 3
    with pytest.raises(DataError, match="4 of the 8 samples seen so far are bad, more than --max-bad 0.4"):
        ranks[0].run()


def test_other_folders_and_other_options_are_refused(images: Path, tars: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    preparation(images, folder).run()
    before = content(folder)
    with pytest.raises(DataError, match=r"was begun with another shard_size \(4, now 5\); go on with the options"):
        preparation(images, folder, shard_size=5).run()
    with pytest.raises(DataError, match="holds another dataset: its num_classes is 3, now it would be 0"):
        preparation(tars, folder).run()
    other = preparation(images, folder)
    with pytest.raises(DataError, match=r"holds other files \(tiny-000000"):
        replace(other, manifest=replace(other.manifest, name="huge")).run()
    with pytest.raises(DataError, match="--rank 2 of --world 2 does not exist"):
        preparation(images, folder, 2, 2).run()
    assert content(folder) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(DataError, match=r"holds other files \(cat\.jpg\); choose another"):
        preparation(images, tmp_path / "photos").run()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot prepare .*Not a directory"):
        preparation(images, tmp_path / "file").run()


def test_a_source_that_changed_is_another_source(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    (folder / "n0").mkdir(parents=True)
    for number in range(3):
        (folder / "n0" / f"p{number}.png").write_bytes(picture(number))
    preparation(folder, tmp_path / "tiny").run()
    (folder / "n0" / "p3.png").write_bytes(picture(3))
    with pytest.raises(DataError, match="holds another dataset: its source is"):
        preparation(folder, tmp_path / "tiny").run()


def test_shards_are_read_by_plain_webdataset(images: Path, tars: Path, tmp_path: Path) -> None:
    for source in (images, tars):
        folder = tmp_path / source.name
        preparation(source, folder).run()
        dataset = Dataset.open(folder)
        found = list(
            webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False).decode()
        )
        places = [(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]
        assert len(found) == len(places) > 10
        for sample, place in zip(found, places, strict=True):
            array, condition = read_sample(dataset, *place)
            assert sample["__key__"] == dataset.address(*place)[1]
            np.testing.assert_array_equal(sample["pixels.npy"], array)
            if isinstance(condition, int):
                assert sample["cls"] == condition
            else:
                assert [(entry["text"], entry["weight"]) for entry in sample["captions.json"]] == [
                    (c.text, c.weight) for c in condition
                ]


def test_a_source_that_cannot_be_read_is_not_a_bad_image(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = imagenet.source(images, 4)
    moved = tmp_path / "imagenet"
    for name, file in content(images).items():
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        (moved / name).write_bytes(file)
    begun = preparation(moved, tmp_path / "tiny")
    (moved / "n0" / "p00.JPEG").unlink()
    with pytest.raises(DataError, match=r"p00.JPEG: cannot be read \(No such file"):
        begun.run()
    assert found.num_samples == COUNT
    assert main(["imagenet", "--source", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2
    assert "absent: cannot be read (No such file or directory); give another folder" in capsys.readouterr().err


def test_journals_say_what_the_manifest_says(prepared: dict[str, dict[str, bytes]]) -> None:
    for files in prepared.values():
        manifest = json.loads(files["manifest.json"])
        notes = [
            json.loads(text)
            for name, text in files.items()
            if name.startswith(f"{prepare.JOURNAL}/tiny") and ".end." not in name
        ]
        assert [note["shard"] for note in notes] == manifest["shards"]
