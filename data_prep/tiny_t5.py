"""A tiny T5 encoder for the captions of the digits: the text it learns from, and the order to make it.

Its weights are its own, trained here for a minute or two on captions alone, without any image. Half of what it learns is T5's span
corruption; the other half is to say a caption in other words (the place before the digit, the digit before the count, a relation from its
other end). Corruption alone would not do: digits and places are drawn at random, so nothing masked can be guessed by knowing which digit
stands where, and the features would not tell it. It is no model of English.
"""

from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep import digits
from data_prep.digits_captions import COUNTS, GRID, Placed, article, captions, compose
from diffmoe_ep.data.keyed import keyed, permutation
from diffmoe_ep.encoders.tiny import Pairs, make_tiny_t5

STEPS, BATCH = 1500, 64
CANVAS = 24  # captions do not depend on it
MADE_OF = "captions of the digits: half corrupted spans, half other words; 1"  # the number changes with the pairs
KINDS = (0, 1, 0, 2)  # of captions, step by step: places, counts, places, relations
SPANS, LONGEST = 4, 5  # most masked spans in a caption, most bytes of one


def make(folder: Path, steps: int, seed: int, width: int, layers: int) -> bool:
    """Make the encoder, or find that it is there; returns whether it was made."""
    with tqdm(desc="tiny T5", total=steps, unit="step", delay=2.0, leave=False) as bar:

        def show(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        return make_tiny_t5(
            folder, lambda step: pairs(step, seed), steps=steps, seed=seed, width=width, layers=layers, made_of=MADE_OF, progress=show
        )


def pairs(step: int, seed: int) -> Pairs:
    """What a step learns from: text to read, text to write. All captions of a step are of one kind, so that they are about equally long."""
    kind = KINDS[step % len(KINDS)]
    found = []
    for number in range(step * BATCH, (step + 1) * BATCH):
        generator = keyed(seed, number, "caption", part=1)
        words = [int(word) for word in generator.bit_generator.random_raw(1 + 2 * SPANS)]
        placed = _placed(number, two=kind == 2)
        text = captions(placed)[kind].text
        if words[0] % 2:
            found.append((text, restated(placed, kind, permutation(generator, len(placed)))))
        else:
            found.append(corrupted(text, words[1:]))
    return found


def corrupted(text: str, words: list[int]) -> tuple[str, str]:
    """A text with masked spans, and the spans after the marks that stand for them: T5's span corruption, by random words."""
    spans, end = [], 0
    parts = 1 + words[0] % SPANS
    for place in range(parts):  # a span somewhere in each of these parts
        low, high = len(text) * place // parts, len(text) * (place + 1) // parts
        start = max(end + 1, low + words[2 * place] // 7 % max(1, high - low))
        stop = min(high, start + 1 + words[2 * place + 1] % LONGEST)
        if start < stop:
            spans.append((start, stop))
            end = stop
    read, written, done = "", "", 0
    for mark, (start, stop) in enumerate(spans):
        read += f"{text[done:start]}<extra_id_{mark}>"
        written += f"<extra_id_{mark}>{text[start:stop]}"
        done = stop
    return read + text[done:], f"{written}<extra_id_{len(spans)}>"


def restated(placed: tuple[Placed, ...], kind: int, order: np.ndarray) -> str:
    """Caption number `kind` of a canvas in other words; what it lists comes in a given order of the digits."""
    shuffled = [placed[place] for place in order]
    if kind == 0:
        digit_at = {(found.row, found.column): str(found.digit) for found in placed}
        return "|".join("".join(digit_at.get((row, column), ".") for column in range(GRID)) for row in range(GRID))
    if kind == 1:
        kinds = list(dict.fromkeys(found.digit for found in shuffled))
        return ", ".join(f"{digit} {COUNTS[sum(found.digit == digit for found in placed) - 1]}" for digit in kinds)
    first, second = placed
    relation = "below" if first.row < second.row else "to the right of"
    return f"{article(second.digit)} {second.digit} {relation} {article(first.digit)} {first.digit}"


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
