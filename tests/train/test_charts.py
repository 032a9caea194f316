"""Curves of characters: their ends are where the values are."""

import math

from diffmoe_ep.train.charts import bar, curve, sampled, sparkline


def test_a_curve_is_sampled_evenly() -> None:
    assert sampled([0, 10, 20], [1.0, 3.0, 5.0], 5) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sampled([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert sampled([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0], 2, of=max) == [3.0, 7.0]
    assert sampled([0, 10, 20], [1.0, math.nan, 5.0], 3) == [1.0, 3.0, 5.0]
    assert sampled([7], [2.0], 4) == [2.0]
    assert sampled([7], [math.inf], 4) == sampled([], [], 4) == []


def test_a_line_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.0, 0.5, 1.0], 0.0, 2.0) == "▁▃▅"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""


def test_a_falling_curve_begins_at_the_top_and_ends_at_the_foot() -> None:
    assert curve([1.0, 0.0], 1) == ["⢱"]
    assert curve([3.0, 2.0, 1.0, 0.0], 1) == ["⠑⢄"]
    assert curve([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 2) == ["⠑⢄  ", "  ⠑⢄"]
    assert curve([1.0, 1.0], 2) == [" ", "⣀"]


def test_a_bar_has_eighths() -> None:
    assert [bar(share, 2) for share in (0.0, 0.25, 1 / 16, 1.0, 7.0, -1.0)] == ["", "▌", "▏", "██", "██", ""]
