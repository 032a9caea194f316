"""Digits on a canvas: the same for ever, held-out digits apart, and captions that are true of the pixels."""

import hashlib
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep import digits
from data_prep.__main__ import main
from data_prep.digits_captions import COLUMNS, COUNTS, ROWS, most_legible, source
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.latent import final_latent
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.shards import Dataset
from pictures import content

datasets = pytest.importorskip("sklearn.datasets")
SOURCES = {split: source(split, 300, canvas, 50) for split in ("train", "heldout") for canvas in (24,)}  # type: ignore[arg-type]


def spots(canvas: np.ndarray, cell: int) -> dict[tuple[int, int], np.ndarray]:
    """The cells of a canvas that are not empty."""
    found = {}
    for row in range(3):
        for column in range(3):
            pixels = canvas[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            if pixels.any():
                found[row, column] = pixels
    return found


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_are_true_of_the_pixels(split: str) -> None:
    """Each digit is looked up in the source by its pixels, at the place that the caption names."""
    images, labels = digits.load()
    heldout = digits.heldout_mask(labels)
    known = {image.tobytes(): place for place, image in enumerate(images[:, 0])}
    numbers, kinds = Counter(), Counter()
    for raw in (raw for unit in range(6) for raw in SOURCES[split].read(unit)):
        assert isinstance(raw.image, np.ndarray) and isinstance(raw.condition, tuple)
        seen = {cell: known[pixels.tobytes()] for cell, pixels in spots(raw.image[0], 8).items()}
        assert all(heldout[place] == (split == "heldout") for place in seen.values())
        shown = {cell: int(labels[place]) for cell, place in seen.items()}
        full, counts, *relations = [caption.text for caption in raw.condition]
        said = {}
        for digit, where in re.findall(r"an? (\d) at the ((?:top|middle|bottom) (?:left|centre|right)|centre)", full):
            row, column = ("middle", "centre") if where == "centre" else where.split()
            said[ROWS.index(row), COLUMNS.index(column)] = int(digit)
        assert said == shown
        assert full.startswith(f"{COUNTS[len(shown) - 1]} digit")
        counted = {
            int(digit): COUNTS.index(count) + 1 for count, digit in re.findall(r"(one|two|three) (\d)s?", counts)
        }
        assert counted == Counter(shown.values())
        assert len(relations) == (len(shown) == 2)
        for first, relation, second in (
            re.fullmatch(r"an? (\d) (above|to the left of) an? (\d)", text).groups() for text in relations
        ):  # type: ignore[union-attr]
            (one, other) = shown
            assert (int(first), int(second)) == (shown[one], shown[other])
            assert one[0] < other[0] if relation == "above" else one[0] == other[0] and one[1] < other[1]
        numbers[len(shown)] += 1
        kinds.update(shown.values())
    assert min(numbers.values()) > 70 and set(numbers) == {1, 2, 3}
    assert min(kinds.values()) > 30 and len(kinds) == 10


@pytest.mark.parametrize("canvas", [24, 32, 40])
def test_digits_do_not_overlap_on_any_canvas(canvas: int) -> None:
    images, _ = digits.load()
    sums = {int(image.sum()) for image in images}
    for raw in source("train", 40, canvas, 40).read(0):
        assert isinstance(raw.image, np.ndarray) and raw.image.shape == (1, canvas, canvas)
        assert isinstance(raw.condition, tuple)
        if raw.condition[0].text.startswith("one"):
            assert int(raw.image.sum()) in sums
        edges = [canvas * cell // 3 for cell in range(4)]
        cells = [raw.image[0, a:b, c:d].any() for a, b in pairwise(edges) for c, d in pairwise(edges)]
        assert sum(cells) == COUNTS.index(raw.condition[0].text.split()[0]) + 1


def test_a_sample_follows_from_its_number_alone() -> None:
    """Neither the number of samples nor the cut into shards changes one; the bytes are part of every score reported on
    them.
    """
    many, few = (
        list(SOURCES["train"].read(1)),
        [raw for unit in range(4) for raw in source("train", 60, 24, 17).read(unit)],
    )
    digest = hashlib.sha256()
    for one, other in zip(many[:10], few[50:], strict=True):
        assert isinstance(one.image, np.ndarray) and isinstance(other.image, np.ndarray)
        np.testing.assert_array_equal(one.image, other.image)
        assert (one.key, one.condition) == (other.key, other.condition)
        digest.update(one.image.tobytes() + repr(one.condition).encode())
    assert digest.hexdigest() == "e702d9856b87f89b9407b29316f997d4149e4a64b1464a0c4aa339c17c6e099c"


def test_the_command_writes_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["digits_captions", "--samples", "70", "--heldout", "30", "--shard-size", "25", "--readers", "1"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    for rank in ("1", "0"):
        assert main([*command, "--out", str(tmp_path / "two"), "--world", "2", "--rank", rank]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert "already there" in capsys.readouterr().out
    train, heldout = Dataset.open(tmp_path / "one" / "train"), Dataset.open(tmp_path / "one" / "heldout")
    assert (train.sizes, heldout.sizes) == ((25, 25, 20), (25, 5))
    assert train.manifest.shape == (1, 24, 24)
    latents = np.stack([final_latent(read_sample(train, 0, sample)[0], train.manifest, None) for sample in range(25)])
    assert (latents.min(), latents.max()) == (-1, 1)


@pytest.mark.slow
def test_the_most_legible_digits_are_a_part_of_each_class_that_an_independent_classifier_reads_better() -> None:
    svm = pytest.importorskip("sklearn.neighbors")
    images, labels = digits.load()
    train = np.flatnonzero(~digits.heldout_mask(labels))
    kept = most_legible(images[train, 0], labels[train], 0.4)
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(np.bincount(labels[train][kept]), np.round(0.4 * np.bincount(labels[train])).astype(int))
    rest = np.setdiff1d(np.arange(len(train)), kept)
    flat = images[:, 0].reshape(len(images), -1)

    def read(some: np.ndarray) -> float:  # by the nearest of the held-out digits
        other = svm.KNeighborsClassifier(1).fit(flat[digits.heldout_mask(labels)], labels[digits.heldout_mask(labels)])
        return float((other.predict(flat[train[some]]) == labels[train[some]]).mean())

    assert read(kept) > 0.99 > read(rest)
    allowed = {images[train[place], 0].tobytes() for place in kept}
    for raw in source("train", 200, 24, 200, 0.4).read(0):
        assert isinstance(raw.image, np.ndarray)
        assert {pixels.tobytes() for pixels in spots(raw.image[0], 8).values()} <= allowed


def test_captions_are_taken_as_often_as_their_weights_say() -> None:
    for weights, expected in (((1.0, 0.0, 3.0), {1.0, 3.0}), ((0.0, 2.0, 0.0), {2.0}), ((2.0, 1.0, 1.0), {2.0, 1.0})):
        raws = list(source("train", 40, 24, 40, 1.0, weights).read(0))
        assert {caption.weight for raw in raws for caption in raw.condition} == expected  # type: ignore[union-attr]
    with pytest.raises(DataError, match="neither places nor counts a weight"):
        source("train", 40, 24, 40, 1.0, (0.0, 0.0, 1.0))
    plain, other = source("train", 40, 24, 40), source("train", 40, 24, 40, 1.0, (1.0, 1.0, 1.0))
    assert plain.fingerprint != other.fingerprint


def test_the_cleaner_subset_is_made_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["digits_captions", "--samples", "10", "--heldout", "5", "--readers", "1"]
    assert main([*command, "--out", str(tmp_path), "--legible", "0.4", "--caption-weights", "1,1,1"]) == 0
    assert main([*command, "--out", str(tmp_path)]) == 2  # another dataset
    assert "choose another folder with --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path), "--caption-weights", "1,1"])
    assert "1,1 is not three weights such as 2,1,1" in capsys.readouterr().err


def test_a_canvas_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="--image-size 23 is too small"):
        source("train", 10, 23, 10)
