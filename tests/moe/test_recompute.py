"""Activation recomputation: the same bits from less memory, by the choice that was made, which is never made twice."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import Config, ModelConfig, PoolConfig
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import apply_recompute, shard_experts, widen_pools
from diffmoe_ep.moe import layer as layers
from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.moe.dispatch import AllToAllDispatch, LocalDispatch, handle_of
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.thresholds import predictors_of
from ranks import run
from train.runs import busy, config, layout

pytestmark = pytest.mark.slow

SMALL = ModelConfig(
    input_size=8, in_channels=1, out_channels=1, hidden_size=32, num_heads=2, num_blocks=4, num_classes=3, num_experts=8
)
FAMILIES = {
    "diffmoe": SMALL,
    "ec": dataclasses.replace(SMALL, family="ec"),
    "tc": dataclasses.replace(SMALL, family="tc", top_k=2),
    "dense": dataclasses.replace(SMALL, family="dense"),
    "shared": dataclasses.replace(SMALL, shared_experts=1, granularity=2, num_experts=16),
}
AGAIN = ["ffn", "block"]


def make(
    model: ModelConfig, span: Any = "all", compute: torch.dtype | None = None, dtype: torch.dtype = torch.float64
) -> DiT:
    made = DiT(model, PoolConfig(span=span)).to(dtype)
    made.compute_type = compute
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return made


def inputs(samples: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.rand(samples, generator=generator, dtype=torch.float64).to(dtype), torch.arange(samples) % 3


def pass_through(
    model: DiT, recompute: Any, given: tuple[Tensor, Tensor, Tensor], between: Callable[[], None] | None = None
) -> list[Tensor]:
    """Prediction, auxiliary loss, what each layer reports and all gradients."""
    apply_recompute(model, recompute)
    output = model(*given)
    if between is not None:
        between()
    loss = output.prediction.square().mean() + output.auxiliary
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    reports = [
        tensor
        for report in output.layers
        for tensor in (report.processed, report.over_threshold, report.quantile)
        if tensor is not None
    ]
    return [
        output.prediction.detach(),
        output.auxiliary.detach(),
        *reports,
        *[one for one in gradients if one is not None],
    ]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("recompute", AGAIN)
@pytest.mark.parametrize(
    ("dtype", "compute"), [(torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family: str, dtype: torch.dtype, compute: torch.dtype | None, recompute: str) -> None:
    model, given = make(FAMILIES[family], compute=compute, dtype=dtype), inputs(dtype=dtype)
    expected = pass_through(model, "none", given)
    assert same(pass_through(model, "none", given), expected)  # twice in a row
    assert same(pass_through(model, recompute, given), expected)
    assert same(pass_through(model, recompute, given), expected)


@pytest.mark.parametrize("recompute", AGAIN)
def test_without_gradient_nothing_is_kept(recompute: Any) -> None:
    model, given = make(SMALL), inputs()
    apply_recompute(model, recompute)
    with torch.no_grad():
        assert torch.equal(model(*given).prediction, model.eval().train()(*given).prediction)
        model.eval()
        assert not model(*given).prediction.requires_grad


# -- the choice is kept ------------------------------------------------------------------------------------------------


def drifting() -> Any:
    """A selection that would choose otherwise if it were asked again: each call rolls the scores on by one token."""
    calls, choose = [0], layers.route_by_pool

    def drift(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return choose(scores.roll(calls[0], 0), *args, **kwargs)

    return mock.patch.object(layers, "route_by_pool", drift)


def choosing_anew() -> Any:
    """The planted fault: the second forward chooses again."""
    return mock.patch.object(MoELayer, "reuse_routing", return_value=contextlib.nullcontext())


@pytest.mark.parametrize("recompute", AGAIN)
def test_a_choice_that_would_differ_is_not_repeated(recompute: str) -> None:
    model, given = make(SMALL), inputs()
    with drifting():
        expected = pass_through(model, "none", given)
    with drifting():
        assert same(pass_through(model, recompute, given), expected)
    with drifting(), choosing_anew():
        assert not same(pass_through(model, recompute, given), expected)  # this test can fail


@pytest.mark.parametrize("recompute", AGAIN)
@pytest.mark.parametrize("family", ["diffmoe", "ec", "tc", "shared"])
def test_the_second_forward_goes_the_first_ones_way(family: str, recompute: str) -> None:
    """One routing of a layer for two dispatches of it; and what a layer kept is small beside one of its activations."""
    model, routes, used = make(FAMILIES[family]), [], []
    prepare, dispatch = LocalDispatch.prepare, LocalDispatch.dispatch
    with (
        mock.patch.object(LocalDispatch, "prepare", lambda self, a: routes.append(prepare(self, a)) or routes[-1]),
        mock.patch.object(
            LocalDispatch, "dispatch", lambda self, tokens, way: used.append(way) or dispatch(self, tokens, way)
        ),
    ):
        pass_through(model, recompute, inputs())
    assert len(routes) == 2
    assert [id(way.handle) for way in used] == [id(way.handle) for way in [*routes, *reversed(routes)]]


def moved(rank: int, family: str) -> None:
    """Two expert-parallel ranks: the same bits, and in the backward the rows travel once more, but nothing is chosen or
    asked.
    """
    mesh = init_mesh(2, 2 if family != "ec" else 1, 1.0)
    given = (
        inputs()[0][2 * rank : 2 * rank + 2],
        inputs()[1][2 * rank : 2 * rank + 2],
        inputs()[2][2 * rank : 2 * rank + 2],
    )
    pool, expert = mesh.pool.traffic, mesh.expert.traffic

    def forget() -> None:
        pool.reset()
        expert.reset()

    for overlap in (1, 2):
        model = widen_pools(shard_experts(make(FAMILIES[family]), mesh, overlap), mesh)
        expected = pass_through(model, "none", given, forget)
        received = expert.received
        assert (expert.rounds, expert.syncs, pool.rounds) == (2 * 2 * overlap, 0, 0)  # two layers, there and back
        for recompute in AGAIN:
            assert same(pass_through(model, recompute, given, forget), expected)
            assert (expert.rounds, expert.syncs, pool.rounds) == (2 * 2 * 2 * overlap, 0, 0)
            assert expert.received == 2 * received


@pytest.mark.parametrize("family", ["diffmoe", "tc", "ec", "shared"])
def test_ranks_choose_and_ask_once(family: str) -> None:
    """No selection, no exchange of splits and no wait of the host in a backward."""
    run(2, moved, family)


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(blocks: int, recompute: Any) -> int:
    """Bytes that a forward keeps for its backward beside the weights: what blocks save, or the inputs of what is
    computed again.
    """
    model, given, held = (
        make(dataclasses.replace(SMALL, num_blocks=blocks), dtype=torch.float32),
        inputs(8, torch.float32),
        {},
    )
    apply_recompute(model, recompute)
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    def inputs_of(function: Any, *args: Any, **kwargs: Any) -> Any:
        for arg in [
            tensor
            for given in args
            for tensor in (given if isinstance(given, tuple) else [given])
            if isinstance(tensor, Tensor)
        ]:
            keep(arg)
        return checkpoint(function, *args, **kwargs)

    checkpoint = torch.utils.checkpoint.checkpoint
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        mock.patch("diffmoe_ep.model.parallelize.checkpoint", inputs_of),
    ):
        output = model(*given)
    total = sum(size for size, _ in held.values())
    del output
    return total


def test_memory_falls_to_the_blocks_inputs() -> None:
    """A block keeps no more than its input and the condition; the FFN part's own share falls away with `ffn`."""
    tokens = 8 * 16 * 32 * 4  # bytes of (B, T, D)
    per_block = {kind: (saved_bytes(6, kind) - saved_bytes(2, kind)) / 4 for kind in ("none", "ffn", "block")}
    assert per_block["block"] <= 1.1 * tokens
    assert (
        per_block["ffn"] <= per_block["none"] - 8 * tokens
    )  # the hidden layer, before and after its GELU, is 4 D wide each
    assert per_block["none"] >= 15 * per_block["block"]


