"""The selection's bench: it tells the bytes that were sent, sees when algorithms differ, and tabulates the cost
model.
"""

import json
from typing import Any
from unittest import mock

import pytest
import torch

from diffmoe_ep.bench import topk as bench_select
from diffmoe_ep.bench.topk import Work, measure, predict
from diffmoe_ep.config import ConfigError
from diffmoe_ep.moe.pool import TopK
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh, init_mesh, launched_world
from ranks import run

pytestmark = pytest.mark.slow

WORK = Work(tokens=512, experts=8, hidden=16)


def measured(rank: int, fault: bool = False) -> dict[str, Any] | None:
    """The measurement as a user's JSON gets it, with the lines that are printed."""
    mesh = init_mesh(1, launched_world(), 1.0)
    original = bench_select.topk_per_expert

    def spoiled(scores: Any, k: Any, pools: Any, extra: Any = None) -> TopK:
        found = original(scores, k, pools, extra)
        return TopK(found.chosen.logical_not(), found.kth_value) if pools.algorithm == "radix" else found

    with mock.patch.object(bench_select, "topk_per_expert", spoiled if fault else original):
        found = measure(mesh, WORK, repetitions=3)
    return None if found is None else {**json.loads(json.dumps(found.as_dict())), "lines": found.lines()}


@pytest.mark.parametrize("world", [2, 4])
def test_measures_every_algorithm_and_the_dispatch(world: int) -> None:
    found, *others = run(world, measured)
    assert others == [None] * (world - 1)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["gather", "owner", "radix", "dispatch"]
    for name in ("gather", "owner", "radix"):
        assert rows[name]["received"] == rows[name]["predicted"]["received"]
        assert rows[name]["rounds"] == rows[name]["predicted"]["rounds"]
    assert rows["dispatch"]["received"] == pytest.approx(
        2 * 4 * 512 * 16 * (world - 1) / world, rel=0.2
    )  # the busiest rank
    assert rows["dispatch"]["rounds"] == 2
    assert all(0 < row["minimum"] <= row["median"] <= row["largest"] for row in found["rows"])
    assert found["identical"]
    assert found["picked"] in rows
    assert any(line.startswith("gather") for line in found["lines"])
    assert "the same bits" in found["lines"][-1]


def test_sees_algorithms_that_differ() -> None:
    found = run(2, measured, True)[0]
    assert not found["identical"]
    assert "DISAGREE" in found["lines"][-1]


def test_a_rank_alone_searches_by_itself() -> None:
    found = run(1, measured)[0]
    assert [(row["name"], row["received"], row["rounds"]) for row in found["rows"]] == [("here", 0, 0)]


def refused(rank: int) -> str:
    with pytest.raises(ConfigError) as error:
        measure(init_mesh(1, 2, 1.0), Work(experts=3))
    return str(error.value)


def test_experts_must_divide() -> None:
    assert all("3 experts" in text for text in run(2, refused))


def test_predicts_to_4096_ranks() -> None:
    found = predict(Work(tokens=8192, hidden=1024, compute="bfloat16"))
    assert [row.ranks for row in found.rows] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert [row.nodes for row in found.rows] == [row.ranks // 8 for row in found.rows]
    for row in found.rows:
        gather, owner, radix = row.costs
        assert gather.received == 4 * (row.ranks - 1) * 8192 * 32
        assert owner.received < gather.received
        assert radix.received == 4096 * 32 + 4 * 16 * (row.ranks - 1)
        assert row.picked == min(row.costs, key=lambda cost: cost.seconds).algorithm
        assert row.dispatch == pytest.approx(4 * 8192 * 1024, rel=0.13)
    assert found.rows[-1].picked == "radix"
    lines = found.lines()
    assert sum("radix" in line for line in lines) > 1
    assert len(lines) == 6 + len(found.rows)
    assert json.loads(json.dumps(found.as_dict()))["rows"][0]["costs"][0]["rounds"] == 1


def test_scores_are_of_each_rank() -> None:
    """Ranks draw different scores, or every search would be of copies."""
    first, second = (bench_select._drawn(WORK, Mesh(world=Group(size=2, rank=rank)))[0] for rank in (0, 1))
    assert not torch.equal(first, second)
