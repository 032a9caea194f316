"""Latents by native code are those of NumPy to the bit, and whatever is unusual is left to the plain way."""

import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.write import write_dataset
from diffmoe_ep.data import native
from diffmoe_ep.data.loader.micro_steps import MicroSteps
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.data.sample import Batch, decode_label, encode, final_latent
from diffmoe_ep.data.shards import Dataset

needs_code = pytest.mark.skipif(native.problem() is not None, reason=f"no native code here: {native.problem()}")


def moments(shape: tuple[int, int, int] = (2, 3, 5), flips: int = 2, **others: Any) -> Manifest:
    facts = {"scale": 0.18215, "shift": -0.125, "num_classes": 40} | others
    return Manifest(
        "tiny",
        "moments",
        shape,
        "float16",
        facts["scale"],
        facts["shift"],
        facts["num_classes"],
        (),
        "made up",
        flips=flips,
    )


def written(folder: Path, facts: Manifest, count: int = 24, seed: int = 0) -> Dataset:
    arrays = np.random.default_rng(seed).normal(size=(count, *facts.stored_shape), scale=3).astype(np.float16)
    samples = [(f"k{number:03d}", encode(array, number, facts)) for number, array in enumerate(arrays)]
    return write_dataset(folder, samples, facts, shard_size=5)


def stream(dataset: Dataset | Mixture, **others: Any) -> Stream:
    facts: dict[str, Any] = {
        "seed": 3, "batch": 12, "accumulation": 1, "rank": 0, "world": 1, "drop_condition": 0.2, "flip": True, "shuffle_block": 2,
        "workers": 0, "prefetch": 1,
    }  # fmt: skip
    return Stream(dataset, **(facts | others))


@needs_code
def test_checksums_are_zlib_s() -> None:
    library, content = native._library(), np.random.default_rng(0).bytes(70_000)
    for size in (*range(700), 1023, 1024, 1025, 4096, 32_896, 69_999):
        assert library.checksum(content[1 : size + 1], size) == zlib.crc32(content[1 : size + 1]), size


@needs_code
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 8, 8), (1, 5, 13)])
@pytest.mark.parametrize("scale", [0.18215, 1.0])
def test_latents_are_final_latents(shape: tuple[int, int, int], scale: float) -> None:
    facts = moments(shape, scale=scale)
    code, drawn = native.Moments(facts), np.random.default_rng(1)
    for position in range(20):
        array = drawn.normal(size=facts.stored_shape, scale=10.0 ** (position % 5 - 2)).astype(np.float16)
        for mirrored in (False, True):
            latent = generator_for(3, position, "posterior").standard_normal(shape, dtype=np.float32)
            assert code.sample(np.ascontiguousarray(array[int(mirrored)]), latent)
            np.testing.assert_array_equal(latent, final_latent(array, facts, mirrored, 3, position))


@needs_code
def test_every_number_that_float16_holds() -> None:
    """As mean and as log-variance, subnormal ones, both zeros and both ends included."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    facts = moments((1, 1, len(every)), flips=1)
    array = np.stack([every, every[::-1]])[None, :, None]
    latent = generator_for(0, 5, "posterior").standard_normal(facts.shape, dtype=np.float32)
    assert native.Moments(facts).sample(array[0], latent)
    np.testing.assert_array_equal(latent, final_latent(array, facts, False, 0, 5))


@needs_code
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 31, 59])
def test_what_is_not_finite_is_told_and_nothing_is_touched(bad: float, place: int) -> None:
    facts = moments()
    array = np.full(facts.stored_shape[1:], 65504, np.float16)
    array.flat[place] = bad
    latent = np.arange(30, dtype=np.float32).reshape(facts.shape)
    assert not native.Moments(facts).sample(array, latent)
    np.testing.assert_array_equal(latent, np.arange(30).reshape(facts.shape))


def same(one: Iterator[Batch], other: Iterator[Batch], steps: int = 7) -> None:
    for _ in range(steps):
        first, second = next(one), next(other)
        for name in ("latent", "noise", "u", "condition", "position"):
            np.testing.assert_array_equal(getattr(first, name).numpy(), getattr(second, name).numpy(), err_msg=name)


@needs_code
@pytest.mark.parametrize("max_open", [128, 1])
@pytest.mark.parametrize("flips", [1, 2])
def test_a_stream_is_the_same_without(
    tmp_path: Path, flips: int, max_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of several datasets, and where shards are closed while others are opened."""
    names = [tmp_path / name for name in "ab"]
    facts = [moments(flips=flips), moments(flips=flips)]
    parts = [written(folder, each, seed=seed) for seed, (folder, each) in enumerate(zip(names, facts, strict=True))]

    def opened() -> Mixture:
        return Mixture(
            [Dataset(folder, part.manifest, max_open) for folder, part in zip(names, parts, strict=True)], [2, 1]
        )

    quick = stream(opened(), flip=flips == 2)
    read: list[int] = []
    read_latents = native.read_latents

    def counted(requests: Any, latents: np.ndarray) -> list[int]:
        found = read_latents(requests, latents)
        read.append(sum(label >= 0 for label in found))
        return found

    monkeypatch.setattr(native, "read_latents", counted)
    monkeypatch.setattr(native, "takes", lambda manifest: False)
    same(quick, stream(opened(), flip=flips == 2))
    assert sum(read) == (7 * 12 if max_open > 1 else 0)  # with one shard open at a time every group closes some