def test_what_is_kept_of_a_choice_is_small() -> None:
    layer, wide = MoELayer(dataclasses.replace(SMALL, hidden_size=384), PoolConfig()), 384 * 4
    saved: list[Routing] = []
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    with layer.reuse_routing(saved):
        layer(torch.randn(4, 16, 384))
    handle = handle_of(saved[0])
    permutation = handle.permutation
    indices = [
        handle.chosen,
        handle.processed,
        permutation.token,
        permutation.flat_index,
        permutation.by_token,
        permutation.offsets,
    ]
    assert sum(tensor.nbytes for tensor in indices) <= 0.05 * 4 * 16 * wide


# -- a training run ----------------------------------------------------------------------------------------------------


def trained(rank: int, given: Config, recompute: str, overlap: int = 1) -> dict[str, Any]:
    """Losses and gradient norms of a run; its thresholds, and what a plain simulation makes of the predictions of its
    first forwards.
    """
    told: dict[str, Any] = {"loss": [], "grad_norm": [], "thresholds": [], "expected": [], "forwards": 0}
    seen: dict[Any, list[Tensor]] = {}
    predict, backwards = CapacityPredictor.forward, []

    def watch(self: CapacityPredictor, tokens: Tensor) -> Tensor:
        logits = predict(self, tokens)
        told["forwards"] += 1
        if not backwards:
            seen.setdefault(self, []).append(logits.detach())
        return logits

    with mock.patch.object(training, "initialize", busy(0.1)), mock.patch.object(CapacityPredictor, "forward", watch):
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, Mixture.open(given.data))
        apply_recompute(trainer.model, recompute)  # type: ignore[arg-type]
        for layer in trainer.model.moe_layers():
            if isinstance(layer.dispatcher, AllToAllDispatch):
                layer.dispatcher.num_chunks = overlap
        backward = trainer.engine.backward

        def flagged(loss: Tensor) -> None:
            backwards.append(True)
            backward(loss)
            backwards.clear()

        trainer.engine.backward = flagged  # type: ignore[method-assign]
        tau = torch.zeros(2, given.model.num_experts, dtype=torch.float64)
        clock = training.Clock(0)
        for _ in range(given.train.steps):
            seen.clear()
            values = trainer.measure(trainer.train_step(clock))
            told["loss"].append(values["loss"])
            told["grad_norm"].append(values["grad_norm"])
            told["thresholds"].append(
                torch.stack([predictor.threshold.clone() for predictor in predictors_of(trainer.model)])
            )
            pools = [[meshed(logits, mesh) for logits in seen[predictor]] for predictor in predictors_of(trainer.model)]
            quantile = torch.stack([torch.stack([kth(pool) for pool in layer]).mean(0) for layer in pools])
            tau = given.model.threshold_decay * tau + (1 - given.model.threshold_decay) * quantile
            told["expected"].append(tau)
        told["updates"] = [int(predictor.updates) for predictor in predictors_of(trainer.model)]
        trainer.stream.close()
    return told


