"""Numbers in words, and columns that stand."""

import pytest

from diffmoe_ep.tables import beside, duration, size, table

ROWS = [("name", "n", "note"), ("a", "1", "first"), ("long one", "10", "")]


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (99_960_000, "100 MB"), (2.5e10, "25.0 GB")],
)
def test_bytes_in_words(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.99996, "1.00 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us"), (1234.0, "1,234 s")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_has_columns_and_a_rule() -> None:
    assert table(ROWS, "<><") == [
        "name       n  note",
        "-" * 19,
        "a          1  first",
        "long one  10",
    ]
    assert table(ROWS, rule=False) == ["name       n   note", "a          1  first", "long one  10"]
    assert table(ROWS, ">", rule=False)[1] == "       a   1  first"


def test_titles_span_their_columns() -> None:
    assert table([("a", "bbbbbb", "cccccc")], groups=[("", 1), ("both", 2)]) == [
        "   ---- both ----",
        "a  bbbbbb  cccccc",
        "-" * 17,
    ]


def test_tables_stand_beside_each_other() -> None:
    assert beside(["aa", "a"], ["b"]) == ["aa      b", "a"]
