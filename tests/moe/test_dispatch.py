"""Rows there and back: against the dense sum, each verb as the other's backward, on ranks that send or get nothing, and
what it costs.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import ModelConfig, PoolConfig
from diffmoe_ep.moe import dispatch as dispatching
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.moe.dispatch import AllToAllDispatch, LocalDispatch, handle_of, overlapped
from diffmoe_ep.moe.experts import Experts
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.permute import permutation_of
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import init_mesh, launched_world
from ranks import run

N, D = 8, 6
CASES = [
    "ragged",
    "nobody",
    "everybody",
    "all to the first",
    "all to the last",
    "a rank sends nothing",
    "a rank has no tokens",
]
LAYOUTS = [(1, 1), (2, 2), (4, 2), (4, 4)]  # (W, EP)


def problem(case: str, rank: int, dtype: torch.dtype = torch.float64, hidden: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens (S, D), weights (S, N) and choices (S, N)."""
    generator = torch.Generator().manual_seed(10 + rank)
    size = 0 if case == "a rank has no tokens" and rank == 1 else 5 + rank
    tokens = torch.randn(size, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.rand(size, N, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    chosen = torch.rand(size, N, generator=generator) < 0.4
    match case:
        case "nobody":
            chosen = torch.zeros_like(chosen)
        case "everybody":
            chosen = torch.ones_like(chosen)
        case "all to the first":
            chosen = torch.arange(N).eq(0).expand(size, N)
        case "all to the last":
            chosen = torch.arange(N).ge(N - 2).expand(size, N)
        case "a rank sends nothing" if rank == 0:
            chosen = torch.zeros_like(chosen)
    return tokens.requires_grad_(), weight.requires_grad_(), chosen


def dispatcher_of(ep: int) -> tuple[LocalDispatch | AllToAllDispatch, int]:
    """The dispatcher of this rank, and its first expert."""
    mesh = init_mesh(ep, 1, 1.0)
    return (AllToAllDispatch(mesh.expert), mesh.expert.rank * N // ep) if ep > 1 else (LocalDispatch(), 0)


def against_the_dense_sum(rank: int, ep: int) -> None:
    """Experts that multiply by their number plus one: every case, outputs and gradients."""
    dispatcher, first = dispatcher_of(ep)
    for case in CASES:
        tokens, weight, chosen = problem(case, rank)
        rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(Routing(chosen)))
        assert len(handle.counts) == N // ep
        assert sum(handle.counts) == len(rows)
        scale = torch.arange(first + 1.0, first + len(handle.counts) + 1, dtype=torch.float64).repeat_interleave(
            torch.tensor(handle.counts)
        )
        mixed = dispatcher.combine(rows * scale[:, None], handle, weight)
        expected = tokens * (weight * chosen * torch.arange(1.0, N + 1)).sum(1, keepdim=True)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12, msg=lambda text, case=case: f"{case}: {text}")
        assert handle.processed.tolist() == chosen.sum(0).tolist()
        slope = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = torch.autograd.grad(mixed, [tokens, weight], slope)
        for one, other in zip(found, torch.autograd.grad(expected, [tokens, weight], slope), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_there_and_back_is_the_dense_sum(world: int, ep: int) -> None:
    run(world, against_the_dense_sum, ep)


def each_is_the_others_backward(rank: int, ep: int) -> None:
    dispatcher, _ = dispatcher_of(ep)
    for case in CASES:
        tokens, weight, chosen = problem(case, rank)
        ones = torch.ones_like(weight)
        rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(Routing(chosen)))
        slope = torch.randn(
            rows.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
        ).requires_grad_()
        back = dispatcher.combine(slope, handle, ones)
        assert torch.equal(torch.autograd.grad(rows, tokens, slope.detach())[0], back)
        assert torch.equal(torch.autograd.grad(back, slope, tokens.detach())[0], rows)


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_each_verb_is_the_others_backward(world: int, ep: int) -> None:
    run(world, each_is_the_others_backward, ep)


def in_bf16(rank: int, ep: int) -> None:
    """Rows are bf16, sums are taken in float32: one rounding of the answer, one of the gradient."""
    dispatcher, _ = dispatcher_of(ep)
    tokens, weight, chosen = problem("everybody", rank, torch.bfloat16)
    routing = dispatcher.prepare(Routing(chosen))
    rows, handle = dispatcher.dispatch(tokens, routing)
    mixed = dispatcher.combine(rows, handle, weight)
    assert (rows.dtype, mixed.dtype, weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = tokens.double() * (weight.double() * chosen).sum(1, keepdim=True)
    torch.testing.assert_close(mixed.double(), expected, rtol=2**-8, atol=1e-6)
    gradient = torch.autograd.grad(mixed, weight, torch.ones_like(mixed))[0]
    torch.testing.assert_close(gradient, tokens.float().sum(1, keepdim=True).expand(-1, N), rtol=1e-5, atol=1e-5)
    ones = torch.ones_like(rows)
    copies = torch.autograd.grad(dispatcher.dispatch(tokens, routing)[0], tokens, ones)[0]
    assert torch.equal(copies, torch.full_like(tokens, N))


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2)])
def test_bf16_rows_are_summed_in_float32(world: int, ep: int) -> None:
    run(world, in_bf16, ep)


