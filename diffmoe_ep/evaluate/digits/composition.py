"""Does a picture show what its prompt says? A score in the manner of GenEval, for digits on a canvas of three by three
cells.

Four tasks: a single object, two objects, counting, position. Prompts are worded as the captions of the data are. Digits
are found and named by a classifier trained on real ones; each prompt is judged on its picture alone, right or wrong;
the overall score is the mean of the four tasks. As in GenEval other objects may be there besides, but counting is
strict: just so many, and nothing else on the canvas.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import numpy as np

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.rng import generator_for, permutation
from diffmoe_ep.evaluate.digits.detect import UNCLEAR, Canvases, Detector, known_digits
from diffmoe_ep.tables import table

TASKS = ("single object", "two objects", "counting", "position")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NUMBERS = ("one", "two", "three")
SEED = 4  # of the prompts; part of the score's meaning
MOST_REAL = 200  # real canvases judged for each task


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it asks for."""

    text: str
    task: str
    digits: tuple[int, ...]  # requested, each as often as it is to be there
    # (row, column) of each digit, where places are named; a single digit may be anywhere
    cells: tuple[tuple[int, int], ...] = ()
    relation: str = ""  # above or to the left of: how the first of two digits stands to the second

    def holds(self, seen: np.ndarray) -> bool:
        """Whether a canvas, seen (3, 3) as digits and what else stands there, shows it."""
        if self.task == "counting":
            return Counter(seen[seen >= UNCLEAR].tolist()) == Counter(self.digits)
        if self.cells and self.task == "position":
            return all(seen[cell] == digit for digit, cell in zip(self.digits, self.cells, strict=True))
        if self.relation:
            axis = 0 if self.relation == "above" else 1
            first, second = (np.argwhere(seen == digit)[:, axis] for digit in self.digits)
            return bool(len(first) and len(second) and first.min() < second.max())
        return all((seen == digit).any() for digit in self.digits)


def read(text: str) -> Prompt | None:
    """What a caption or prompt asks for; None for other words, and for mixed counts, which no task asks for."""
    listed = re.fullmatch(r"(one|two|three) digits?: (.+)", text)
    if listed:
        places = [
            re.fullmatch(r"an? (\d) at the (?:(top|middle|bottom) (left|centre|right)|centre)", part)
            for part in _parts(listed[2])
        ]
        if len(places) != NUMBERS.index(listed[1]) + 1:
            return None
        digits, cells = [], []
        for place in places:
            if place is None:
                return None
            digits.append(int(place[1]))
            cells.append((ROWS.index(place[2]), COLUMNS.index(place[3])) if place[2] else (1, 1))
        return Prompt(text, TASKS[0] if len(digits) == 1 else TASKS[3], tuple(digits), tuple(cells))
    related = re.fullmatch(r"an? (\d) (above|to the left of) an? (\d)", text)
    if related:
        return Prompt(text, TASKS[3], (int(related[1]), int(related[3])), relation=related[2])
    counts = [re.fullmatch(r"(one|two|three) (\d)s?", part) for part in _parts(text)]
    found = [(NUMBERS.index(count[1]) + 1, int(count[2])) for count in counts if count is not None]
    if len(found) < len(counts):
        return None
    match found:
        case [(1, digit)]:
            return Prompt(text, TASKS[0], (digit,))
        case [(number, digit)]:
            return Prompt(text, TASKS[2], (digit,) * number)
        case [(1, first), (1, second)]:
            return Prompt(text, TASKS[1], (first, second))
    return None


def prompts(each: int) -> list[Prompt]:
    """The first `each` prompts of every task, task by task; always the same."""
    found = []
    for number, task in enumerate(TASKS):
        texts = _texts(number)
        order = permutation(generator_for(SEED, number, "order"), len(texts))
        for place in range(each):
            prompt = read(texts[order[place % len(order)]])
            assert prompt is not None and prompt.task == task
            found.append(prompt)
    return found


def _texts(task: int) -> list[str]:
    """All texts of a task that are to be chosen from; for places, every pair of cells with digits that follow from
    it.
    """
    digits = range(10)
    pairs = [(first, second) for first in digits for second in digits if first != second]
    match task:
        case 0:
            named = [f"one digit: {_a(digit)} at the {_where(cell)}" for digit in digits for cell in range(9)]
            return named + [f"one {digit}" for digit in digits for _ in range(9)]  # half of either wording
        case 1:
            return [f"one {first} and one {second}" for first, second in pairs if first < second]
        case 2:
            return [f"{number} {digit}s" for digit in digits for number in NUMBERS[1:]]
    related = [
        f"{_a(first)} {relation} {_a(second)}" for first, second in pairs for relation in ("above", "to the left of")
    ]
    cells = [(one, other) for other in range(9) for one in range(other)]
    placed = []
    for number in range(len(related)):  # half of either kind
        (first, second), (one, other) = pairs[number * 7 % len(pairs)], cells[number % len(cells)]
        placed.append(f"two digits: {_a(first)} at the {_where(one)} and {_a(second)} at the {_where(other)}")
    return related + placed


def _a(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {digit}"


def _where(cell: int) -> str:
    return "centre" if cell == 4 else f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}"


