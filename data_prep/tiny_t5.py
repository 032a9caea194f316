"""A tiny T5 encoder for the captions of the digits: what it learns, and the order to make it.

Its weights are its own, trained here for a minute or two on captions alone, without any image: it learns to answer
which digit stands in which cell, how many there are of each, and how two stand to each other. That is supervision which
a real T5 has no need of: from a random or hardly trained encoder of bytes, which digit stands where is hard to read (a
digit is a byte, its place the fifteen bytes behind it). It knows the wording of these captions and no English.
"""

from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep import digits
from data_prep.digits_captions import GRID, Placed, captions, compose
from data_prep.tiny_encoder import UNTOLD, Lesson, make_tiny_t5

STEPS, BATCH = 2400, 32
CANVAS = 24  # captions do not depend on it
CELLS = GRID * GRID
QUESTIONS = (
    CELLS + 10 + 3
)  # the digit in each cell; the number of each digit; the first and second of two, and whether one is above
ANSWERS = 11  # digits and, in a cell, none; numbers; no and yes
KINDS = (0, 0, 1, 0, 0, 2)  # of captions, step by step: places, counts, relation
MADE_OF = "questions on the captions of the digits; 1"  # the number changes with the lessons


def make(folder: Path, steps: int, seed: int, width: int, layers: int) -> bool:
    """Make the encoder, or find that it is there; returns whether it was made."""
    with tqdm(desc="tiny T5", total=steps, unit="step", delay=2.0, leave=False) as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        return make_tiny_t5(
            folder,
            lesson,
            questions=QUESTIONS,
            answers=ANSWERS,
            steps=steps,
            seed=seed,
            width=width,
            layers=layers,
            made_of=MADE_OF,
            progress=show,
        )


def lesson(step: int) -> Lesson:
    """What a step teaches. Its captions are all of one kind, so that they are about equally long."""
    kind = KINDS[step % len(KINDS)]
    canvases = [_placed(number, two=kind == 2) for number in range(step * BATCH, (step + 1) * BATCH)]
    answers = torch.tensor([answered(placed, kind) for placed in canvases])  # (B, QUESTIONS)
    return Lesson([captions(placed)[kind].text for placed in canvases], answers)


def answered(placed: tuple[Placed, ...], kind: int) -> list[int]:
    """What caption number `kind` of a canvas answers to each question."""
    cells, relation = [UNTOLD] * CELLS, [UNTOLD] * 3
    if kind == 0:
        cells = [ANSWERS - 1] * CELLS
        for found in placed:
            cells[found.row * GRID + found.column] = found.digit
    if kind != 1 and len(placed) == 2:
        first, second = placed
        relation = [first.digit, second.digit, int(first.row < second.row)]
    return [*cells, *(sum(found.digit == digit for found in placed) for digit in range(10)), *relation]


def _placed(number: int, two: bool = False) -> tuple[Placed, ...]:
    """What canvas `number` shows; or, where it must be two digits, a canvas that follows from the number."""
    labels, members = _digits()
    tries = (compose("train", number + (again << 40), CANVAS, labels, members) for again in count())
    return next(placed for placed in tries if not two or len(placed) == 2)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Labels of the source's digits, and which of them are for training."""
    _, labels = digits.load()
    return labels, np.flatnonzero(~digits.heldout_mask(labels))
