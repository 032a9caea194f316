"""`diffmoe verify` holds on sound ranks, and names each planted fault: what differs, for whom, by how much."""

import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.moe.dispatch import AllToAllDispatch
from diffmoe_ep.moe.experts import Experts
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.parallel.collectives import ALONE
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.engine import Engine
from diffmoe_ep.verify import layer as verify_layer
from diffmoe_ep.verify.difference import compare
from diffmoe_ep.verify.verify import Check, Layout, layouts, verify
from ranks import run
from train.runs import FAULTS as TRAINING_FAULTS

Row = tuple[str, bool, str]  # name, passed, where


def narrow_pools() -> Any:
    """Each rank chooses for itself."""

    def topk_per_expert(scores: Tensor, k: int, pools: Pools, extra: Tensor) -> Any:
        return original(
            scores, min(k, len(scores)), Pools(min(pools.size(0) or len(scores), len(scores)), ALONE), extra
        )

    original = verify_layer.topk_per_expert
    return mock.patch.object(verify_layer, "topk_per_expert", topk_per_expert)


def late_ties() -> Any:
    """Of equal scores the later token wins."""

    def topk_per_expert(scores: Tensor, k: int, pools: Pools, extra: Tensor) -> Any:
        assert pools.group == ALONE
        found = original(scores.flip(0), k, pools, extra.flip(0))
        return type(found)(found.chosen.flip(0), found.kth_value.flip(0))

    original = verify_layer.topk_per_expert
    return mock.patch.object(verify_layer, "topk_per_expert", topk_per_expert)


def doubled_answers() -> Any:
    """What comes back to rank 1 is twice what it should be."""
    original: Callable[..., Tensor] = AllToAllDispatch.combine

    def combine(self: AllToAllDispatch, *given: Any) -> Tensor:
        return original(self, *given) * (2 if self.group.rank == 1 else 1)

    return mock.patch.object(AllToAllDispatch, "combine", combine)


def forgotten_bias() -> Any:
    """Expert 2 forgets its last bias."""
    original: Callable[..., Tensor] = Experts.forward

    def forward(self: Experts, rows: Tensor, counts: Any) -> Tensor:
        out, start = original(self, rows, counts), sum(counts[:2])
        if len(counts) > 2 and self.first == 0:
            out = torch.cat([out[:start], out[start : start + counts[2]] - self.fc2_bias[2], out[start + counts[2] :]])
        return out

    return mock.patch.object(Experts, "forward", forward)


def expert_gradients_times_replicas() -> Any:
    """The field's commonest fault: divided by the expert group's ranks where it should be by all."""
    original: Callable[..., None] = Engine.backward

    def backward(self: Engine, loss: Tensor) -> None:
        if not hasattr(self, "_spoiled"):
            self._spoiled = True  # type: ignore[attr-defined]
            for layer in self.module.moe_layers():
                for parameter in layer.experts.parameters():
                    parameter.register_hook(lambda gradient: gradient * self.mesh.replicas.size)
        original(self, loss)

    return mock.patch.object(Engine, "backward", backward)


def unshared_training_pools() -> Any:
    """The trainer leaves pools as wide as a rank."""

    def narrow(model: Any, mesh: Any) -> Any:
        for layer in model.moe_layers():
            layer.pools = Pools(None, ALONE)
        return model

    return mock.patch.object(training, "widen_pools", narrow)


def thresholds_twice() -> Any:
    """Thresholds move twice a step."""
    original: Callable[..., None] = CapacityPredictor.update

    def update(self: CapacityPredictor, quantile: Tensor) -> None:
        original(self, quantile)
        original(self, quantile)

    return mock.patch.object(CapacityPredictor, "update", update)


FAULTS: dict[str, Callable[[], Any]] = {
    "none": lambda: mock.patch.object(Layout, "__doc__", Layout.__doc__),
    "narrow pools": narrow_pools,
    "late ties": late_ties,
    "doubled answers": doubled_answers,
    "forgotten bias": forgotten_bias,
    "expert gradients times replicas": expert_gradients_times_replicas,
    "unshared training pools": unshared_training_pools,
    "thresholds twice": thresholds_twice,
    "forgotten moments": TRAINING_FAULTS["forgotten moments"],
}


