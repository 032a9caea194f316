"""Finds the digits on a canvas of three by three cells, with a classifier trained on real ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.codec import decode_array, decode_captions
from diffmoe_ep.data.shards import Dataset

GRID, SIDE = 3, 8  # cells of a canvas along a side, pixels of a digit
MOST = 4000  # canvases that are read of a dataset; they show nearly all of its digits
EMPTY, UNCLEAR = -2, -1  # what a cell holds that holds no digit; digits are 0 to 9
SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # of the digits that the classifier learns from
Crops = NDArray[np.float64]  # (n, SIDE, SIDE)


@dataclass(frozen=True)
class Canvases:
    """Real canvases with their captions."""

    pictures: np.ndarray  # (n, 1, H, W) uint8
    captions: tuple[tuple[str, ...], ...]  # of each


def load_canvases(folder: str | Path, most: int = MOST) -> Canvases:
    """The first canvases of a prepared dataset, at most so many; ConfigError if it holds something else than grey
    pixels with captions.
    """
    dataset = Dataset.open(folder)
    manifest = dataset.manifest
    if (manifest.kind, manifest.dtype, manifest.condition, manifest.shape[0]) != ("pixels", "uint8", "text", 1):
        raise ConfigError(
            f"{folder} holds {manifest.dtype} {manifest.kind} of shape {manifest.shape} with condition "
            f"{manifest.condition}; composition "
            "is judged on grey canvases with captions: python -m data_prep digits_captions"
        )
    places = [(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)][:most]
    found = [dataset.read(*place) for place in places]
    dataset.close()
    pictures = np.stack([decode_array(fields, manifest) for fields in found])
    return Canvases(
        pictures, tuple(tuple(caption.text for caption in decode_captions(fields, manifest)) for fields in found)
    )


def cells(pictures: np.ndarray) -> Crops:
    """Of every cell of canvases (n, 1, H, W) its window of SIDE x SIDE pixels with the most ink, (n, GRID, GRID, SIDE,
    SIDE).
    """
    size = pictures.shape[-1]
    edges = [size * cell // GRID for cell in range(GRID + 1)]
    found = np.empty((len(pictures), GRID, GRID, SIDE, SIDE))
    for row in range(GRID):
        for column in range(GRID):
            cell = pictures[:, 0, edges[row] : edges[row + 1], edges[column] : edges[column + 1]].astype(np.float64)
            windows = np.lib.stride_tricks.sliding_window_view(
                cell, (SIDE, SIDE), axis=(1, 2)
            )  # (n, tops, lefts, SIDE, SIDE)
            windows = windows.reshape(len(cell), -1, SIDE, SIDE)
            best = windows.sum((2, 3)).argmax(1)
            found[:, row, column] = windows[np.arange(len(cell)), best]
    return found


class Detector:
    """What stands in each cell of a canvas: a digit, nothing, or something unclear.

    A cell with less than half the ink of the faintest real digit is empty. A support vector classifier names what
    stands in the others; it is a digit if it is no farther from the nearest real digit of that name than real digits
    are from one another at the most.
    """

    def __init__(self, digits: Crops, labels: np.ndarray) -> None:
        """Learn from real digits (n, SIDE, SIDE) of labels (n,). ConfigError without scikit-learn, or for too few of a
        kind.
        """
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise ConfigError(
                "composition needs scikit-learn, which is not installed: pip install 'diffmoe_ep[eval]'"
            ) from error
        counts = np.bincount(labels, minlength=10)
        if counts.min() < 2:
            raise ConfigError(
                f"the reference canvases show the digit {counts.argmin()} {counts.min()} times; the classifier "
                "needs each twice"
            )
        self._least_ink = digits.sum((1, 2)).min() / 2
        self._known = {digit: _shifted(digits[labels == digit]).reshape(-1, SIDE * SIDE) for digit in range(10)}
        self._classifier = SVC(C=10.0).fit(
            np.concatenate(list(self._known.values())), np.repeat(range(10), counts * len(SHIFTS))
        )
        self._farthest = max(_nearest(digits[labels == digit].reshape(-1, SIDE * SIDE)) for digit in range(10))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Canvases (n, 1, H, W) -> (n, GRID, GRID): digits, EMPTY, UNCLEAR."""
        crops = cells(pictures).reshape(-1, SIDE * SIDE)
        seen = np.full(len(crops), EMPTY)
        inked = np.flatnonzero(crops.sum(1) >= self._least_ink)
        if len(inked):
            named = self._classifier.predict(crops[inked])
            for digit in np.unique(named):
                rows = inked[named == digit]
                near = _distances(crops[rows], self._known[digit]).min(1) <= self._farthest
                seen[rows] = np.where(near, digit, UNCLEAR)
        return seen.reshape(-1, GRID, GRID)


def _shifted(digits: Crops) -> Crops:
    """Digits (n, SIDE, SIDE) and their copies a pixel further in each direction, with what leaves the window lost."""
    padded = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    return np.concatenate(
        [padded[:, 1 + down : 1 + down + SIDE, 1 + right : 1 + right + SIDE] for down, right in SHIFTS]
    )


def _distances(some: Crops, others: Crops) -> Crops:
    """Euclidean distances of rows (n, F) and (m, F), (n, m)."""
    squares = (some**2).sum(1)[:, None] + (others**2).sum(1) - 2 * some @ others.T
    return np.sqrt(np.maximum(squares, 0.0))


def _nearest(digits: Crops) -> float:
    """The largest distance of one of these digits (n, F) to the nearest other one."""
    distances = _distances(digits, digits)
    np.fill_diagonal(distances, np.inf)
    return float(distances.min(1).max())


def known_digits(canvases: Canvases, where: Sequence[dict[tuple[int, int], int]]) -> tuple[Crops, np.ndarray]:
    """The different digits on canvases, (n, SIDE, SIDE), and their labels (n,); `where` holds for each canvas what
    stands in which cell.
    """
    crops = cells(canvases.pictures)
    found = [(digit, crops[number, *cell]) for number, placed in enumerate(where) for cell, digit in placed.items()]
    if not found:
        return np.zeros((0, SIDE, SIDE)), np.zeros(0, dtype=np.int64)
    rows = np.unique(np.stack([np.append(digit, crop) for digit, crop in found]), axis=0)
    return rows[:, 1:].reshape(-1, SIDE, SIDE), rows[:, 0].astype(np.int64)
