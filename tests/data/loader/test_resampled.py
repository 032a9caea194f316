"""Plain tars, drawn at random: the same Batch as ever, other images for every worker, and nothing silent about what
cannot be read.
"""

import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader.streams import open_stream
from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.data.index import MemberSpec
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.remote.fetch import Access, Unavailable
from diffmoe_ep.data.rng import generator_for

SPEC = MemberSpec("pixels", label="txt", array="img.npy", scale=0.5, shift=-1.0, num_classes=40)
ACCESS = Access(retries=2, pause=0.0)
NUM_TARS, SIZE = 5, 8


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write(
    path: Path, numbers: range, label: Callable[[int], str] = str, spoil: Callable[[int], bytes | None] = lambda _: None
) -> None:
    """A tar of others: sample n is an image of n's and label n, with members that nobody asked for."""
    with tarfile.open(path, "w") as tar:
        add(tar, "__about__.json", b"{}")
        for number in numbers:
            add(tar, f"some/k{number:03d}.txt", f" {label(number)}\n".encode())
            add(tar, f"some/k{number:03d}.img.npy", spoil(number) or npy(np.full((1, 2, 3), number, np.uint8)))
            add(tar, f"some/k{number:03d}.json", b"{}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for number in range(NUM_TARS):
        write(folder / f"{number:03d}.tar", range(number * SIZE, (number + 1) * SIZE))
    return folder


def opened(folder: Path | str, **changes: Any) -> PlainTars:
    return PlainTars.open(
        str(folder), SPEC, changes.pop("access", ACCESS), shuffle=changes.pop("shuffle", 10), **changes
    )


def make(tars: PlainTars, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "seed": 5,
        "batch": 8,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "condition_dropout": 0.25,
        "flip": True,
        "shuffle_block": 2,
        "workers": 0,
        "prefetch": 2,
    }
    return open_stream(tars, **settings | changes)


def take(tars: PlainTars, steps: int, **changes: Any) -> list[Batch]:
    source = make(tars, **changes)
    try:
        return list(islice(source, steps))
    finally:
        source.close()


def images(batches: list[Batch]) -> list[int]:
    """Which sample is where."""
    return [int(2 * (float(latent.mean()) + 1)) for batch in batches for latent in batch.latent]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_all_its_fields(folder: Path, workers: int) -> None:
    batches = take(opened(folder), 6, workers=workers)
    numbers = images(batches)
    for row, position in enumerate(range(48)):
        batch, place = batches[row // 8], row % 8
        assert batch.latent.shape == (8, 1, 2, 3)
        assert batch.latent.dtype == batch.noise.dtype == batch.u.dtype == torch.float32
        assert batch.position[place] == position
        np.testing.assert_array_equal(
            batch.noise[place].numpy(), generator_for(5, position, "noise").standard_normal((1, 2, 3), dtype=np.float32)
        )
        assert batch.u[place].item() == generator_for(5, position, "time").random(dtype=np.float32)
        dropped = generator_for(5, position, "drop").random() < 0.25
        assert isinstance(batch.condition, torch.Tensor)
        assert batch.condition[place].item() == (40 if dropped else numbers[row])
    assert len(set(numbers)) > 15


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_draws_the_same(folder: Path, workers: int) -> None:
    drawn = images(take(opened(folder), 6, workers=workers))
    assert images(take(opened(folder), 6, workers=workers)) == drawn
    assert images(take(opened(folder), 6, workers=workers, seed=6)) != drawn


def test_ranks_workers_and_restarts_draw_their_own(folder: Path) -> None:
    ranks = [images(take(opened(folder), 20, rank=rank, world=4, batch=32)) for rank in range(4)]
    assert len({tuple(drawn) for drawn in ranks}) == 4
    assert set().union(*map(set, ranks)) == set(range(40))
    alone, two = take(opened(folder), 6), take(opened(folder), 6, workers=2)
    assert images(alone) != images(two)
    assert images(two[::2]) != images(two[1::2])
    again = take(opened(folder), 6, samples_consumed=48)
    assert images(again) != images(alone)
    assert torch.cat([batch.position for batch in again]).tolist() == list(range(48, 96))


def test_a_closed_stream_goes_on_with_its_positions(folder: Path) -> None:
    source = make(opened(folder), workers=1)
    for first in (0, 8, 16):
        assert next(source).position.tolist() == list(range(first, first + 8))
        source.close()
    assert source.passes() == {}


def test_tars_come_about_equally_often(folder: Path) -> None:
    numbers = np.asarray(images(take(opened(folder), 400)))
    counts = np.bincount(numbers // SIZE, minlength=NUM_TARS)
    assert (abs(counts - 640) < 5 * SIZE * (400 * 0.2 * 0.8) ** 0.5).all()  # whole tars are drawn


def test_tars_by_pattern_and_by_command(folder: Path) -> None:
    assert opened(f"{folder}/{{001..003}}.tar").urls == tuple(f"{folder}/00{number}.tar" for number in (1, 2, 3))
    with pytest.raises(ConfigError, match=r"runs a command; set data\.allow_commands"):
        opened(f"pipe:cat {folder}/{{000..004}}.tar")
    piped = opened(f"pipe:cat {folder}/{{000..004}}.tar", access=Access(allow_commands=True, retries=2, pause=0.0))
    assert images(take(piped, 6)) == images(take(opened(folder), 6))
    assert piped.names == (f"pipe:cat {folder}/000.tar ... pipe:cat {folder}/004.tar",)
    with pytest.raises(ConfigError, match="can be read and changed on its way"):
        opened("http://example.org/{000..004}.tar")


def test_fingerprints_follow_names_and_contents_but_no_secrets(folder: Path) -> None:
    urls = [f"https://me:{secret}@host/{{0..3}}.tar?signature={secret}" for secret in ("a", "b")]
    first, second = (
        PlainTars(tuple(url.replace("{0..3}", "0") for url in [url]), opened(folder).manifest, SPEC, ACCESS)
        for url in urls
    )
    assert first.fingerprint == second.fingerprint != opened(folder).fingerprint
    assert "a@" not in first.names[0] and "signature" not in first.names[0]


def test_captions_are_words_to_be_encoded(folder: Path) -> None:
    tars = opened(folder, condition="text")
    batches = take(tars, 3, text=CaptionSpec("t5", 4, 3, online=True))
    numbers = images(batches)
    words = [caption for batch in batches for caption in batch.captions]
    dropped = [generator_for(5, position, "drop").random() < 0.25 for position in range(24)]
    assert words == ["" if drop else str(number) for number, drop in zip(numbers, dropped, strict=True)]
    assert isinstance(batches[0].condition, CaptionFeatures)
    for text in (None, CaptionSpec("t5", 4, 3)):
        with pytest.raises(ConfigError, match=r"model\.condition is class|text\.online=true"):
            make(tars, text=text)


SPOILT: dict[str, Callable[[int], bytes | None]] = {
    "shape": lambda number: npy(np.zeros((1, 3, 3), np.uint8)) if number == 11 else None,
    "garbage": lambda number: b"garbage" if number == 11 else None,
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_samples_are_passed_over_and_listed(folder: Path, tmp_path: Path, fault: str) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "tars"))
    write(spoilt / "001.tar", range(SIZE, 2 * SIZE), spoil=SPOILT[fault])
    run = quarantine.rank_file(tmp_path / "run", 0)
    source = make(opened(spoilt), max_bad_fraction=0.1, quarantine_file=run)
    batches = list(islice(source, 20))
    assert 11 not in images(batches)
    listed = quarantine.read(tmp_path / "run")
    assert [(sample.shard, sample.key) for sample in listed] == [(str(spoilt / "001.tar"), "some/k011")]
    assert source.num_bad >= len(listed[0].positions) > 0
    with pytest.raises(
        DataError, match=r"001\.tar, key some/k011: .*; mend it, or allow some with data\.max_bad_fraction"
    ):
        take(opened(spoilt), 20)


def test_a_truncated_tar_is_listed_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "tars"))
    with tarfile.open(spoilt / "001.tar") as tar:
        end = tar.getmember("some/k010.img.npy").offset_data + 100
    os.truncate(spoilt / "001.tar", end)
    source = make(opened(spoilt), max_bad_fraction=0.1, quarantine_file=quarantine.rank_file(tmp_path / "run", 0))
    found = set(images(list(islice(source, 60))))
    assert found == set(range(40)) - set(range(10, 16))
    assert {(sample.shard, sample.key) for sample in quarantine.read(tmp_path / "run")} == {
        (str(spoilt / "001.tar"), "")
    }