@needs_code
def test_bad_samples_are_replaced_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = written(tmp_path / "a", moments())
    index = np.load(tmp_path / "a/tiny-000001.index.npy")
    with (tmp_path / "a/tiny-000001.tar").open("r+b") as file:
        file.seek(int(index["moments.npy"]["offset"][2]) + 150)
        file.write(b"????")
        file.seek(int(index["cls"]["offset"][3]))
        file.write(b"x")
    faults: list[list[Any]] = []
    for taken in (True, False):
        if not taken:
            monkeypatch.setattr(native, "takes", lambda manifest: False)
        streams = stream(Dataset(tmp_path / "a", dataset.manifest), max_bad_fraction=0.5)
        source = streams._source
        assert isinstance(source, MicroSteps)
        faults.append([source[step] for step in range(4)])
    for (one, first), (other, second) in zip(*faults, strict=True):
        assert first == second
        np.testing.assert_array_equal(one.latent.numpy(), other.latent.numpy())
        np.testing.assert_array_equal(one.condition.numpy(), other.condition.numpy())
    assert sorted({fault.key for _, each in faults[0] for fault in each}) == ["k007", "k008"]


@needs_code
@pytest.mark.parametrize("text", [b"0", b"39", b"007", b"40", b"", b"x", b"1x", b"-1", b" 1", b"1" * 19, b"0" * 18])
def test_labels_are_those_of_decode_label(tmp_path: Path, text: bytes) -> None:
    facts = moments()
    array, path = encode(np.ones(facts.stored_shape, np.float16), 0, facts)["moments.npy"], tmp_path / "file"
    path.write_bytes(text + array)
    try:
        wanted = decode_label({"cls": text}, facts)
    except ValueError:
        wanted = -1
    assert (
        asked(
            path,
            facts,
            [0, len(text) + len(array), 0, len(text), zlib.crc32(text), len(text), len(array), zlib.crc32(array)],
        )
        == wanted
    )


def asked(path: Path, facts: Manifest, numbers: list[int]) -> int:
    code, latents = native.Moments(facts), np.zeros((1, *facts.shape), np.float32)
    with path.open("rb") as file:
        (label,) = native.read_latents([code.address, file.fileno(), 0, *numbers], latents)
    assert (latents != 0).any() == (label >= 0)
    return label


@needs_code
@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("number", [-1, 1, 7, 2**31, 2**62, -(2**63), 2**63 - 1])
def test_numbers_of_a_damaged_index_read_nothing(tmp_path: Path, place: int, number: int) -> None:
    facts, path = moments(), tmp_path / "file"
    array = encode(np.ones(facts.stored_shape, np.float16), 0, facts)["moments.npy"]
    path.write_bytes(b"5" + array)
    numbers = [0, 1 + len(array), 0, 1, zlib.crc32(b"5"), 1, len(array), zlib.crc32(array)]
    assert asked(path, facts, numbers) == 5
    if numbers[place] != number:
        numbers[place] = number
        assert asked(path, facts, numbers) == -1


def test_without_a_compiler_a_stream_is_the_same_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = written(tmp_path / "a", moments())
    quick = stream(dataset)
    expected = [next(quick) for _ in range(7)]
    monkeypatch.setenv("PATH", str(tmp_path))
    native._library.cache_clear()
    try:
        capsys.readouterr()
        other = stream(Dataset(tmp_path / "a", dataset.manifest))
        said = "latents are made without native code, slower and the same to the bit: there is no C++ compiler (c++, g++ or clang++)"
        assert said in capsys.readouterr().err
        assert stream(Dataset(tmp_path / "a", dataset.manifest), rank=1, world=2)
        assert capsys.readouterr().err == ""
        same(iter(expected), other)
    finally:
        native._library.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_it_is_built_once_and_anew_when_its_source_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "moments.cpp"
    source.write_bytes(native.SOURCE.read_bytes())
    monkeypatch.setattr(native, "SOURCE", source)
    first = native._built()
    made = first.stat().st_mtime_ns
    assert native._built() == first and first.stat().st_mtime_ns == made
    source.write_text(source.read_text() + "// more\n")
    assert native._built() != first
    source.write_text("this is no C++\n")
    native._library.cache_clear()
    try:
        problem = native.problem()
        assert problem is not None and "failed: " in problem and "moments.cpp:1" in problem
    finally:
        native._library.cache_clear()
    assert sorted(path.suffix for path in (tmp_path / ".cache/diffmoe_ep").iterdir()) == [
        ".so",
        ".so",
    ]  # nothing half-made is left


def test_code_is_loaded_from_no_folder_that_others_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache/diffmoe_ep"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    if shutil.which("c++") or shutil.which("g++"):
        with pytest.raises(RuntimeError, match=r"\.cache/diffmoe_ep is not this user's alone"):
            native._built()
    assert list(folder.iterdir()) == []
