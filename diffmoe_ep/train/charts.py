"""Curves and bars of characters, for a terminal."""

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import fmean

LEVELS = "▁▂▃▄▅▆▇█"
PARTS = " ▏▎▍▌▋▊▉"  # of a full block, in eighths from the left
DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # of a Braille character: (left, right), each from below


def sampled(
    places: Sequence[float], values: Sequence[float], count: int, of: Callable[[Sequence[float]], float] = fmean
) -> list[float]:
    """A curve at `count` places, evenly from the first to the last: the mean (or what `of` makes) of the values around
    each, or, where there are fewer values, what lies between two. places ascend; values that are not finite are passed
    over.
    """
    points = [(place, value) for place, value in zip(places, values, strict=True) if math.isfinite(value)]
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    bins: list[list[float]] = [[] for _ in range(count)]
    for place, value in points:
        bins[round((place - first) / ((last - first) or 1) * (count - 1))].append(value)
    known = [(number, of(found)) for number, found in enumerate(bins) if found]
    result: list[float] = []
    for (start, low), (end, high) in itertools.pairwise(known):
        result += [low + (high - low) * step / (end - start) for step in range(end - start)]
    return [*result, known[-1][1]]


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """A curve in one line, a character each; from its least value to its greatest, or between those given."""
    if not values:
        return ""
    low = min(values) if low is None else low
    span = (max(values) if high is None else high) - low
    heights = [(value - low) / span if span > 0 else 0.0 for value in values]
    return "".join(LEVELS[max(0, min(len(LEVELS) - 1, int(height * len(LEVELS))))] for height in heights)


def curve(values: Sequence[float], height: int) -> list[str]:
    """A curve in lines of Braille characters, two values in each column; the least value at the foot."""
    low, span = min(values), max(values) - min(values)
    top = 4 * height - 1
    levels = [round((value - low) / span * top) if span > 0 else 0 for value in values]
    cells = [[0] * ((len(values) + 1) // 2) for _ in range(height)]
    before = levels[0]
    for place, level in enumerate(levels):
        nearest = level if level == before else before + (1 if level > before else -1)
        for dot in range(min(nearest, level), max(nearest, level) + 1):  # down or up to it without a gap
            cells[height - 1 - dot // 4][place // 2] |= DOTS[place % 2][dot % 4]
        before = level
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def bar(share: float, width: int) -> str:
    """A bar of so many characters at most; share: 0 to 1 of them."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return ("█" * (eighths // 8) + PARTS[eighths % 8]).rstrip()