def test_many_small_answers_are_not_lost_in_bf16() -> None:
    tokens = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatcher, chosen = LocalDispatch(), torch.ones(1, 1000, dtype=torch.bool)
    rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(Routing(chosen)))
    assert dispatcher.combine(rows, handle, torch.full((1, 1000), 1e-3)).item() == 1.0
    assert torch.autograd.grad(rows, tokens, torch.ones_like(rows))[0].item() == 1000


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_pairs_are_listed_as_they_travel(order: list[int] | None) -> None:
    chosen = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    permutation = permutation_of(chosen, 5, None if order is None else torch.tensor(order))
    listed = [(token, expert) for expert in order or range(3) for token in range(3) if chosen[token, expert]]
    assert [divmod(place, 3) for place in permutation.flat_index.tolist()] == listed
    assert permutation.token.tolist() == [token for token, _ in listed]
    assert [listed[pair] for pair in permutation.by_token.tolist()] == sorted(listed)
    assert permutation.offsets.tolist() == [0, 2, 2]


# -- in parts that overlap ---------------------------------------------------------------------------------------------


WIDE = 32  # whole cache lines, as real sizes are: matmuls of rows that start elsewhere in one may round otherwise


def experts_of(first: int, here: int, dtype: torch.dtype, kernel: Any) -> Experts:
    made = Experts(here, WIDE, kernel).to(dtype)
    for name, parameter in made.named_parameters():
        whole = torch.randn(
            N, *parameter.shape[1:], generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64
        )
        parameter.data = whole[first : first + here].to(dtype)
    return made