def test_labels_out_of_range_and_missing_members_are_faults(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", range(4), label=lambda number: str(number) if number < 3 else "40")
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        add(tar, "some/k009.txt", b"1")
    source = make(
        opened(tmp_path, shuffle=1), max_bad_fraction=0.1, quarantine_file=quarantine.rank_file(tmp_path / "run", 0)
    )
    assert set(images(list(islice(source, 4)))) == {0, 1, 2}
    reasons = {sample.key: sample.reason for sample in quarantine.read(tmp_path / "run")}
    assert reasons == {
        "some/k003": "cls: label b'40' is not a number below num_classes = 40",
        "some/k009": "it has no member img.npy",
    }


def test_only_bad_samples_end(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", range(3), label=lambda number: "1" if not number else "99")
    tars = opened(tmp_path, shuffle=1)
    write(tmp_path / "a.tar", range(3), label=lambda _: "99")
    with pytest.raises(DataError, match="and the 256 samples before it are bad too"):
        take(tars, 1, max_bad_fraction=0.9)


def test_tars_that_cannot_be_had_are_waited_for_then_stop_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "tars"))
    tars = opened(copied, access=Access(retries=2, pause=1.0))
    for path in copied.glob("*.tar"):
        path.unlink()
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(
        Unavailable, match=r"\.tar gave no sample \(No such file or directory\), nor did the 2 tars drawn before it"
    ):
        take(tars, 1, max_bad_fraction=0.5)
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_it_is(tmp_path: Path, workers: int) -> None:
    write(tmp_path / "a.tar", range(3))
    tars = opened(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(Unavailable, match="gave no sample"):
        take(tars, 1, max_bad_fraction=0.5, workers=workers)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "a.tar").unlink(), r"holds no \.tar files"),
        (lambda folder: (folder / "a.tar").write_bytes(b""), "holds no sample|cannot be read"),
        (lambda folder: (folder / "a.tar").write_bytes(b"garbage" * 500), "cannot be read"),
        (lambda folder: write(folder / "a.tar", range(1), spoil=lambda _: npy(np.zeros(3))), "its array is float64"),
        (lambda folder: write(folder / "a.tar", range(1), spoil=lambda _: b"PK\x03\x04"), "is not an npy file"),
    ],
)
def test_tars_that_are_none_are_told_at_the_start(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / "a.tar", range(1))
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_members_that_are_not_there_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"key some/k000: has no member npy and cls \(it has img\.npy, json, txt\)"):
        PlainTars.open(str(folder), MemberSpec("pixels", num_classes=3), ACCESS)
    with pytest.raises(ConfigError, match="no index tells how many classes"):
        PlainTars.open(str(folder), MemberSpec("pixels", label="txt", array="img.npy"), ACCESS)
