"""The verbs of `diffmoe data`, on good and on damaged folders."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.write import write_dataset
from diffmoe_ep.cli import parse
from diffmoe_ep.config import UserError
from diffmoe_ep.data.codec import Caption, encode
from diffmoe_ep.data.inspect import colours
from diffmoe_ep.data.manifest import Manifest, TextEncoderInfo
from diffmoe_ep.data.shards import load_index

FACTS = Manifest("tiny", "pixels", (1, 6, 6), "uint8", 1 / 8, -1.0, 3, ("ant", "bee", "cat"), "made up")
MOMENTS = Manifest("tiny", "moments", (4, 4, 4), "float16", 0.18215, 0.5, 5, (), "made up", flips=2)
CAPTIONED = replace(MOMENTS, condition="text", num_classes=0, text=(TextEncoderInfo("t5", 3, 9, "float32", "0" * 64),))


def call(*words: str | Path) -> None:
    verb, options = parse(["data", *map(str, words)])
    verb.run(options)


def write(folder: Path, manifest: Manifest, count: int = 10) -> Path:
    drawn = np.random.default_rng(0)
    samples = []
    for number in range(count):
        array = drawn.normal(3.0, 2.0, manifest.stored_shape).clip(0, 16).astype(manifest.dtype)
        if manifest.condition == "text":
            condition = tuple(
                Caption(f"picture {number} of a very long story {n}", 1.0, (np.ones((2, 3), np.float16),))
                for n in range(2)
            )
        else:
            condition = number % min(3, manifest.num_classes)  # type: ignore[assignment]
        samples.append((f"k{number:03d}", encode(array, condition, manifest)))
    write_dataset(folder, samples, manifest, shard_size=4)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny", FACTS)


@pytest.mark.parametrize("facts", [FACTS, MOMENTS, CAPTIONED], ids=["pixels", "moments", "captions"])
def test_check_passes_what_is_sound(tmp_path: Path, facts: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    call("check", write(tmp_path / "tiny", facts))
    assert capsys.readouterr().out == f"{tmp_path / 'tiny'}: 10 sound samples in 3 shards, 0 problems\n"


def test_check_knows_what_else_lies_in_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a preparation and a run note beside the shards is theirs; what looks like a shard and is none is told."""
    (folder / "journal").mkdir()
    for name in (
        "journal/tiny-000000.json",
        "bad.jsonl",
        "bad.jsonl.7.partial",
        "quarantine.jsonl",
        "quarantine-rank0.jsonl",
        "README",
    ):
        (folder / name).write_text("{}\n")
    call("check", folder)
    assert capsys.readouterr().out.endswith(", 0 problems\n")
    for name in ("tiny-000009.tar", "tiny-000009.index.npy", "tiny-000009.tar.partial"):
        (folder / name).write_text("")
    assert problems(folder, capsys) == [
        f"tiny-000009.{ending} is not in the manifest" for ending in ("index.npy", "tar", "tar.partial")
    ]