def in_parts(rank: int, ep: int) -> None:
    """Every number of chunks gives the same bits, forward and backward, twice in a row."""
    group = init_mesh(ep, 1, 1.0).expert
    for case, dtype, kernel in itertools.product(
        CASES, (torch.float32, torch.float64, torch.bfloat16), ("auto", "loop")
    ):
        tokens, weight, chosen = problem(case, rank, dtype, WIDE)
        experts = experts_of(group.rank * N // ep, N // ep, dtype, kernel)
        results = []
        for chunks in (1, 1, 2, 3, 4, 4, 99):
            dispatcher = AllToAllDispatch(group, chunks)
            routing = dispatcher.prepare(Routing(chosen))
            if chunks == 1:
                rows, handle = dispatcher.dispatch(tokens, routing)
                mixed = dispatcher.combine(experts(rows, handle.counts), handle, weight)
            else:
                handle = handle_of(routing)
                assert len(handle.chunks) == min(chunks, N // ep)
                mixed = overlapped(experts, tokens, handle, weight)
            slope = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            results.append(
                [mixed.detach(), *torch.autograd.grad(mixed, [tokens, weight, *experts.parameters()], slope)]
            )
        for result in results[1:]:
            same = [torch.equal(one, other) for one, other in zip(result, results[0], strict=True)]
            assert all(same), f"{case}, {dtype}, {kernel}: {same}"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_parts_give_the_same_bits(world: int, ep: int) -> None:
    run(world, in_parts, ep)


def in_flight_at_once(rank: int) -> list[str]:
    """The order in which exchanges start and land, with two chunks, forward and backward."""
    group, told = init_mesh(2, 1, 1.0).expert, []
    exchange = dispatching.start_all_to_all.__globals__["_Exchange"]
    start, wait = exchange.start, exchange.wait
    exchange.start = lambda self, *args: (told.append("start"), start(self, *args))[1]
    exchange.wait = lambda self: (told.append("land"), wait(self))[1]
    try:
        tokens, weight, chosen = problem("ragged", rank, hidden=WIDE)
        experts = experts_of(group.rank * N // 2, N // 2, torch.float64, "loop")
        compute = experts.forward
        experts.forward = lambda rows, counts: (told.append("compute"), compute(rows, counts))[1]  # type: ignore[method-assign]
        mixed = overlapped(experts, tokens, handle_of(AllToAllDispatch(group, 2).prepare(Routing(chosen))), weight)
        told.append("backward")
        mixed.sum().backward()
    finally:
        exchange.start, exchange.wait = start, wait
    return told


@pytest.mark.slow
def test_parts_travel_while_others_compute() -> None:
    forward = ["start", "start", "land", "compute", "start", "land", "compute", "start", "land", "land"]
    backward = [
        "start",
        "start",
        "land",
        "start",
        "land",
        "start",
        "land",
        "land",
    ]  # experts compute between a land and the next start
    assert run(2, in_flight_at_once) == [[*forward, "backward", *backward]] * 2


# -- what it costs -----------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    input_size=8,
    in_channels=1,
    out_channels=1,
    hidden_size=64,
    num_heads=2,
    num_blocks=1,
    num_classes=3,
    num_experts=8,
    interleave=False,
)


COSTS = [
    ("diffmoe", True, 1),
    ("tc", True, 1),
    ("diffmoe", False, 1),
    ("ec", True, 0),
]  # family, training, host waits of a forward


def costs(rank: int, ep: int) -> None:
    """What one layer's forward receives over the expert group is hardly more than the rows that must move, there and
    back.
    """
    mesh = init_mesh(ep, launched_world(), 1.0)
    for (family, training, syncs), chunks in itertools.product(COSTS, (1, 2)):
        layer = MoELayer(dataclasses.replace(MODEL, family=family), PoolConfig())  # type: ignore[arg-type]
        layer.experts = Experts(8 // ep, 64)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        if family != "ec":
            layer.pools = Pools(None, mesh.pool)
        layer.train(training).rule = InferenceRule("threshold", 0.5)
        layer.dispatcher = AllToAllDispatch(mesh.expert, chunks)
        saved: list[Routing] = []
        traffic, row = mesh.expert.traffic, 64 * 4
        traffic.reset()
        with layer.reuse_routing(saved):
            layer(torch.randn(16, 16, 64, generator=torch.Generator().manual_seed(rank)))
        handle = handle_of(saved[0])
        elsewhere = torch.ones(8, dtype=torch.bool).view(ep, -1)
        elsewhere[mesh.expert.rank] = False
        home = int(handle.chosen.sum(0)[elsewhere.flatten()].sum()) * row
        here = (
            sum(
                count
                for chunk in handle.chunks
                for sender, count in enumerate(chunk.receive)
                if sender != mesh.expert.rank
            )
            * row
        )
        assert home + here <= traffic.received <= 1.02 * (home + here), (family, training, chunks)
        assert traffic.syncs == syncs
        assert traffic.rounds == syncs + 2 * min(chunks, 8 // ep)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_bytes_are_those_of_the_chosen_rows(world: int, ep: int) -> None:
    """At most 1.02 of the rows that live elsewhere, there and back; one small exchange of splits, or none; one host
    wait, or none.
    """
    run(world, costs, ep)


@pytest.mark.parametrize(
    ("family", "training", "syncs"), [("diffmoe", True, 0), ("ec", True, 0), ("tc", True, 1), ("diffmoe", False, 1)]
)
def test_one_rank_need_not_wait_in_training(family: Any, training: bool, syncs: int) -> None:
    layer = MoELayer(dataclasses.replace(MODEL, family=family), PoolConfig()).train(training)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    layer(torch.randn(4, 16, 64))
    assert isinstance(layer.dispatcher, LocalDispatch)
    assert layer.dispatcher.group.traffic.syncs == syncs


def known_before_asking(rank: int) -> None:
    """Where the pool is the expert group, or lies inside it, the rows of an expert are known; the splits still have to
    come.
    """
    group = init_mesh(4, 1, 1.0).expert
    for pool in (2, 4):
        dispatcher = AllToAllDispatch(group)
        chosen = torch.zeros(6, N, dtype=torch.bool)
        chosen[: 2 * (rank % pool)] = True  # 0, 2, ... rows of each rank: ragged splits, but one sum
        routing = dispatcher.prepare(Routing(chosen, tokens_per_expert=pool * (pool - 1), ranks=pool))
        before = group.traffic.syncs
        assert list(handle_of(routing).counts) == [4 // pool * pool * (pool - 1)] * 2
        assert group.traffic.syncs == before
        rows, handle = dispatcher.dispatch(torch.ones(6, D), routing)
        assert len(rows) == sum(handle.counts)
        assert group.traffic.syncs == before + 1
    wide = AllToAllDispatch(Group(2, rank % 2, group.handle))
    assert wide.group.size % 4  # a pool wider than the expert group says nothing of one group's rows


@pytest.mark.slow
def test_an_owners_rows_are_known_where_the_pool_is_the_group() -> None:
    run(4, known_before_asking)
