"""Source: one to three of scikit-learn's real digits on a larger canvas, with captions that name digit, count and
place.

Everything about sample n of a split follows from n alone. The held-out split is made of held-out digits.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep import digits
from data_prep.source import Raw, Source, chunks, fingerprint_of
from diffmoe_ep.data.codec import Caption
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.rng import generator_for, permutation

LICENCE = digits.LICENCE
SEEDS = {"train": 1501, "heldout": 298}
SIDE = 8  # of a digit
GRID = 3  # the canvas has 3 x 3 cells, a digit to a cell
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
COUNTS = ("one", "two", "three")
Weights = tuple[float, float, float]
# Of captions that tell every place, the counts, and for two digits how they stand to each other.
WEIGHTS: Weights = (2.0, 1.0, 1.0)
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Placed:
    """A digit on the canvas."""

    digit: int  # 0 to 9
    image: int  # which of the source's images
    row: int  # of the grid's cells
    column: int
    top: int  # of its pixels on the canvas
    left: int

    @property
    def where(self) -> str:
        """The name of its cell."""
        return "centre" if self.row == self.column == 1 else f"{ROWS[self.row]} {COLUMNS[self.column]}"


def source(
    split: Split, num_samples: int, canvas: int, shard_size: int, legible: float = 1.0, weights: Weights = WEIGHTS
) -> Source:
    """Canvases of `canvas` x `canvas` grey pixels (0 to 16), with captions.

    legible: the share of each class's digits that is used, those that are easiest to read; a cleaner subset for
    fine-tuning.
    """
    if canvas < GRID * SIDE:
        raise DataError(f"--image-size {canvas} is too small for {GRID} x {GRID} digits; use {GRID * SIDE} or more")
    if num_samples < 1:
        raise DataError(f"the {split} split has {num_samples} samples, expected 1 or more; use --samples, --heldout")
    if not any(weights[:2]):
        raise DataError(
            "--caption-weights give neither places nor counts a weight, so some canvases would have no caption; "
            "weigh one"
        )
    images, labels = digits.load()
    members = np.flatnonzero(digits.heldout_mask(labels) == (split == "heldout"))
    if legible < 1:
        members = members[most_legible(images[members, 0], labels[members], legible)]
    runs = chunks(num_samples, shard_size)

    def read(unit: int) -> Iterator[Raw]:
        for number in runs[unit]:
            placed = compose(split, number, canvas, labels, members)
            yield Raw(f"{split} {number}", f"{number:08d}", draw(placed, canvas, images), captions(placed, weights))

    options = f" {legible} {weights}" if legible < 1 or weights != WEIGHTS else ""
    return Source(
        num_units=len(runs),
        read=read,
        fingerprint=fingerprint_of([(f"digits {split} {canvas}{options}", num_samples)]),
        condition="text",
        num_samples=num_samples,
    )


def compose(split: Split, number: int, canvas: int, labels: np.ndarray, members: np.ndarray) -> tuple[Placed, ...]:
    """What sample `number` shows, in reading order: one to three digits in cells of their own, one time in three all of
    one kind.
    """
    generator = generator_for(SEEDS[split], number, "order")
    cells = permutation(generator, GRID * GRID)
    words = np.asarray(generator.bit_generator.random_raw(11), dtype=np.uint64)

    def draw_below(place: int, bound: int) -> int:
        return int(words[place] % np.uint64(bound))

    count, alike = 1 + draw_below(0, 3), draw_below(1, 3) == 0
    kind = draw_below(1, 30) // 3
    pool = members[labels[members] == kind] if alike else members
    edges = [canvas * cell // GRID for cell in range(GRID + 1)]
    placed = []
    for place in range(count):
        image = int(pool[draw_below(2 + 3 * place, len(pool))])
        row, column = divmod(int(cells[place]), GRID)
        top = edges[row] + draw_below(3 + 3 * place, edges[row + 1] - edges[row] - SIDE + 1)
        left = edges[column] + draw_below(4 + 3 * place, edges[column + 1] - edges[column] - SIDE + 1)
        placed.append(Placed(int(labels[image]), image, row, column, top, left))
    return tuple(sorted(placed, key=lambda found: (found.row, found.column)))


def draw(placed: tuple[Placed, ...], canvas: int, images: np.ndarray) -> np.ndarray:
    """The canvas, (1, canvas, canvas) uint8."""
    pixels = np.zeros((1, canvas, canvas), dtype=np.uint8)
    for found in placed:
        pixels[0, found.top : found.top + SIDE, found.left : found.left + SIDE] = images[found.image, 0]
    return pixels


def most_legible(images: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """Which digits (n, 8, 8) of labels (n,) are easiest to read, ascending: a share of each class, at least one.

    Those that a classifier which has not seen them puts most clearly into their class: cross-validation, nothing drawn
    at random.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.svm import SVC

    rows = np.arange(len(labels))
    says = cross_val_predict(
        SVC(decision_function_shape="ovr"),
        images.reshape(len(images), -1),
        labels,
        cv=StratifiedKFold(10),
        method="decision_function",
    )  # (n, classes)
    own = says[rows, labels]
    says[rows, labels] = -np.inf
    order = np.argsort(says.max(1) - own, kind="stable")  # clearest first
    kept = [
        order[labels[order] == label][: max(1, round(share * int((labels == label).sum())))]
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(kept))


def captions(placed: tuple[Placed, ...], weights: Weights = WEIGHTS) -> tuple[Caption, ...]:
    """True captions: every digit with its place, the counts, and for two digits how they stand to each other."""
    places = _joined([f"{_article(found.digit)} {found.digit} at the {found.where}" for found in placed])
    counts = sorted(Counter(found.digit for found in placed).items())
    kinds = _joined([f"{COUNTS[count - 1]} {digit}{'s' if count > 1 else ''}" for digit, count in counts])
    texts = [f"{COUNTS[len(placed) - 1]} digit{'s' if len(placed) > 1 else ''}: {places}", kinds]
    if len(placed) == 2:
        first, second = placed
        relation = "above" if first.row < second.row else "to the left of"
        texts.append(f"{_article(first.digit)} {first.digit} {relation} {_article(second.digit)} {second.digit}")
    return tuple(Caption(text, weight) for text, weight in zip(texts, weights, strict=False) if weight)


def _article(digit: int) -> str:
    return "an" if digit == 8 else "a"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
