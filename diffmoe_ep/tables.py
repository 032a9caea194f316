"""Numbers in words with units, and the one printer of tables: whatever a command prints in columns is laid out here."""

from collections.abc import Sequence
from itertools import chain, repeat

GAP = "  "


def size(number: float) -> str:
    """Bytes in words: three digits and a decimal unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= 0.9995 * factor:
            return f"{three_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in words: three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * factor:
            return f"{three_digits(seconds / factor)} {unit}"
    return f"{seconds * 1e6:.0f} us"


def three_digits(number: float) -> str:
    """A number with three digits, or all those before the point where there are more."""
    return f"{number:,.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"


def table(rows: Sequence[Sequence[str]], align: str = "<>", rule: bool = True) -> list[str]:
    """Rows, the first of them headings, as lines with columns; rule: draw a line below the headings.

    align: for each column `<` flush left or `>` flush right; its last character holds for all further columns.
    """
    sides = chain(align, repeat(align[-1]))
    columns = [
        [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        for side, column in zip(sides, zip(*rows, strict=True), strict=False)
    ]
    lines = [GAP.join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]] if rule else lines


def beside(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Two tables side by side."""
    wide, height = max(map(len, one)) + 6, max(len(one), len(other))
    padded = [[*part, *[""] * (height - len(part))] for part in (one, other)]
    return [f"{a:<{wide}}{b}".rstrip() for a, b in zip(*padded, strict=True)]