def _parts(text: str) -> list[str]:
    """What a list names: a, b and c."""
    return re.split(r", | and ", text)


@dataclass(frozen=True)
class Share:
    """How often the pictures of one task are right."""

    num: int  # pictures
    right: float  # share of them that show what their prompt says
    shuffled: float  # the same for prompts of the task dealt to other pictures, the mean over all ways: chance


@dataclass(frozen=True)
class Composition:
    """The compositional score of samples beside that of real canvases."""

    samples: dict[str, Share]  # by task
    heldout: dict[str, Share]
    verdicts: tuple[bool, ...]  # of each sample
    capacity: float  # C_infer^avg; 1 is the compute of a dense model

    def overall(self, heldout: bool = False, shuffled: bool = False) -> float:
        """The mean of the four tasks."""
        shares = (self.heldout if heldout else self.samples).values()
        return float(np.mean([share.shuffled if shuffled else share.right for share in shares]))

    def lines(self) -> list[str]:
        """A table for the terminal."""
        rows: list[tuple[str, ...]] = [
            (f"composition of {len(self.verdicts)} samples", "samples", "shuffled", "held-out", "shuffled")
        ]
        for task, share in self.samples.items():
            real = self.heldout[task]
            rows.append((task, *(f"{value:.3f}" for value in (share.right, share.shuffled, real.right, real.shuffled))))
        overall = [self.overall(heldout, shuffled) for heldout in (False, True) for shuffled in (False, True)]
        rows.append(("overall", *(f"{value:.3f}" for value in overall)))
        rows.append(("inference capacity", f"{self.capacity:.3f}", "", "", ""))
        return table(rows, rule=False)

    def as_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        overall = {
            "overall": self.overall(),
            "overall_shuffled": self.overall(shuffled=True),
            "overall_heldout": self.overall(True),
        }
        return overall | asdict(self) | {"verdicts": list(self.verdicts)}


def composition(
    pictures: np.ndarray, requested: Sequence[Prompt], train: Canvases, heldout: Canvases, capacity: float
) -> Composition:
    """Judge pictures (n, 1, H, W) uint8 that were drawn for prompts.

    The classifier learns from the training canvases; the held-out ones, whose digits it has not seen, are judged by
    their own captions: the best that can be hoped for.
    """
    detector = Detector(*known_digits(train, [_places(captions) for captions in train.captions]))
    samples, verdicts = _judged(detector(pictures), requested)
    real, captions = _real(heldout)
    return Composition(samples, _judged(detector(real), captions)[0], tuple(verdicts), capacity)


def check_canvases(shape: tuple[int, ...], sides: dict[str, Canvases]) -> None:
    """Raise ConfigError, before anything is drawn, unless samples of this shape can be judged against these real
    canvases.
    """
    if find_spec("sklearn") is None:
        raise ConfigError("composition needs scikit-learn, which is not installed: pip install 'diffmoe_ep[eval]'")
    for name, canvases in sides.items():
        if canvases.pictures.shape[1:] != shape:
            raise ConfigError(
                f"{name} holds canvases of shape {canvases.pictures.shape[1:]}, the model draws {shape}; name the "
                "data it was trained on"
            )
        tasks = {prompt.task for captions in canvases.captions for prompt in map(read, captions) if prompt is not None}
        if tasks != set(TASKS):
            missing = ", ".join(task for task in TASKS if task not in tasks)
            raise ConfigError(
                f"{name} holds no captions of the digits for {missing}; prepare it: python -m data_prep digits_captions"
            )


def _judged(seen: np.ndarray, requested: Sequence[Prompt]) -> tuple[dict[str, Share], list[bool]]:
    """The shares by task, and the verdict on each canvas seen (n, 3, 3)."""
    shares, verdicts = {}, np.zeros(len(requested), dtype=bool)
    for task in TASKS:
        of_task = [number for number, prompt in enumerate(requested) if prompt.task == task]
        # (pictures, prompts)
        table = np.array([[requested[prompt].holds(seen[picture]) for prompt in of_task] for picture in of_task])
        num = len(of_task)
        right = table.diagonal() if num else np.zeros(0, dtype=bool)
        verdicts[of_task] = right
        others = (table.sum() - right.sum()) / (num * (num - 1)) if num > 1 else float("nan")
        shares[task] = Share(num, float(right.mean()) if num else float("nan"), float(others))
    return shares, verdicts.tolist()


def _real(canvases: Canvases) -> tuple[np.ndarray, list[Prompt]]:
    """Real canvases, each once for every caption that a task asks for, up to so many of each task."""
    chosen, requested, counts = [], [], Counter[str]()
    for number, captions in enumerate(canvases.captions):
        for prompt in filter(None, map(read, captions)):
            if counts[prompt.task] < MOST_REAL:
                counts[prompt.task] += 1
                chosen.append(number)
                requested.append(prompt)
    return canvases.pictures[chosen], requested


def _places(captions: Sequence[str]) -> dict[tuple[int, int], int]:
    """Which digit stands in which cell, from the caption that names all places; nothing where there is none."""
    placed = [prompt for prompt in map(read, captions) if prompt is not None and prompt.cells]
    return dict(zip(placed[0].cells, placed[0].digits, strict=True)) if placed else {}