@pytest.mark.parametrize("kind", ["pixels", "mean", "deviation"])
def test_check_warns_of_values_far_away(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Its exit code stays 0: the sample can be read as it should be."""
    facts = replace(FACTS if kind == "pixels" else MOMENTS, dtype="float32")
    drawn, samples = np.random.default_rng(0), []
    for number in range(10):
        array = drawn.normal(size=facts.stored_shape).astype(np.float32)
        if number == 7:
            array.reshape(-1)[-1 if kind == "deviation" else 0] = 20.0 if kind == "deviation" else -2e4
        if number == 8:
            array.reshape(-1)[0] = -200.0
        samples.append((f"k{number:03d}", encode(array, number % 3, facts)))
    write_dataset(tmp_path / "far", samples, facts, shard_size=4)
    call("check", tmp_path / "far")
    warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"warning: {tmp_path / 'far'}/tiny-000001.tar, key k007: its values, ")
    assert "deviations from the mean of all; a run may diverge at it" in warning
    assert last == f"{tmp_path / 'far'}: 10 sound samples in 3 shards, 0 problems, 1 warnings"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        call("check", folder)
    assert ended.value.code == 1
    *found, last = capsys.readouterr().out.splitlines()
    assert last.endswith(f", {len(found)} problems")
    return [line.removeprefix(f"{folder}/") for line in found]


def test_check_tells_every_problem_and_ends_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = load_index(folder / "tiny-000000.index.npy", FACTS.fields)
    flip(folder / "tiny-000000.tar", int(index[1]["pixels.npy"]["offset"]) + 140)
    (folder / "tiny-000001.tar").unlink()
    os.truncate(
        folder / "tiny-000002.tar",
        int(load_index(folder / "tiny-000002.index.npy", FACTS.fields)[1]["pixels.npy"]["offset"]) + 20,
    )
    (folder / "stray.tar").write_bytes(b"")
    found = problems(folder, capsys)
    for text in (
        r"tiny-000000\.tar is damaged \(its sha256", r"tiny-000000\.tar, key k001: pixels\.npy is damaged \(crc32",
        r"tiny-000001\.tar cannot be read \(No such file", r"tiny-000002\.tar has \d+ bytes, the manifest says",
        r"tiny-000002\.tar, key k009: pixels\.npy is truncated", r"stray\.tar is not in the manifest",
    ):  # fmt: skip
        assert [line for line in found if re.match(text, line)], (text, found)
    assert not [line for line in found if "k000" in line or "k008" in line]


def rewritten(folder: Path, facts: Manifest) -> None:
    """Let the manifest vouch for the files as they are, and say what `facts` says."""
    from diffmoe_ep.data.manifest import read_manifest
    from diffmoe_ep.data.shards import sha256_of

    manifest = read_manifest(folder / "manifest.json")
    shards = tuple(
        replace(shard, sha256=sha256_of(folder / shard.name), index_sha256=sha256_of(folder / shard.index_name))
        for shard in manifest.shards
    )
    (folder / "manifest.json").write_text(replace(facts, shards=shards, num_samples=manifest.num_samples).to_json())


def test_check_tells_shapes_labels_values_and_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "tiny", replace(MOMENTS, num_classes=3))
    rewritten(folder, replace(MOMENTS, num_classes=2))
    assert [re.sub(".*key ", "", line) for line in problems(folder, capsys)] == [
        f"k{number:03d}: cls: label b'2' is not a number below num_classes = 2" for number in (2, 5, 8)
    ]
    rewritten(folder, replace(MOMENTS, shape=(4, 4, 5)))
    assert len(problems(folder, capsys)) == 10
    rewritten(folder, MOMENTS)
    path = folder / "tiny-000000.index.npy"
    index = np.array(load_index(path, MOMENTS.fields))
    index["moments.npy"]["offset"][1] += 512
    index["key"][2] = b"k000"
    np.save(path, index)
    rewritten(folder, MOMENTS)
    found = problems(folder, capsys)
    for text in (
        "key k001: moments.npy is missing in the tar at the place",
        "key k001: moments.npy is damaged",
        "key k000: it has come before",
        "key k002: the index does not have it",
        "key k000: cls is missing in the tar",
    ):
        assert [line for line in found if text in line], (text, found)


def test_check_finds_values_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zlib

    folder = write(tmp_path / "tiny", MOMENTS)
    path, tar = folder / "tiny-000001.index.npy", folder / "tiny-000001.tar"
    index = np.array(load_index(path, MOMENTS.fields))
    offset, size, _ = index["moments.npy"][2].item()
    content = bytearray(tar.read_bytes())
    content[offset + size - 2 : offset + size] = np.float16(np.nan).tobytes()
    tar.write_bytes(content)
    index["moments.npy"]["crc32"][2] = zlib.crc32(content[offset : offset + size])
    np.save(path, index)
    rewritten(folder, MOMENTS)
    assert problems(folder, capsys) == ["tiny-000001.tar, key k006: moments.npy holds values that are not finite"]


def test_check_without_a_manifest_or_on_a_url(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the manifest"):
        call("check", tmp_path)
    with pytest.raises(UserError, match="is a URL; check the folder before"):
        call("check", "https://example.org/data")


def test_stats_counts_and_measures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("stats", folder)
    told = capsys.readouterr().out
    assert "tiny: 10 samples" in told and "shards: 3 of 2 to 4 samples" in told
    assert "classes: 3 of 3 used, 3 to 4 samples each\n  ant: 4\n  bee: 3\n  cat: 3" in told
    latents = np.random.default_rng(0).normal(3.0, 2.0, (10, *FACTS.stored_shape)).clip(0, 16).astype(np.uint8) / 8 - 1
    assert f"by channel: mean ({latents.mean():.4g}), standard deviation ({latents.std():.4g})" in told
    assert "cls 1, pixels.npy 164" in told
    call("stats", write(tmp_path / "text", CAPTIONED), "--samples", "5")
    told = capsys.readouterr().out
    assert "captions of an image: 2.00" in told
    assert "over 5 samples" in told
    assert "text.t5.npy 152" in told
    with pytest.raises(UserError, match="--samples is 0"):
        call("stats", folder, "--samples", "0")


@pytest.mark.parametrize("facts", [FACTS, MOMENTS, CAPTIONED], ids=["pixels", "moments", "captions"])
def test_peek_draws(tmp_path: Path, facts: Manifest) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    call("peek", write(tmp_path / "tiny", facts), "--out", tmp_path / "grid.png", "--samples", "7")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape[1] == 5 * (126 + 2 + 8) + 8 if facts is FACTS else picture.shape[1] == 5 * (128 + 8) + 8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    last = picture[picture.shape[0] // 2 :, -136:]
    assert (last == last[0, 0]).all()  # seven of ten places are taken


def test_colours_are_the_stored_values() -> None:
    arrays = [np.full((1, 6, 6), value, np.uint8) for value in (0, 8, 16)]
    assert colours(arrays, FACTS)[:, 0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    moments = [
        np.stack([np.concatenate([np.full((4, 4, 4), value), np.zeros((4, 4, 4))])] * 2).astype(np.float16)
        for value in (-2, 2)
    ]
    assert colours(moments, MOMENTS)[:, 0, 0].tolist() == [[0] * 3, [255] * 3]


def test_peek_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(UserError, match="cannot be written"):
        call("peek", folder, "--out", tmp_path / "absent/grid.png")


def test_stats_and_peek_read_a_url(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"pipe:cat {folder}/{{name}}"
    call("stats", url, "--cache", tmp_path / "cache", "--allow-commands")
    assert "tiny: 10 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.allow_commands"):
        call("stats", url, "--cache", tmp_path / "cache")


def test_index_makes_a_folder_of_tars_a_dataset(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.glob("*.tar"):
        shutil.copy(path, bare)
    words = (
        "index",
        bare,
        "--out",
        tmp_path / "out",
        "--kind",
        "pixels",
        "--array",
        "pixels.npy",
        "--scale",
        "0.125",
        "--shift",
        "-1",
    )
    call(*words)
    assert capsys.readouterr().out.endswith("10 samples in 3 shards, pixels uint8 (1, 6, 6), 3 classes; 0 problems\n")
    call("check", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["name"], manifest["scale"], manifest["shift"], manifest["num_classes"]) == ("bare", 0.125, -1.0, 3)
    with pytest.raises(UserError, match="exists; remove it"):
        call(*words)
    with pytest.raises(UserError, match="--classes is 0"):
        call(*words, "--classes", "0")


def test_nothing_heavy_is_imported_to_declare_the_verbs() -> None:
    import subprocess

    code = "import sys, diffmoe_ep.cli; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'webdataset')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
