"""Token choice, expert choice, shared and fine-grained experts: against the algorithms written plainly in float64,
alone and on ranks.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig, from_tree
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import shard_experts, widen_pools
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import balance_loss, choices_per_pool, route_by_token
from diffmoe_ep.parallel.mesh import init_mesh, launched_world, pool_ranks
from ranks import run

TOKENS = 4
SMALL = ModelConfig(
    input_size=4,
    in_channels=1,
    out_channels=1,
    hidden_size=8,
    num_heads=2,
    num_blocks=1,
    num_classes=3,
    num_experts=4,
    interleave=False,
)
FAMILIES = {
    "tc": dataclasses.replace(SMALL, family="tc"),
    "tc, two experts": dataclasses.replace(SMALL, family="tc", top_k=2),
    "ec": dataclasses.replace(SMALL, family="ec"),
    "ec with predictor": dataclasses.replace(SMALL, family="ec", predictor=True),
    "fine-grained": dataclasses.replace(SMALL, num_experts=8, granularity=2),
    "shared": dataclasses.replace(SMALL, shared_experts=2, granularity=2, num_experts=8),
    "no predictor": dataclasses.replace(SMALL, predictor=False),
}


def make(model: ModelConfig, span: Any = "all") -> MoELayer:
    layer = MoELayer(model, PoolConfig(span=span)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return layer


def inputs(samples: int = 8) -> Tensor:
    return torch.randn(samples, TOKENS, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2


def plain(layer: MoELayer, model: ModelConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """One token and one expert at a time: the mixture and who chose whom."""
    tokens, e = x.reshape(-1, 8), layer.experts
    p = torch.softmax(tokens @ layer.router.weight.T, dim=-1)
    chosen = torch.zeros(p.shape, dtype=torch.bool)
    if model.family == "tc":
        for i in range(len(tokens)):
            chosen[i, sorted(range(model.num_experts), key=lambda n, i=i: (-p[i, n].item(), n))[: model.top_k]] = True
    else:
        span = TOKENS if model.family == "ec" else len(tokens)
        k = span * model.granularity // model.num_experts
        for first in range(0, len(tokens), span):
            for n in range(model.num_experts):
                chosen[sorted(range(first, first + span), key=lambda i, n=n: (-p[i, n].item(), i))[:k], n] = True
    y = torch.zeros_like(tokens)
    for i, n in chosen.nonzero().tolist():
        y = y.index_add(
            0,
            torch.tensor([i]),
            p[i, n] * ffn(tokens[i : i + 1], e.fc1_weight[n], e.fc1_bias[n], e.fc2_weight[n], e.fc2_bias[n]),
        )
    if layer.shared is not None:
        s = layer.shared
        y = y + ffn(tokens, s.fc1.weight.T, s.fc1.bias, s.fc2.weight.T, s.fc2.bias)
    return y.view_as(x), chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_its_algorithm(family: str) -> None:
    model = FAMILIES[family]
    layer, x = make(model), inputs().requires_grad_()
    y, report = layer(x)
    expected, chosen = plain(layer, model, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(report.processed.double(), chosen.sum(0).double() / model.granularity)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    parameters = [parameter for name, parameter in layer.named_parameters() if "predictor" not in name]
    found = torch.autograd.grad((y * weight).sum(), [x, *parameters])
    for one, other in zip(found, torch.autograd.grad((expected * weight).sum(), [x, *parameters]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_activated_compute_is_that_of_a_dense_layer(family: str) -> None:
    """Rows, in experts as wide as a dense FFN, add up to C times the tokens; the shared experts come on top."""
    _, report = make(FAMILIES[family])(inputs())
    assert report.processed.sum().item() == pytest.approx(32 * (2 if family == "tc, two experts" else 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_without_a_rule_of_ones_own(family: str) -> None:
    """`auto` is the threshold where there is a predictor, else the training rule."""
    model = FAMILIES[family]
    layer = make(model)
    trained = layer(inputs())[0]
    layer.eval()
    assert layer(inputs()[:0])[0].shape == (0, TOKENS, 8)
    if layer.predictor is None:
        torch.testing.assert_close(layer(inputs())[0], trained, rtol=0, atol=1e-12)
        layer.rule = InferenceRule("count")
        if model.family != "tc":
            with pytest.raises(ConfigError, match="selection count needs a capacity predictor"):
                layer(inputs())
    else:
        layer.rule = InferenceRule("threshold", 0.5)
        by_threshold = layer(inputs())[0]
        layer.rule = InferenceRule("auto", 0.5)
        assert torch.equal(layer(inputs())[0], by_threshold)


def test_equal_scores_go_to_the_first_expert() -> None:
    assert route_by_token(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]), 1).chosen.tolist() == [
        [True, False, False, False], [False, True, False, False],
    ]  # fmt: skip


@pytest.mark.parametrize("pool", [None, 4, 16])
def test_balance_loss(pool: int | None) -> None:
    scores = torch.softmax(
        torch.randn(32, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1
    ).requires_grad_()
    chosen = route_by_token(scores, 2).chosen
    size, expected = pool or 32, torch.zeros((), dtype=torch.float64)
    for first in range(0, 32, size):
        for e in range(4):
            f = chosen[first : first + size, e].sum() / (size * 2)
            expected = expected + 4 * f * scores[first : first + size, e].mean() / (32 // size)
    found = balance_loss(scores, choices_per_pool(chosen, Pools(pool)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores)[0], torch.autograd.grad(expected, scores)[0])
    uniform = torch.full((8, 4), 0.25)
    perfect = choices_per_pool(torch.eye(4, dtype=torch.bool).repeat(2, 1), Pools())
    assert balance_loss(uniform, perfect).item() == pytest.approx(1.0)


def on_ranks(rank: int, family: str, ep: int, span: Any) -> dict[str, Any]:
    model, world = FAMILIES[family], launched_world()
    local = 8 // world
    samples = {"all": 8}.get(span, span) if model.family != "ec" else 1
    mesh = init_mesh(ep, pool_ranks(samples, local), 1.0)
    layer = make(model, span)
    holder = DiT(model, PoolConfig(span=span))
    holder.blocks[0].ffn = layer  # type: ignore[union-attr]
    widen_pools(shard_experts(holder, mesh), mesh)
    x = inputs()[rank * local : (rank + 1) * local].clone().requires_grad_()
    weight = torch.linspace(-1, 1, 8 * TOKENS * 8, dtype=torch.float64).view(8, TOKENS, 8)[
        rank * local : (rank + 1) * local
    ]
    y, report = layer(x)
    loss = (y * weight).sum() + (report.balance / world if report.balance is not None else 0.0)
    found = torch.autograd.grad(loss, [x, layer.router.weight, layer.experts.fc1_weight])
    return {"y": y.detach(), "grads": found, "balance": report.balance, "expert_rank": mesh.expert.rank}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "world", "ep", "span"), [
    ("tc", 2, 2, "all"), ("tc, two experts", 4, 2, 4), ("ec", 2, 2, "all"), ("shared", 4, 4, "all"),
    ("fine-grained", 2, 2, 4),
])  # fmt: skip
def test_ranks_do_what_one_rank_does(family: str, world: int, ep: int, span: Any) -> None:
    """Law 1 for every family: outputs, balance loss and gradients to 1e-12."""
    layer, x = make(FAMILIES[family], span), inputs().requires_grad_()
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    y, report = layer(x)
    loss = (y * weight).sum() + (report.balance if report.balance is not None else 0.0)
    of_x, of_router, of_experts = torch.autograd.grad(loss, [x, layer.router.weight, layer.experts.fc1_weight])
    results = run(world, on_ranks, family, ep, span)
    torch.testing.assert_close(torch.cat([result["y"] for result in results]), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([result["grads"][0] for result in results]), of_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(result["grads"][1] for result in results), of_router, rtol=0, atol=1e-12)
    parts = [sum(result["grads"][2] for result in results if result["expert_rank"] == part) for part in range(ep)]
    torch.testing.assert_close(torch.cat(parts), of_experts, rtol=0, atol=1e-12)
    if report.balance is not None:
        torch.testing.assert_close(
            sum(result["balance"] for result in results) / world, report.balance, rtol=0, atol=1e-12
        )


def test_the_balance_loss_joins_the_auxiliary() -> None:
    model = dataclasses.replace(FAMILIES["tc"], balance_weight=0.5)
    made = DiT(model).double()
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    output = made(
        torch.randn(8, 1, 4, 4, dtype=torch.float64),
        torch.rand(8, dtype=torch.float64),
        torch.zeros(8, dtype=torch.int64),
    )
    assert output.layers[0].balance is not None
    assert output.auxiliary.item() == pytest.approx(0.5 * output.layers[0].balance.item())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.size=L", "model.hidden_size=5"], "model.size L means hidden_size 1024, num_blocks 24, num_heads 16"),
        (["model.granularity=3"], "model.granularity 3 must divide"),
        (["model.family=tc", "model.top_k=17"], "model.top_k 17 is more than model.num_experts 16"),
        (["model.family=tc", "model.predictor=true"], "tokens choose and nothing is to predict"),
        (["model.family=ec", "pool.span=2"], "a pool is one sample; set pool.span=1"),
        (
            ["model.family=ec", "sample.selection=count"],
            "needs a capacity predictor, .* or train with model.predictor=true",
        ),
        (["model.family=tc", "sample.selection=threshold"], "needs a capacity predictor"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree({}, overrides)


def test_a_size_is_its_three_numbers() -> None:
    config = from_tree({}, ["model.size=XL"])
    assert (config.model.hidden_size, config.model.num_blocks, config.model.num_heads) == (1152, 28, 16)
