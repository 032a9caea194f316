"""The fast way to a sample is the checked way, or none at all; and the checksum is zlib's, whoever computes it."""

import io
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.write import write_dataset
from diffmoe_ep.data.checked import read_labelled
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.latent import oriented
from diffmoe_ep.data.loader.fast_reader import FastReader
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.remote.fetch import Unavailable
from diffmoe_ep.data.shards import Dataset, fastest_crc32

PIXELS = Manifest("tiny", "pixels", (1, 2, 3), "uint8", 0.5, -1.0, 40, (), "made up")
MOMENTS = Manifest("tiny", "moments", (2, 2, 2), "float16", 0.18215, 0.0, 40, (), "made up", flips=2)


def write(folder: Path, manifest: Manifest) -> Dataset:
    arrays = np.random.default_rng(0).integers(0, 99, (12, *manifest.stored_shape)).astype(manifest.dtype)
    return write_dataset(
        folder,
        [(f"k{n:03d}", encode(array, n * 3, manifest)) for n, array in enumerate(arrays)],
        manifest,
        shard_size=5,
    )


@pytest.mark.parametrize("manifest", [PIXELS, MOMENTS], ids=["pixels", "moments"])
def test_the_fast_way_is_the_checked_way(tmp_path: Path, manifest: Manifest) -> None:
    dataset = write(tmp_path / "tiny", manifest)
    assert FastReader.supports(dataset)
    fast = FastReader(dataset)
    for flipped in (False, True):
        for shard, size in enumerate(dataset.sizes):
            for sample in range(size):
                array, label = read_labelled(dataset, shard, sample)
                found = fast.read(shard, sample, flipped)
                assert found is not None
                assert found[1] == label
                assert found[0].dtype == array.dtype
                np.testing.assert_array_equal(found[0], oriented(array, manifest, flipped))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("pixels", "float16"), ("pixels", "float32"), ("moments", "float16"), ("moments", "float32")]
)
def test_values_that_are_not_finite_are_skipped(tmp_path: Path, kind: Any, dtype: str, bad: float) -> None:
    """Of moments only those of the image, or of its mirror image, that are used; also beside the largest numbers."""
    flips = 2 if kind == "moments" else 1
    manifest = Manifest("tiny", kind, (3, 5, 7), dtype, 1.0, 0.0, 4, (), "made up", flips=flips)
    arrays = np.full((2, *manifest.stored_shape), np.finfo(dtype).max, dtype)
    samples = [(f"k{number}", encode(array, 1, manifest)) for number, array in enumerate(arrays)]
    arrays[1].flat[100] = bad
    samples[1][1][f"{kind}.npy"] = samples[1][1][f"{kind}.npy"][: -arrays[1].nbytes] + arrays[1].tobytes()
    fast = FastReader(write_dataset(tmp_path / "tiny", samples, manifest, shard_size=5))
    assert fast.read(0, 0, False) is not None
    assert fast.read(0, 1, False) is None
    assert (fast.read(0, 1, True) is None) == (kind == "pixels")


def test_what_is_bad_or_unusual_is_left_to_the_checked_way(tmp_path: Path) -> None:
    dataset = write(tmp_path / "tiny", PIXELS)
    path, folder = tmp_path / "tiny/tiny-000000.index.npy", tmp_path / "tiny"
    index = np.load(path)
    with (folder / "tiny-000000.tar").open("r+b") as file:

        def overwrite(sample: int, member: str, content: bytes, at: int = 0) -> None:
            file.seek(int(index[member]["offset"][sample]) + at)
            file.write(content)
            file.seek(int(index[member]["offset"][sample]))
            index[member]["crc32"][sample] = zlib.crc32(file.read(int(index[member]["size"][sample])))

        overwrite(1, "cls", b"x")
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1, 2, 3)})
        other = header.getvalue().replace(b"'descr': '|u1'", b"'descr':'|u1' ")
        assert len(other) == len(header.getvalue())
        overwrite(2, "pixels.npy", other)
        file.seek(int(index["pixels.npy"]["offset"][3]) + 130)
        file.write(b"?")  # the checksum is that of what was there
    np.save(path, index)
    fast = FastReader(dataset)
    found = [fast.read(0, sample, False) for sample in range(5)]
    assert [each is None for each in found] == [False, True, True, True, False]
    assert read_labelled(dataset, 0, 2)[1] == 6  # spelt in another way, but sound
    os.truncate(folder / "tiny-000001.tar", 600)
    assert fast.read(1, 4, False) is None
    path.with_name("tiny-000001.index.npy").write_bytes(b"")
    assert FastReader(Dataset(folder, dataset.manifest)).read(1, 0, False) is None
    (folder / "tiny-000002.tar").unlink()
    with pytest.raises(Unavailable, match=r"tiny-000002\.tar"):
        fast.read(2, 0, False)


@pytest.mark.parametrize("installed", [True, False])
def test_checksums_are_zlib_s(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "isal", None)
    fastest_crc32.cache_clear()
    crc32, content = fastest_crc32(), np.random.default_rng(0).bytes(100_001)
    fastest_crc32.cache_clear()
    for size in (0, 1, 7, 16, 4096, 100_000):
        for held in (content[:size], memoryview(content)[1 : size + 1]):
            assert crc32(held) == zlib.crc32(held)
    assert crc32 is zlib.crc32 or installed