def on_ranks(rank: int, fault: str, given: list[Layout] | None, stages: tuple[int, ...]) -> list[Row]:
    """The checks of a process group with a fault in it."""
    with FAULTS[fault]():
        verdict = verify("cpu", 2.0, given=given, stages=stages)
    assert verdict.passed == all(check.passed for check in verdict.checks)
    return [(check.name, check.passed, check.difference.where) for check in verdict.checks]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sound_ranks_pass(world: int) -> None:
    results = run(world, on_ranks, "none", None, (0, 1, 2) if world == 2 else (2,), timeout=400)
    assert [row for row in results[0] if not row[1]] == []
    assert len({tuple(row[0] for row in rows) for rows in results}) == 1  # all ranks made the same checks
    names = " ".join(row[0] for row in results[0])
    for expert in (1, 2, 4)[: world.bit_length()]:
        assert f"EP {expert}," in names
    for part in (
        "1 choice",
        "radix",
        "1 layer outputs",
        "1 expert gradients",
        "2 dispatch",
        "2 expert kernel loop",
        "2 expert kernel grouped, bf16",
        "3 losses",
        *(["5 state taken over"] if world > 1 else []),  # one layout at one stage hands nothing on
    ):
        assert part in names


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "world", "layout", "failing", "message"),
    [
        ("narrow pools", 2, Layout(1, 2), "1 choice", "pools of 4 samples"),
        ("late ties", 1, Layout(1, 1), "1 choice", "with ties"),
        ("doubled answers", 2, Layout(2, 2), "2 dispatch and combine", "rank 1: "),
        ("doubled answers", 2, Layout(2, 2), "1 layer outputs", "rank 1: "),
        ("forgotten bias", 1, Layout(1, 1), "2 expert kernel", "gradient of fc2_bias, expert 2 "),
        ("forgotten bias", 2, Layout(2, 2), "1 expert gradients", "gradient of experts.fc2_bias, expert 2 "),
        (
            "expert gradients times replicas",
            4,
            Layout(2, 2),
            "3 moves of experts",
            " moves 2 times as far as on one rank; move[",
        ),
        ("unshared training pools", 2, Layout(2, 2), "3 losses", "loss of step["),
        ("thresholds twice", 1, Layout(1, 1), "3 norms and thresholds", "threshold of step, layer, expert["),
    ],
)
def test_planted_faults_are_named(fault: str, world: int, layout: Layout, failing: str, message: str) -> None:
    rows = run(world, on_ranks, fault, [layout], (1,), timeout=300)[0]
    failed = {name: where for name, passed, where in rows if not passed}
    assert any(name.startswith(failing) for name in failed), failed
    assert all(message in where for name, where in failed.items() if name.startswith(failing)), failed
    if fault == "thresholds twice":
        assert {name[:1] for name in failed} == {"3"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_state_that_a_change_of_layout_loses_is_named() -> None:
    rows = run(2, on_ranks, "forgotten moments", [Layout(1, 2), Layout(2, 2)], (1,), timeout=300)[0]
    failed = {name: where for name, passed, where in rows if not passed}
    assert list(failed) == ["5 state taken over by EP 2, ZeRO 1"]
    assert re.match(r"rank 0: optimizer\.\S+\[.*\] is 0, not ", failed["5 state taken over by EP 2, ZeRO 1"])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 16])
def test_layouts_fit_the_ranks(world: int) -> None:
    found = layouts(world)
    assert found[0] == Layout(1, world)
    assert len(set(found)) == len(found)
    for layout in found:
        assert world % layout.expert == 0
        assert world % layout.pool == 0
        assert verify_layer.num_experts(world) % layout.expert == 0
    if world > 1:
        assert Layout(world, world) in found


def test_a_difference_names_its_place() -> None:
    expected = torch.zeros(2, 3)
    found = expected.clone()
    found[1, 2] = 0.5
    assert compare("w", found, expected).where == "w[1, 2] is 0.5, not 0"
    assert compare("w", found, expected, first=4).where == "w, expert 5 [2] is 0.5, not 0"
    assert compare("w", found, expected).largest == 0.5
    assert compare("w", found * 4, found * 2, relative=True).largest == 1.0
    found[0, 0] = math.nan
    assert compare("w", found, expected).largest == math.inf
    assert compare("w", found[:1], expected).where == "w has shape (1, 3), not (2, 3)"
    assert compare("w", expected[:0], expected[:0]).largest == 0.0
    infinite = torch.full((2,), math.inf)
    assert compare("w", infinite, infinite).largest == 0.0
    assert compare("w", infinite, -infinite).largest == math.inf


def test_a_failure_has_a_line_of_its_own() -> None:
    sound = compare("w", torch.zeros(1), torch.zeros(1))
    assert Check("1 choice", "a sort", sound, 0.0).lines()[0].endswith("  ok")
    row, place = Check("1 choice", "a sort", compare("w", torch.ones(1), torch.zeros(1)), 0.5).lines()
    assert row.endswith("  FAILED")
    assert place == "    w[0] is 1, not 0"
