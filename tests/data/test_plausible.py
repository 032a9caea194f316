"""Values that others make implausible."""

import numpy as np
import pytest

from diffmoe_ep.data.plausible import FAR, Spread, Usual


def spreads(count: int = 40) -> list[Spread]:
    return [Spread.of(row) for row in np.random.default_rng(0).normal(3.0, 2.0, (count, 256))]


def test_a_monster_does_not_hide_itself_or_its_like() -> None:
    """Among few samples, where one value moves mean and deviation of all to where it lies a few of them away."""
    monsters = [Spread.of(np.array([3.0, 1e30])), Spread.of(np.array([3.0, -1e30])), Spread.of(np.array([np.inf, 0.0]))]
    usual = Usual.of(spreads() + monsters)
    assert usual.mean == pytest.approx(3.0, abs=0.2)
    assert usual.deviation == pytest.approx(2.0, abs=0.2)
    assert all(usual.distance(monster) > FAR for monster in monsters)
    assert max(map(usual.distance, spreads())) < 10


def test_distances_do_not_depend_on_scale_and_shift() -> None:
    one, other = spreads(), [Spread(*(7 + 5 * value for value in each)) for each in spreads()]
    other = [each._replace(deviation=5 * before.deviation) for each, before in zip(other, one, strict=True)]
    for each, scaled in zip(one, other, strict=True):
        assert Usual.of(other).distance(scaled) == pytest.approx(Usual.of(one).distance(each))


def test_where_nobody_can_say_nothing_is_far() -> None:
    blank = [Spread.of(np.zeros(9))] * 5
    assert Usual.of(blank).distance(Spread.of(np.ones(9))) == 0
    assert Usual.of([]).distance(Spread.of(np.ones(9))) == 0
    assert Usual.of([]).distance(Spread(0.0, 1.0, float("nan"), 1.0)) == float("inf")
