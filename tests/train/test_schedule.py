"""The learning rate at the steps where its shape shows."""

import math
from dataclasses import replace
from typing import Any

import pytest

from diffmoe_ep.config import OptimizerConfig, ScheduleConfig, TrainConfig
from diffmoe_ep.train.schedule import learning_rate


def rates(kind: Any, **others: Any) -> list[float]:
    train = replace(
        TrainConfig(), steps=100, optimizer=OptimizerConfig(lr=2.0), schedule=ScheduleConfig(kind=kind, **others)
    )
    return [learning_rate(train, step) for step in range(100)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_is_linear(kind: str) -> None:
    found = rates(kind, warmup=10)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(2.0)


def test_shapes() -> None:
    assert set(rates("constant")) == {2.0}
    assert rates("linear", final=0.5) == pytest.approx([2 - step / 100 for step in range(100)])
    assert rates("cosine", warmup=20, final=0.1)[60] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert rates("linear")[99] == pytest.approx(0.02)