def meshed(logits: Tensor, mesh: Mesh) -> Tensor:
    """The predictions of all ranks."""
    parts = [torch.empty_like(logits) for _ in range(mesh.size)]
    if mesh.size == 1:
        return logits
    torch.distributed.all_gather(parts, logits)
    return torch.cat(parts)


def kth(logits: Tensor) -> Tensor:
    """The k-th largest probability of each expert in one pool, in float64."""
    ordered = torch.sigmoid(logits.double()).sort(0, descending=True).values
    return ordered[len(logits) // logits.shape[1] - 1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["none", *AGAIN])
def test_thresholds_move_once_a_step_for_a_hundred_steps(digits: Path, recompute: str) -> None:
    """Against the plain simulation, with three micro-steps a step, with and without recomputation."""
    given = config(
        digits / "train",
        Path("unused"),
        "train.steps=100",
        "train.grad_accumulation=3",
        "model.hidden_size=16",
        "model.num_blocks=4",
    )
    told = run(1, trained, given, recompute, timeout=300)[0]
    assert told["updates"] == [100, 100]
    assert told["forwards"] == 100 * 3 * 2 * (1 if recompute == "none" else 2)
    for found, expected in zip(told["thresholds"], told["expected"], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_is_the_same_with_recomputation(digits: Path, precision: str) -> None:
    """Through the engine, experts on two ranks, ZeRO 2: the same bits with all of a block computed again, in two parts
    that overlap.
    """
    overrides = ("train.steps=4", "train.grad_accumulation=3", f"train.precision={precision}", "model.shared_experts=1")
    given = layout(config(digits / "train", Path("unused"), *overrides), 2, 2)
    expected = run(2, trained, given, "none")
    for recompute in AGAIN:
        for found, wanted in zip(run(2, trained, given, recompute, 2), expected, strict=True):
            assert found["loss"] == wanted["loss"]
            assert found["grad_norm"] == wanted["grad_norm"]
            assert torch.equal(torch.stack(found["thresholds"]), torch.stack(wanted["thresholds"]))
            torch.testing.assert_close(found["thresholds"][-1].double(), found["expected"][-1], rtol=1e-5, atol=0)
