"""The digits: a fixed stratified split of scikit-learn's images, and a command that can be repeated."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.digits import heldout_mask
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.latent import final_latent
from diffmoe_ep.data.shards import Dataset

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["digits", "--out", str(folder)]) == 0
    return folder


def test_both_splits_together_are_the_source(out: Path) -> None:
    bunch = datasets.load_digits()
    seen = {}
    for split in ("train", "heldout"):
        dataset = Dataset.open(out / split)
        for shard, size in enumerate(dataset.sizes):
            for sample in range(size):
                key = dataset.where(shard, sample).split("key ")[1]
                seen[int(key)] = (split, *read_sample(dataset, shard, sample))
    assert sorted(seen) == list(range(1797))
    np.testing.assert_array_equal(np.stack([seen[place][1] for place in range(1797)])[:, 0], bunch.images)
    assert [seen[place][2] for place in range(1797)] == bunch.target.tolist()
    heldout = [place for place in range(1797) if seen[place][0] == "heldout"]
    assert heldout[:8] == [6, 11, 13, 33, 48, 53, 63, 72]  # the split is part of every score ever reported


def test_sizes_shards_and_range(out: Path) -> None:
    train, heldout = Dataset.open(out / "train"), Dataset.open(out / "heldout")
    assert train.sizes == (300,) * 5
    assert heldout.sizes == (297,)
    assert (train.manifest.shape, train.manifest.num_classes, train.manifest.class_names) == (
        (1, 8, 8),
        10,
        tuple("0123456789"),
    )
    latents = np.stack([final_latent(read_sample(train, 0, sample)[0], train.manifest, None) for sample in range(300)])
    assert (latents.min(), latents.max()) == (-1, 1)


def test_every_class_is_held_out_in_proportion() -> None:
    labels = datasets.load_digits().target
    mask = heldout_mask(labels)
    assert mask.sum() == 297
    quotas = np.bincount(labels) * 297 / 1797
    assert np.abs(np.bincount(labels[mask]) - quotas).max() < 1


def test_again_it_says_that_all_is_there(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["digits", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("already there") == 2
    assert "1500 samples in 5 shards" in said
    assert "297 samples" in said
    assert "CC BY 4.0" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_run_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    assert main(["digits", "--out", str(tmp_path)]) == 0
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((out / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{out}/train"], "holds another data set"),
        (["--out", "{out}", "--shard-size", "7"], "use --shard-size 300"),
        (["--out", "{out}/train/manifest.json"], "cannot prepare"),
    ],
)
def test_bad_folders_are_one_line(
    out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["digits", *(argument.format(out=out) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_without_scikit_learn_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["digits", "--out", str(tmp_path / "digits")]) == 2
    assert "pip install 'diffmoe_ep[prep]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["digits"], ["letters", "--out", "x"], ["digits", "--out", "x", "--shard-size", "0"]]
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
