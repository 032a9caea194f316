"""Tars that others made: found by their members, read as plain webdataset reads them, never changed, and every oddity
told.
"""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.index import MemberSpec, index_folder
from diffmoe_ep.data.integrity import check_folder
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.shards import Dataset

MOMENTS = MemberSpec(kind="moments", scale=0.5, name="theirs", licence="theirs")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def array_of(number: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=shape or (2, 4, 3, 2)).astype(np.float16)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(number: int, folder: str = "train/") -> list[tuple[str, bytes]]:
    key = f"{folder}img{number}"
    return [
        (f"{key}.jpg", b"\xff\xd8" * 300),
        (f"{key}.cls", f"{number % 7}\n".encode()),
        (f"{key}.vae.npy", npy(array_of(number))),
    ]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    for shard in range(2):
        write_tar(
            folder / f"part-{shard}.tar", [member for number in range(5) for member in sample(5 * shard + number)]
        )
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("aside", [False, True])
def test_foreign_tars_read_as_webdataset_reads_them(theirs: Path, tmp_path: Path, aside: bool) -> None:
    before, out = digests(theirs), tmp_path / "out" if aside else theirs
    found = index_folder(theirs, out, MemberSpec(kind="moments", array="vae.npy", scale=0.5, name="theirs"))
    assert found.problems == ()
    assert digests(theirs) == before
    assert {path.name for path in theirs.iterdir()} == set(before) if aside else len(list(theirs.iterdir())) == 5
    dataset = Dataset.open(out)
    dataset.verify()
    assert (dataset.sizes, dataset.manifest.num_classes, dataset.manifest.shape, dataset.manifest.flips) == (
        (5, 5),
        7,
        (2, 3, 2),
        2,
    )
    ours = [
        (dataset.address(shard, number)[1], *read_sample(dataset, shard, number))
        for shard in range(2)
        for number in range(5)
    ]
    plain = list(
        webdataset.WebDataset([str(theirs / f"part-{shard}.tar") for shard in range(2)], shardshuffle=False).decode()
    )
    assert [key for key, _, _ in ours] == [entry["__key__"] for entry in plain]
    assert [label for _, _, label in ours] == [entry["cls"] for entry in plain]
    np.testing.assert_array_equal(
        np.stack([array for _, array, _ in ours]), np.stack([entry["vae.npy"] for entry in plain])
    )
    assert check_folder(out).problems == ()
    with pytest.raises(DataError, match="exists; remove it to index anew"):
        index_folder(theirs, out, MOMENTS)


def test_what_is_wrong_is_left_out_and_told(tmp_path: Path) -> None:
    good = array_of(1)
    members = [
        ("a.cls", b"1"), ("a.npy", npy(good)),
        ("b.cls", b"2"),
        ("c.npy", npy(good)), ("c.cls", b"cat"),
        ("a.cls", b"1"), ("a.npy", npy(good)),
        ("d.cls", b"0"), ("d.npy", npy(np.full_like(good, np.nan))),
        ("e.cls", b"0"), ("e.npy", npy(good[:1])),
        ("f.cls", b"3"), ("f.cls", b"4"), ("f.npy", npy(good)),
        ("__notes__.txt", b"made on a Monday"),
        ("g.cls", b"0"), ("g.npy", npy(good)),
    ]  # fmt: skip
    path = write_tar(tmp_path / "in/one.tar", members)
    path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"\x93NUMPY") + 60])  # cut within g
    write_tar(tmp_path / "in/bad name.tar", [("h.cls", b"1"), ("h.npy", npy(good))])
    (tmp_path / "in/zip.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    found = index_folder(tmp_path / "in", tmp_path / "out", MOMENTS)
    dataset = Dataset.open(tmp_path / "out")
    assert [dataset.address(0, number)[1] for number in range(2)] == ["a", "f"]
    assert [read_sample(dataset, 0, number)[1] for number in range(2)] == [1, 3]
    told = "\n".join(found.problems)
    for text in (
        "key b: left out, it has no member npy (it has cls)",
        "key c: left out, cls: label b'cat'",
        "key a: left out, a sample with this",
        "key d: left out, moments.npy holds values that are not finite",
        "key e: left out, moments.npy holds float16 (1, 4, 3, 2)",
        "key f: member cls comes twice, the first is taken",
        "key g: left out, the tar ends within it",
        "bad name.tar: left out, its name is not plain",
        "zip.tar: it cannot be read to its end",
    ):
        assert text in told
    assert len(found.problems) == 10 or "one.tar: it cannot be read to its end" not in told


@pytest.mark.parametrize(
    ("array", "kind", "message"),
    [
        (
            array_of(1, 4, 3, 2),
            "moments",
            r"its array is float16 \(4, 3, 2\); moments are float16 or float32 \(flips, 2C, H, W\)",
        ),
        (array_of(1, 3, 4, 3, 2), "moments", r"\(flips, 2C, H, W\)"),
        (array_of(1, 1, 3, 3, 2), "moments", r"\(flips, 2C, H, W\)"),
        (np.zeros((3, 4, 4)), "pixels", r"its array is float64 \(3, 4, 4\)"),
    ],
)
def test_arrays_that_we_do_not_read_are_told(tmp_path: Path, array: np.ndarray, kind: str, message: str) -> None:
    write_tar(tmp_path / "in/one.tar", [("a.cls", b"1"), ("a.npy", npy(array))])
    with pytest.raises(DataError, match=message):
        index_folder(tmp_path / "in", tmp_path / "out", MemberSpec(kind=kind))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_folders_without_tars_and_too_few_classes(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        index_folder(tmp_path, tmp_path, MOMENTS)
    with pytest.raises(DataError, match="use --classes 7 or more"):
        index_folder(theirs, theirs, MemberSpec(kind="moments", array="vae.npy", num_classes=6))
    found = index_folder(theirs, theirs, MemberSpec(kind="moments", array="vae.npy", num_classes=1000))
    assert found.manifest.num_classes == 1000


def test_another_file_in_the_way_is_not_replaced(theirs: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "out/part-0.tar", [("z", b"")])
    with pytest.raises(DataError, match="exists and is another file"):
        index_folder(theirs, tmp_path / "out", MemberSpec(kind="moments", array="vae.npy"))


def test_what_is_no_tar_is_left_out_and_told(theirs: Path, tmp_path: Path) -> None:
    """A pipe, a device, a tar whose member has a size below 0, and one with a name that is no text."""
    os.mkfifo(theirs / "pipe.tar")
    (theirs / "zeros.tar").symlink_to("/dev/zero")
    header = bytearray(tarfile.TarInfo("a.cls").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # GNU's form for sizes of any length
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    (theirs / "backwards.tar").write_bytes(tarfile.TarInfo("b.cls").tobuf() + bytes(header) * 4)
    with tarfile.open(theirs / "names.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.addfile(tarfile.TarInfo("\udcff.cls"))
    found = index_folder(
        theirs, tmp_path / "out", MemberSpec(kind="moments", array="vae.npy", scale=0.5, name="theirs")
    )
    assert found.manifest.num_samples == 10
    problems = "\n".join(found.problems)
    problems.encode()
    assert "pipe.tar: left out, it cannot be read (it is a named pipe, not a file)" in problems
    assert "zeros.tar: left out, it cannot be read (it is a device, not a file)" in problems
    assert "backwards.tar: it cannot be read to its end (a member lies before the one that it follows)" in problems
    assert "names.tar, key \ufffd: left out" in problems
