"""A training run is the same run, to the bit, whichever way its ranks find the top-k."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffmoe_ep.config import Config
from diffmoe_ep.moe import pool
from ranks import run
from train.runs import config, layout, trace


def traced(rank: int, given: Config) -> dict[str, Any]:
    """The run's trace, and which searches it made."""
    made, searches = [], dict(pool.SEARCHES)

    def noted(name: Any) -> Any:
        return lambda *arguments: made.append(name) or searches[name](*arguments)

    with mock.patch.object(pool, "SEARCHES", {name: noted(name) for name in searches}):
        return {**trace(rank, given), "searches": set(made)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "expert"), [(2, 2), (4, 2)])
def test_every_algorithm_is_the_same_run(digits: Path, world: int, expert: int) -> None:
    runs = {}
    for algorithm in ("gather", "owner", "radix", "auto"):
        given = layout(
            config(digits / "train", Path("unused"), "train.steps=5", f"compute.topk={algorithm}"), expert, 1
        )
        runs[algorithm] = run(world, traced, given, timeout=240)
        expected = {algorithm} if algorithm != "auto" else runs[algorithm][0]["searches"]
        assert len(expected) == 1
        assert all(one["searches"] == expected for one in runs[algorithm])
    for ranks in runs.values():
        for found, wanted in zip(ranks, runs["gather"], strict=True):
            assert found["loss"] == wanted["loss"]
            assert found["grad_norm"] == wanted["grad_norm"]
            assert torch.equal(torch.stack(found["thresholds"]), torch.stack(wanted["thresholds"]))
