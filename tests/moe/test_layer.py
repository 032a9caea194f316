"""The whole layer against the paper's algorithm written plainly in float64, forward and backward, alone and on
ranks.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import shard_experts, widen_pools
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.moe.dispatch import AllToAllDispatch, LocalDispatch
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import init_mesh, launched_world, pool_ranks
from ranks import run

MODEL = ModelConfig(
    input_size=4,
    in_channels=1,
    out_channels=1,
    hidden_size=8,
    num_heads=2,
    num_blocks=2,
    num_classes=3,
    num_experts=4,
    interleave=False,
)
TOKENS = 4  # of a sample


def make_layer(pool: PoolConfig, model: ModelConfig = MODEL) -> MoELayer:
    """A layer in float64 whose weights are all busy."""
    layer = MoELayer(model, pool).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return layer


def inputs(samples: int = 8) -> Tensor:
    return torch.randn(samples, TOKENS, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def expert(layer: MoELayer, index: int, x: Tensor) -> Tensor:
    e = layer.experts
    return (
        F.gelu(x @ e.fc1_weight[index] + e.fc1_bias[index], approximate="tanh") @ e.fc2_weight[index]
        + e.fc2_bias[index]
    )


def logits_of(layer: MoELayer, x: Tensor) -> Tensor:
    p = layer.predictor
    return F.silu(x.detach() @ p.fc1.weight.T + p.fc1.bias) @ p.fc2.weight.T + p.fc2.bias


def plain(
    layer: MoELayer, x: Tensor, span: int, k: int | None = None, rule: InferenceRule | None = None
) -> dict[str, Tensor]:
    """Algorithm 3 (training, k given) or 4 (inference, rule given), one token and one expert at a time."""
    tokens = x.reshape(-1, 8)
    p, logits = torch.softmax(tokens @ layer.router.weight.T, dim=-1), logits_of(layer, tokens)
    tau = layer.predictor.threshold_for(rule) if rule else None
    y, chosen, quantiles = torch.zeros_like(tokens), torch.zeros(len(tokens), 4, dtype=torch.bool), []
    for first in range(0, len(tokens), span * TOKENS):
        pool = range(first, first + span * TOKENS)
        for e in range(4):
            over = [i for i in pool if tau is not None and torch.sigmoid(logits[i, e]) > tau[e]]
            best = sorted(pool, key=lambda i, e=e: (-p[i, e].item(), i))
            match rule.selection if rule else "train":
                case "threshold":
                    taken = over
                case "count":
                    taken = best[: len(over)]
                case _:
                    taken = best[: k or 0]
            if k:
                quantiles.append(torch.sigmoid(logits[list(pool), e]).sort(descending=True).values[k - 1])
            for i in taken:
                chosen[i, e] = True
                y = y.index_add(0, torch.tensor([i]), (p[i, e] * expert(layer, e, tokens[i : i + 1])))
    loss = F.binary_cross_entropy(torch.sigmoid(logits), chosen.double())
    result = {"y": y.view_as(x), "chosen": chosen, "loss": loss}
    return result | ({"quantile": torch.stack(quantiles).view(-1, 4).mean(0)} if k else {})


def gradients(layer: MoELayer, x: Tensor, y: Tensor, loss: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return list(torch.autograd.grad((y * weight).sum() + loss, [x, *layer.parameters()]))


@pytest.mark.parametrize(
    ("span", "capacity"), [("all", 1.0), (8, 1.0), (2, 1.0), (1, 1.0), ("all", 0.7), (4, 1.9), (1, 4.0)]
)
def test_training_is_algorithm_three(span: Any, capacity: float) -> None:
    layer, x = make_layer(PoolConfig(span=span, capacity=capacity)), inputs().requires_grad_()
    samples = 8 if span == "all" else span
    expected = plain(layer, x, samples, k=int(samples * TOKENS * capacity / 4))
    y, report = layer(x)
    torch.testing.assert_close(y, expected["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(report.loss, expected["loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(report.quantile, expected["quantile"], rtol=0, atol=1e-12)
    assert report.processed.tolist() == expected["chosen"].sum(0).tolist()
    found, wanted = gradients(layer, x, y, report.loss), gradients(layer, x, expected["y"], expected["loss"])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.5, "dynamic", "raw", 1.1])
@pytest.mark.parametrize("selection", ["threshold", "count", "topk"])
def test_inference_is_algorithm_four(selection: Any, threshold: Any) -> None:
    layer, x = make_layer(PoolConfig()).eval(), inputs()
    layer.predictor.update(torch.tensor([0.3, 0.5, 0.6, 0.9]))
    layer.rule = InferenceRule(selection, threshold, capacity=1.0)
    expected = plain(layer, x, 8, rule=layer.rule, k=8 if selection == "topk" else None)
    y, report = layer(x)
    torch.testing.assert_close(y, expected["y"], rtol=0, atol=1e-12)
    assert report.processed.tolist() == expected["chosen"].sum(0).tolist()
    if threshold == 1.1 and selection != "topk":
        assert y.abs().max() == 0  # nobody is over it: only the residual is left


@pytest.mark.parametrize("span", [1, 2, "all"])
def test_topk_is_the_training_rule(span: Any) -> None:
    """In eval mode `topk` chooses what training chooses, pools included; a call of half a pool is refused by name."""
    layer, x = make_layer(PoolConfig(span=span)), inputs()
    trained = layer(x)[0]
    layer.eval().rule = InferenceRule("topk")
    torch.testing.assert_close(layer(x)[0], trained, rtol=0, atol=1e-12)
    if span == 2:
        with pytest.raises(ConfigError, match=r"12 tokens are no multiple of a pool's 8 \(pool.span\)"):
            layer(x[:3])


def test_threshold_does_not_depend_on_the_batch() -> None:
    layer, x = make_layer(PoolConfig()).eval(), inputs()
    layer.predictor.update(torch.tensor([0.3, 0.5, 0.6, 0.9]))
    torch.testing.assert_close(torch.cat([layer(x[:3])[0], layer(x[3:])[0]]), layer(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("selection", ["threshold", "count", "topk"])
def test_a_batch_of_nothing(selection: Any) -> None:
    layer = make_layer(PoolConfig()).eval()
    layer.rule = InferenceRule(selection)
    y, report = layer(inputs()[:0])
    assert y.shape == (0, TOKENS, 8)
    assert report.processed.tolist() == [0, 0, 0, 0]


def test_ties_go_to_the_earlier_token() -> None:
    layer = make_layer(PoolConfig(capacity=0.5))
    x = inputs(1).expand(8, -1, -1)  # every sample the same: each score stands eight times
    tokens = x.reshape(-1, 8)
    p = torch.softmax(tokens @ layer.router.weight.T, dim=-1)
    taken = torch.zeros(32, 4, dtype=torch.bool)
    for e in range(4):
        taken[sorted(range(32), key=lambda i, e=e: (-round(p[i, e].item(), 12), i))[:4], e] = True
    _, report = layer(x)
    y = torch.zeros_like(tokens)
    for e in range(4):
        y[taken[:, e]] += p[taken[:, e], e, None] * expert(layer, e, tokens[taken[:, e]])
    torch.testing.assert_close(layer(x)[0].reshape(-1, 8), y, rtol=0, atol=1e-12)
    assert report.processed.tolist() == [4] * 4


def test_too_small_a_capacity_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pool.capacity 0.01 .* floor\(32 \* 0.01 / 4\) = 0"):
        make_layer(PoolConfig(capacity=0.01))(inputs())


# -- dispatch and combine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dispatcher", [LocalDispatch(), AllToAllDispatch(Group())])
def test_identity_experts_give_the_gate_sum(density: float, dispatcher: Any) -> None:
    """Law 2: dispatch then combine is the sum of the gates, and each verb's backward is the other."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(10, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(10, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(10, 4, generator=generator) < density
    rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(Routing(chosen)))
    mixed = dispatcher.combine(rows, handle, weight)
    expected = tokens * (weight * chosen).sum(1, keepdim=True)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-13)
    assert list(handle.counts) == chosen.sum(0).tolist()
    for one, other in zip(
        torch.autograd.grad(mixed.square().sum(), [tokens, weight]),
        torch.autograd.grad(expected.square().sum(), [tokens, weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# -- law 1 on ranks ----------------------------------------------------------------------------------------------------


def on_ranks(rank: int, ep: int, span: Any, mode: str) -> dict[str, Any]:
    """This rank's part of the layer: outputs, gradients of its tokens, of the shared weights and of its experts, and
    what was chosen.
    """
    world, local = launched_world(), 8 // launched_world()
    samples = 8 if span == "all" else span
    mesh = init_mesh(ep, pool_ranks(samples, local), 1.0)
    layer = make_layer(PoolConfig(span=span))
    layer.predictor.update(torch.tensor([0.3, 0.5, 0.6, 0.9]))
    holder = DiT(dataclasses.replace(MODEL, num_blocks=1), PoolConfig(span=span))
    holder.blocks[0].ffn = layer
    widen_pools(shard_experts(holder, mesh), mesh)
    layer.train(mode == "train")
    layer.rule = InferenceRule("count" if mode == "train" else mode)  # type: ignore[arg-type]
    x = inputs()[rank * local : (rank + 1) * local].clone().requires_grad_()
    weight = torch.linspace(-1, 1, 8 * TOKENS * 8, dtype=torch.float64).view(8, TOKENS, 8)[
        rank * local : (rank + 1) * local
    ]
    y, report = layer(x)
    loss = report.loss if report.loss is not None else torch.zeros((), dtype=torch.float64)
    found = torch.autograd.grad((y * weight).sum() + loss / world, [x, *layer.parameters()], allow_unused=True)
    names = ["x", *[name for name, _ in layer.named_parameters()]]
    grads = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    return {
        "y": y.detach(),
        "processed": report.processed,
        "quantile": report.quantile,
        "grads": grads,
        "expert_rank": mesh.expert.rank,
        "loss": loss.detach(),
    }


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("span", ["all", 4, 1])
def test_ranks_do_what_one_rank_does(world: int, ep: int, span: Any) -> None:
    """Law 1: outputs and all gradients agree to 1e-12 in float64; the sets are the same."""
    layer, x = make_layer(PoolConfig(span=span)), inputs().requires_grad_()
    y, report = layer(x)
    single = dict(
        zip(["x", *[name for name, _ in layer.named_parameters()]], gradients(layer, x, y, report.loss), strict=True)
    )
    results = run(world, on_ranks, ep, span, "train")
    assert sum(result["processed"] for result in results).tolist() == report.processed.tolist()
    torch.testing.assert_close(torch.cat([result["y"] for result in results]), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sum(result["quantile"] for result in results) / world, report.quantile, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(sum(result["loss"] for result in results) / world, report.loss, rtol=0, atol=1e-12)
    for name, wanted in single.items():
        if name == "x":
            found = torch.cat([result["grads"]["x"] for result in results])
        elif name.startswith("experts."):
            found = torch.cat(
                [
                    sum(result["grads"][name] for result in results if result["expert_rank"] == part)
                    for part in range(ep)
                ]
            )
        else:
            found = sum(result["grads"][name] for result in results)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threshold", "count"])
def test_inference_on_ranks_is_a_pool_a_rank(mode: str) -> None:
    """At inference each rank's call is a pool of its own, whatever the expert parallelism."""
    layer, x = make_layer(PoolConfig()).eval(), inputs()
    layer.predictor.update(torch.tensor([0.3, 0.5, 0.6, 0.9]))
    layer.rule = InferenceRule(mode)  # type: ignore[arg-type]
    results = run(4, on_ranks, 4, "all", mode)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["y"], layer(x[2 * rank : 2 * rank + 2])[0], rtol=0, atol=1e-12)


def lopsided(rank: int, wanted_by: list[int]) -> Tensor:
    """Dispatch where all tokens go to the experts of some ranks, and some ranks have no tokens at all."""
    mesh = init_mesh(4, 1, 1.0)
    tokens = torch.arange(6.0, dtype=torch.float64).view(3, 2)[: 0 if rank == 1 else 3] + 100 * rank
    chosen = torch.zeros(len(tokens), 8, dtype=torch.bool)
    chosen[:, wanted_by] = True
    dispatcher = AllToAllDispatch(mesh.expert)
    weight = torch.full((len(tokens), 8), 0.5, dtype=torch.float64)
    rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(Routing(chosen)))
    return dispatcher.combine(rows * (1 + mesh.expert.rank), handle, weight) - 0.5 * tokens * sum(
        1 + expert // 2 for expert in wanted_by
    )


@pytest.mark.slow
@pytest.mark.parametrize("wanted_by", [[], [0], [7], [0, 1, 7], [2, 3, 4, 5]])
def test_peers_that_send_or_get_nothing(wanted_by: list[int]) -> None:
    for result in run(4, lopsided, wanted_by):
        assert result.abs().sum() == 0


def initial(rank: int, order: str) -> dict[str, Tensor]:
    """A rank's experts, initialised before or after they are sharded."""
    mesh = init_mesh(2, 1, 1.0)
    model = DiT(MODEL)
    model = (
        shard_experts(initialize(model, 7), mesh) if order == "before" else initialize(shard_experts(model, mesh), 7)
    )
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_layout() -> None:
    single = {name: parameter.detach() for name, parameter in initialize(DiT(MODEL), 7).named_parameters()}
    before, after = run(2, initial, "before"), run(2, initial, "after")
    for name, wanted in single.items():
        for results in (before, after):
            found = torch.cat([result[name] for result in results]) if ".experts." in name else results[1][name]
            assert torch.equal(found, wanted), name
