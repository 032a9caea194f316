"""The benches compare equal work: contenders are held to each other in float64, numbers to their own table, never to a
clock.
"""

import json
import statistics
from unittest import mock

import pytest
import torch

from diffmoe_ep.bench.experts import bench_experts
from diffmoe_ep.bench.layer import Case, PlainLoop, bench_layer, our_layer
from diffmoe_ep.bench.step import bench_step
from diffmoe_ep.bench.timing import Timing, interleaved
from diffmoe_ep.bench.training import PARTS, TrainingStep
from diffmoe_ep.config import ConfigError, from_tree
from diffmoe_ep.parallel.mesh import Mesh, destroy_mesh, init_mesh
from diffmoe_ep.train import trainer
from ranks import run

pytestmark = pytest.mark.slow

CASE = Case(16, 64, 4)


def test_ours_and_the_plain_loop_do_the_same_work() -> None:
    ours, loop = our_layer(CASE, Mesh()).double(), PlainLoop(CASE).double()
    mine, theirs = ours.layer, dict(loop.named_parameters())
    with torch.no_grad():
        assert mine.predictor is not None
        pairs = {
            "router.weight": mine.router.weight, "predictor.0.weight": mine.predictor.fc1.weight,
            "predictor.0.bias": mine.predictor.fc1.bias, "predictor.2.weight": mine.predictor.fc2.weight,
            "predictor.2.bias": mine.predictor.fc2.bias,
        }  # fmt: skip
        for name, weight in pairs.items():
            theirs[name].copy_(weight)
        for expert in range(CASE.experts):
            for part in ("fc1", "fc2"):
                theirs[f"experts.{expert}.{part}.weight"].copy_(getattr(mine.experts, f"{part}_weight")[expert].T)
                theirs[f"experts.{expert}.{part}.bias"].copy_(getattr(mine.experts, f"{part}_bias")[expert])
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(1, CASE.tokens, CASE.hidden, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]
    inputs[1].data.copy_(inputs[0].data)
    probe = torch.randn(1, CASE.tokens, CASE.hidden, generator=generator, dtype=torch.float64)
    for module, x in zip((ours, loop), inputs, strict=True):
        mixed, loss = module(x)
        ((mixed * probe).sum() + loss).backward()
    torch.testing.assert_close(
        ours(inputs[0])[0], loop(inputs[1])[0], rtol=0, atol=1e-6
    )  # the loop's softmax is float32
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-5)
    gradients = [theirs[f"experts.{expert}.fc1.weight"].grad for expert in range(CASE.experts)]
    fc1 = torch.stack([gradient.T for gradient in gradients if gradient is not None])
    torch.testing.assert_close(mine.experts.fc1_weight.grad, fc1, rtol=0, atol=1e-5)


def measured(rank: int, world: int) -> list[str]:
    mesh = init_mesh(world, world, 2)
    found = bench_layer(mesh, [CASE], turns=2)
    row = found.rows[0]
    alone = {"loop", "matmuls", "batched"} if world == 1 else set()  # what one rank can be measured against
    assert set(row.timings) == {"dense", "ours", "deepspeed"} | alone
    assert row.limit == pytest.approx(1 + 1 / 12 + CASE.experts / (4 * CASE.hidden))
    assert json.loads(json.dumps(found.as_dict()))["rows"][0]["timings"]["ours"]["seconds"] == list(
        row.timings["ours"].seconds
    )
    lines = found.lines()
    destroy_mesh()
    return lines


@pytest.mark.parametrize("world", [1, 2])
def test_every_contender_runs_on_the_ranks(world: int) -> None:
    lines = run(world, measured, world)[0]
    assert "DeepSpeed top-1" in lines[2]
    assert lines[4].startswith("16, 64, 4")
    assert ("2 ranks" in lines[-1]) == (world == 2)


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(ConfigError, match="65 tokens, 4 experts"):
        bench_layer(Mesh(), [Case(16, 65, 4)], turns=2)


def steps(rank: int) -> tuple[dict[str, Timing], dict[str, dict[str, float]], list[str]]:
    model = {"input_size": 8, "hidden_size": 16, "num_blocks": 2, "num_heads": 2, "num_classes": 4, "num_experts": 4}
    config = from_tree({"model": model, "train": {"global_batch": 2, "precision": "float32"}})
    found = bench_step(config, init_mesh(1, 1, 2.0, "cpu"), turns=3)
    return found.timings, found.parts, found.lines()


def test_a_step_is_its_parts_and_the_dense_twin_is_dense() -> None:
    timings, parts, lines = run(1, steps)[0]
    for name, timing in timings.items():
        assert len(timing.seconds) == 3
        assert sum(parts[name][part] for part in PARTS) < 2 * max(timing.seconds)
    assert lines[7].split()[-1] == f"{timings['experts'].median / timings['dense'].median:.2f}"


def compiled(rank: int) -> list[bool]:
    """Whether a measured model is compiled, with compute.compile off and on."""
    model = {"input_size": 8, "hidden_size": 16, "num_blocks": 2, "num_heads": 2, "num_classes": 4, "num_experts": 4}
    mesh, found = init_mesh(1, 1, 2.0, "cpu"), []
    for on in (False, True):
        with mock.patch.object(trainer, "apply_compile") as applied:
            config = from_tree({"model": model, "train": {"global_batch": 2}, "compute": {"compile": on}})
            TrainingStep(config, mesh)
        found.append(applied.called)
    return found


def test_the_measured_model_is_trainings_own() -> None:
    assert run(1, compiled)[0] == [False, True]


def test_costs_are_told_per_token() -> None:
    found = bench_experts(Mesh(), hidden=16, numbers=(2, 4), rows_each=8, turns=2)
    assert found.tokens == {2: 16, 4: 32}
    assert found.per_token(4) == found.timings[4].median / 32
    assert [line.split()[0] for line in found.lines()[4:6]] == ["2", "4"]
    assert bench_experts(Mesh(), hidden=16, numbers=(2, 4), rows_each=None, tokens=32, turns=2).tokens == {2: 32, 4: 32}


def test_contenders_take_turns() -> None:
    done: list[str] = []
    found = interleaved(
        {"a": lambda: done.append("a"), "b": lambda: done.append("b")}, 3, torch.device("cpu"), lambda: None
    )
    assert done == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert all(len(timing.seconds) == 3 for timing in found.values())
    timing, other = Timing((3.0, 1.0, 2.0, 4.0)), Timing((1.0, 2.0, 3.0, 2.0))
    assert timing.over(other) == (2.5 / 2.0, 1.0)
    assert timing.spread == pytest.approx(
        (statistics.quantiles(timing.seconds)[2] - statistics.quantiles(timing.seconds)[0]) / 2.5
    )
