"""A dataset on disk: plain webdataset tars that are read by index, and every way in which a folder can be wrong."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_prep.write import write_dataset
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.integrity import check_folder
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.shards import Dataset, load_index, parse_index

FACTS = Manifest("tiny", "pixels", (1, 2, 3), "uint8", 0.5, -1.0, 4, ("a", "b", "c", "d"), "made up")


def arrays(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (count, 1, 2, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven samples in shards of four, four and three."""
    samples = ((f"k{number:03d}", encode(array, number % 4, FACTS)) for number, array in enumerate(arrays(11)))
    write_dataset(tmp_path / "tiny", samples, FACTS, shard_size=4)
    return tmp_path / "tiny"


def test_every_sample_is_read_by_its_index(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.sizes == (4, 4, 3)
    found = [dataset.read(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]
    assert found == [encode(array, number % 4, FACTS) for number, array in enumerate(arrays(11))]
    assert dataset.where(2, 1) == f"{folder / 'tiny-000002.tar'}, key k009"


def test_plain_webdataset_reads_the_same(folder: Path) -> None:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"k{number:03d}" for number in range(11)]
    assert [sample["cls"] for sample in samples] == [number % 4 for number in range(11)]
    np.testing.assert_array_equal(np.stack([sample["pixels.npy"] for sample in samples]), arrays(11))


def test_manifest_comes_back_and_fingerprint_follows_content(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(folder)
    manifest = dataset.manifest
    assert (manifest.num_samples, manifest.class_names, manifest.shape) == (11, ("a", "b", "c", "d"), (1, 2, 3))
    assert manifest.to_json() == (folder / "manifest.json").read_text()
    assert dataset.fingerprint == Dataset.open(folder).fingerprint
    other = write_dataset(tmp_path / "other", [("k", encode(arrays(1)[0], 0, FACTS))], FACTS, shard_size=4)
    assert other.fingerprint != dataset.fingerprint


def test_open_shards_are_bounded_pickled_and_forked(folder: Path) -> None:
    dataset = Dataset(folder, Dataset.open(folder).manifest, max_open=1)
    before = len(os.listdir("/proc/self/fd"))
    expected = [dataset.read(shard, 0) for shard in (0, 1, 2, 0)]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert [pickle.loads(pickle.dumps(dataset)).read(shard, 0) for shard in (0, 1, 2, 0)] == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if [dataset.read(shard, 0) for shard in (2, 1, 0)] == [expected[2], expected[1], expected[0]] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert dataset.read(0, 0) == expected[0]
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["tiny-000001.tar", "tiny-000001.index.npy"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=re.escape(name) + ".*; prepare"):
        Dataset.open(folder)


def test_missing_empty_and_half_prepared_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not exist; prepare .*python -m data_prep digits"):
        Dataset.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is empty; prepare"):
        Dataset.open(tmp_path / "empty")
    with pytest.raises(DataError, match=r"manifest\.json is not a folder"):
        Dataset.open(folder / "manifest.json")
    with pytest.raises(DataError, match=r"there is one in .*tiny; name one"):
        Dataset.open(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        Dataset.open(folder)


def test_a_shard_of_another_size_is_refused(folder: Path) -> None:
    path = folder / "tiny-000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"tiny-000002\.tar has \d+ bytes, the manifest says"):
        Dataset.open(folder)


def test_an_index_that_disagrees_is_refused(folder: Path) -> None:
    path = folder / "tiny-000001.index.npy"
    (folder / "tiny-000000.index.npy").write_bytes((folder / "tiny-000002.index.npy").read_bytes())
    with pytest.raises(DataError, match=r"tiny-000000\.index\.npy has 3 samples, the manifest says 4"):
        Dataset.open(folder)
    for content in (b"", b"garbage", path.read_bytes()[:-1], path.read_bytes() + b"!", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tiny-000001\.index\.npy"):
            Dataset.open(folder)
    np.save(path, np.zeros(4))
    with pytest.raises(DataError, match=r"holds columns float64, expected key, cls, pixels\.npy"):
        Dataset.open(folder)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"tiny-000001\.index\.npy"):
        Dataset.open(folder)


HEADERS = {
    "no end of its text": b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'x': ''' }",
    "no end of its brackets": b"(" * 300,
    "a sum": b"{'descr': '<f4' + 1, 'fortran_order': False, 'shape': (3,), }",
    "more than there is memory": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }",
    "more than there are numbers": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1%s,), }" % (b"0" * 60),
    "no type": b"{'descr': '<q9', 'fortran_order': False, 'shape': (3,), }",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_no_index_has_are_refused(folder: Path, header: str) -> None:
    text = HEADERS[header].ljust(500) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12)
    path = folder / "tiny-000001.index.npy"
    path.write_bytes(content)
    for read in (
        lambda: Dataset.open(folder),
        lambda: load_index(path, FACTS.fields),
        lambda: parse_index(content, FACTS.fields, "there"),
    ):
        with pytest.raises(DataError, match=r"tiny-000001\.index\.npy|there"):
            read()


def test_many_problems_make_one_short_line(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        Dataset.open(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("has 0 bytes") == 3


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_noticed_on_read_and_by_verify(folder: Path) -> None:
    index = load_index(folder / "tiny-000000.index.npy", FACTS.fields)
    flip_byte(folder / "tiny-000000.tar", int(index[2]["pixels.npy"]["offset"]) + 130)
    dataset = Dataset.open(folder)  # the quick check does not read the content
    assert dataset.read(0, 1)
    with pytest.raises(DataError, match=r"tiny-000000\.tar, key k002: pixels\.npy is damaged"):
        dataset.read(0, 2)
    with pytest.raises(DataError, match=r"tiny-000000\.tar is damaged"):
        dataset.verify()


def test_a_flipped_byte_in_an_index_is_noticed_by_verify(folder: Path) -> None:
    path = folder / "tiny-000001.index.npy"
    flip_byte(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"tiny-000001\.index\.npy is damaged"):
        Dataset.open(folder).verify()
    with pytest.raises(DataError, match=r"tiny-000001\.tar, key k007: pixels\.npy is damaged"):
        Dataset.open(folder).read(1, 3)


def test_shards_that_change_after_opening_are_noticed(folder: Path) -> None:
    dataset = Dataset.open(folder)
    os.truncate(folder / "tiny-000000.tar", 1000)
    (folder / "tiny-000001.tar").unlink()
    (folder / "tiny-000002.index.npy").unlink()
    with pytest.raises(DataError, match=r"tiny-000000\.tar, key k003: cls is truncated"):
        dataset.read(0, 3)
    with pytest.raises(DataError, match=r"tiny-000001\.tar: cannot open"):
        dataset.read(1, 0)
    with pytest.raises(DataError, match=r"tiny-000002\.index\.npy: cannot open"):
        dataset.read(2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format is 3, expected 2 or 1"),
        ({"name": "../up"}, "name is '../up', expected a plain name"),
        ({"name": 3}, r"name is 3 \(int\), expected str"),
        ({"kind": "video"}, "kind is 'video', expected pixels or moments"),
        ({"dtype": "object"}, "dtype is 'object'"),
        ({"kind": "moments"}, "dtype is 'uint8', expected one of float16, float32 for moments"),
        ({"shape": [1, 8]}, r"shape is \[1, 8\]"),
        ({"shape": [1, 8, "8"]}, "shape"),
        ({"shape": [1, 0, 8]}, "shape"),
        ({"shape": {"C": 1}}, "expected list"),
        ({"scale": 0}, "scale is 0.0"),
        ({"scale": "1"}, r"scale is '1' \(str\), expected float"),
        ({"scale": 10**400}, r"not a JSON file \(it holds a whole number of 401 digits\)"),
        ({"scale": 10**19}, r"scale is 1000.* \(int\), expected float"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"num_classes": True}, r"num_classes is True \(bool\), expected int"),
        ({"num_classes": 0, "class_names": []}, "num_classes is 0"),
        ({"class_names": ["a"]}, "class_names .* expected 4 names"),
        ({"class_names": [1, 2, 3, 4]}, "class_names"),
        ({"flips": 2}, "flips is 2"),
        ({"num_samples": 12}, "num_samples is 12, expected 11"),
        ({"num_samples": 0, "shards": []}, "the dataset is empty"),
        ({"shards": [7]}, r"shards\[0\]: is a int"),
        ({"extra": 1}, "unknown: extra"),
        ({"licence": None}, "licence is None"),
    ],
)
def test_wrong_manifests_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message) as caught:
        Dataset.open(folder)
    assert str(path) in str(caught.value)
    assert "python -m data_prep" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../tiny-000000.tar"}, "not a plain file name"),
        ({"name": "/tmp/tiny-000000.tar"}, "not a plain file name"),
        ({"name": "a/b.tar"}, "not a plain file name"),
        ({"name": "..tar"}, "not a plain file name"),
        ({"name": "tiny.zip"}, "not a plain file name"),
        ({"name": "tiny-000001.tar"}, "named twice"),
        ({"num_samples": 0}, "no samples"),
        ({"bytes": -1}, "no samples, no bytes"),
        ({"bytes": "many"}, "expected int"),
        ({"sha256": "xyz"}, "no checksum"),
        ({"colour": 1}, "unknown: colour"),
    ],
)
def test_wrong_shard_entries_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        Dataset.open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000])
def test_manifests_that_are_no_manifests_are_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset.open(folder)


@pytest.mark.parametrize("num", [10**8, 10**15])
@pytest.mark.parametrize("tolerant", [False, True])
def test_samples_that_cannot_be_there_cost_nothing(folder: Path, num: int, tolerant: bool) -> None:
    """Neither those that the manifest says have no bytes, nor those whose bytes are not on the disk."""
    path, index = folder / "manifest.json", folder / "tiny-000000.index.npy"
    content = json.loads(path.read_text())
    content["shards"][0]["num_samples"] = num
    content["num_samples"] = sum(shard["num_samples"] for shard in content["shards"])
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"shard tiny-000000.tar cannot hold {num} samples in "):
        Dataset.open(folder, tolerant=tolerant)
    content["shards"][0]["bytes"] = num * 10_000
    path.write_text(json.dumps(content))
    for header in (index.read_bytes(), index.read_bytes().replace(b"'shape': (4,)", b"'shape': (%d,)" % num)[:384]):
        index.write_bytes(header)
        with pytest.raises(DataError, match="shards do not match .*(has|have) [0-9]+ bytes"):
            Dataset.open(folder, tolerant=tolerant)


@pytest.mark.parametrize("name", ["manifest.json", "tiny-000000.tar", "tiny-000000.index.npy"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("tolerant", [False, True])
def test_what_is_no_file_is_never_waited_for(
    folder: Path, name: str, make: Callable[[Path], None], tolerant: bool
) -> None:
    opened = Dataset.open(folder)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(DataError, match=r"not a file|has no manifest\.json"):
        Dataset.open(folder, tolerant=tolerant)
    if name != "manifest.json":
        with pytest.raises(DataError, match="not a file"):
            opened.read(0, 0)
        assert any("not a file" in problem for problem in check_folder(folder).problems)


def test_a_member_beyond_all_bounds_takes_no_memory(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = 10**17
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "tiny-000000.index.npy"
    index = np.load(path)
    index["cls"]["size"][0] = 10**16
    np.save(path, index)
    with pytest.raises(DataError, match="cls is truncated"):
        Dataset.open(folder, tolerant=True).read(0, 0)
