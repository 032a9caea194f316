"""Numbers in words with units, and the one printer of tables: whatever a command prints in columns is laid out here."""

from collections.abc import Sequence
from itertools import chain, islice, repeat

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


def table(
    rows: Sequence[Sequence[str]], align: str = "<>", rule: bool = True, groups: Sequence[tuple[str, int]] = ()
) -> list[str]:
    """Rows, the first of them headings, as lines with columns; rule: draw a line below the headings.

    align: for each column `<` flush left or `>` flush right; its last character holds for all further columns.
    groups: titles above the headings, each with the number of columns that it spans; "" for none.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = list(islice(chain(align, repeat(align[-1])), len(widths)))
    lines = [
        GAP.join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
    above, left = list[str](), list(widths)
    for title, number in groups:
        wide = sum(left[:number]) + len(GAP) * (number - 1)
        above.append(f"{f' {title} ':-^{wide}}" if title else " " * wide)
        left = left[number:]
    titles = [GAP.join(above).rstrip()] if groups else []
    return [*titles, lines[0], *(["-" * max(map(len, lines))] if rule else []), *lines[1:]]


def beside(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Two tables side by side."""
    wide, height = max(map(len, one)) + 6, max(len(one), len(other))
    padded = [[*part, *[""] * (height - len(part))] for part in (one, other)]
    return [f"{a:<{wide}}{b}".rstrip() for a, b in zip(*padded, strict=True)]
