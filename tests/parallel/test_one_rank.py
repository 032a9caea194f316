"""All that goes over ranks, over a group of one rank whose short cut is not taken: so one GPU shows what NCCL does with
our splits, types and streams, rows that nobody has included. Gloo shows that these tests can hold.
"""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from diffmoe_ep.moe.dispatch import AllToAllDispatch, LocalDispatch, overlapped
from diffmoe_ep.moe.experts import Experts
from diffmoe_ep.moe.pool import Pools, topk_per_expert
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.moe.topk.cost import Algorithm
from diffmoe_ep.parallel.async_all_to_all import RowCounts, start_all_to_all
from diffmoe_ep.parallel.collectives import Group, all_gather, all_sum, all_to_all, all_to_all_even
from diffmoe_ep.parallel.mesh import init_mesh
from ranks import run, take_down

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class NotAlone(int):
    """A one that says it is more, and computes as one."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: int) -> bool:
        return True


def group(device: str) -> tuple[Group, torch.device]:
    mesh = init_mesh(1, 1, 1.0, device)
    return Group(NotAlone(1), 0, mesh.world.handle), mesh.device


def on(device: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a function finds on one rank of a device."""
    if device == "cpu":
        return run(1, function, device, *given)[0]
    try:
        return function(0, device, *given)
    finally:
        take_down()


def collected(rank: int, device: str, rows: int) -> list[bool]:
    one, where = group(device)
    x = torch.arange(rows * 4.0, device=where).view(rows, 4).to(torch.bfloat16).requires_grad_()
    gradient, equal = torch.full_like(x, 3.0), []
    for there in (all_to_all(x, [rows], [rows], one), start_all_to_all(x, [rows], [rows], one).wait()):
        equal += [torch.equal(there, x), torch.equal(torch.autograd.grad(there, x, gradient)[0], gradient)]
    equal += [torch.equal(other(x, one), x) for other in (all_gather, all_sum, all_to_all_even)]
    assert one.traffic.rounds == 7  # nothing took a short cut
    return equal


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [5, 0])
def test_collectives_bring_what_was_sent(device: str, rows: int) -> None:
    assert on(device, collected, rows) == [True] * 7


def counted(rank: int, device: str) -> list[Any]:
    one, where = group(device)
    sent = torch.tensor([3, 0, 5, 1], device=where)
    many = [RowCounts(sent + number, one) for number in range(3)]  # several in flight
    return [[counts.sent, counts.arriving] for counts in many]


@pytest.mark.parametrize("device", DEVICES)
def test_counts_arrive_in_turn(device: str) -> None:
    expected = [[3, 0, 5, 1], [4, 1, 6, 2], [5, 2, 7, 3]]
    assert on(device, counted) == [[counts, [counts]] for counts in expected]


def chosen(rank: int, device: str, algorithm: Algorithm) -> list[bool]:
    one, where = group(device)
    scores = torch.randint(0, 9, (512, 8), generator=torch.Generator().manual_seed(0)).float().to(where) / 9
    equal = []
    for k in (1, 64, 512):
        alone = topk_per_expert(scores, k, Pools(), extra=scores)
        found = topk_per_expert(scores, k, Pools(None, one, algorithm), extra=scores)
        assert found.kth_value is not None and alone.kth_value is not None
        equal += [torch.equal(found.chosen, alone.chosen), torch.equal(found.kth_value, alone.kth_value)]
    assert one.traffic.rounds >= 3
    return equal


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_searches_over_ranks_choose_what_one_chooses(device: str, algorithm: Algorithm) -> None:
    assert all(on(device, chosen, algorithm))


class Parts(nn.Module):
    """Exchange in parts, some in flight while others compute."""

    def __init__(self, dispatcher: AllToAllDispatch, experts: Experts) -> None:
        super().__init__()
        self.dispatcher, self.experts = dispatcher, experts

    def forward(self, tokens: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        _, handle = self.dispatcher.dispatch(tokens, self.dispatcher.prepare(routing))
        return overlapped(self.experts, tokens, handle, weight)


def mixed(rank: int, device: str, density: float) -> list[float]:
    """How far the mixture over ranks and its gradients are from the local ones, in one part and in two in flight."""
    one, where = group(device)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(4, 8, "loop").to(where)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(where)
    tokens = torch.randn(24, 8, generator=generator).to(where).requires_grad_()
    weight = torch.rand(24, 4, generator=generator).to(where).requires_grad_()
    routing = Routing((torch.rand(24, 4, generator=generator) < density).to(where))
    leaves, results = [tokens, weight, *experts.parameters()], []
    for dispatcher in (LocalDispatch(), AllToAllDispatch(one), AllToAllDispatch(one, 2)):
        rows, handle = dispatcher.dispatch(tokens, dispatcher.prepare(routing))
        out = dispatcher.combine(experts(rows, handle.counts), handle, weight)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)])
    out = Parts(AllToAllDispatch(one, 2), experts)(tokens, weight, routing)
    results.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)])
    return [
        float((found - wanted).abs().max())
        for result in results[1:]
        for found, wanted in zip(result, results[0], strict=True)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("density", [0.5, 0.0])
def test_rows_that_travel_are_the_local_ones(device: str, density: float) -> None:
    assert max(on(device, mixed, density)) < 1e-5
