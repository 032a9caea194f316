"""Numbers in words with units, and tables to read."""

from collections.abc import Sequence

GAP = "  "


def size(number: float) -> str:
    """Bytes in words: three digits and a decimal unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= 0.9995 * factor:
            scaled = number / factor
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{number:.0f} B"


def span(seconds: float) -> str:
    """Seconds in words: three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * factor:
            scaled = seconds / factor
            return f"{scaled:,.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows, the first of them headings, in columns: the first `left` ones flush left, the rest right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    made = []
    for row in rows:
        cells = [
            cell.ljust(wide) if column < left else cell.rjust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        made.append(GAP.join(cells).rstrip())
    return [made[0], "-" * max(map(len, made)), *made[1:]]


def beside(one: list[str], other: list[str]) -> list[str]:
    """Two tables side by side."""
    wide = max(map(len, one)) + 6
    height = max(len(one), len(other))
    padded = [part + [""] * (height - len(part)) for part in (one, other)]
    return [f"{a.ljust(wide)}{b}".rstrip() for a, b in zip(*padded, strict=True)]


def days_of(days: float) -> str:
    """Days in three digits."""
    return f"{days:,.{2 if days < 9.995 else 1 if days < 99.95 else 0}f}"
