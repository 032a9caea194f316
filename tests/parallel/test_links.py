"""Every pair of ranks is tried once; the pair that is broken is accused, and no other."""

import time
from itertools import combinations
from unittest import mock

import pytest
import torch

from diffmoe_ep.parallel import links
from diffmoe_ep.parallel.collectives import all_sum
from diffmoe_ep.parallel.links import Tried, accused, host_groups, ranks_of, rounds_of, try_pairs
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from ranks import run


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8])
def test_rounds_hold_each_pair_once_and_each_rank_at_most_once(world: int) -> None:
    rounds = rounds_of(world)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(world), 2))
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))


def exchange(rank: int, broken: tuple[int, int] | None) -> Tried:
    mesh, original = init_mesh(1, 1, 1.0), links._exchange

    def deaf(partner: int, mesh: Mesh, deadline: float) -> str | None:
        if broken is not None and rank == broken[0] and partner == broken[1]:
            time.sleep(max(0.0, deadline - time.monotonic()))  # it neither sends nor receives
            return "no answer in time"
        return original(partner, mesh, deadline)

    with mock.patch.object(links, "_exchange", deaf):
        return try_pairs(mesh, 4.0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_all_reach_all(world: int) -> None:
    tried = run(world, exchange, None)
    assert accused(tried) == {}
    assert {one.rounds for one in tried} == {len(rounds_of(world))}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "broken"), [(2, (0, 1)), (4, (1, 2)), (4, (3, 0))])
def test_a_broken_pair_is_accused_and_no_other(world: int, broken: tuple[int, int]) -> None:
    tried = run(world, exchange, broken)
    assert accused(tried) == {(min(broken), max(broken)): "no answer in time"}
    assert tried[broken[1]].failed == {broken[0]: "no answer in time"}  # also by the one who did its part


def test_who_had_stopped_is_no_witness() -> None:
    (low, high), *_ = rounds_of(4)[2]
    tried = [Tried({}, 3)] * 4
    tried[low] = Tried({high: "no answer in time"}, 3)
    assert accused(tried) == {(low, high): "no answer in time"}
    tried[high] = Tried({}, 2)  # it had left before the third round
    assert accused(tried) == {}


def grouped(rank: int, hosts: list[str]) -> tuple[tuple[int, ...], tuple[int, ...], float, int]:
    mesh = init_mesh(1, 1, 1.0)
    inside, across = host_groups(mesh, hosts, 1.0)
    total = all_sum(torch.tensor(float(rank)), inside).item()
    return ranks_of(inside, mesh), ranks_of(across, mesh), total, across.nodes


@pytest.mark.slow
def test_ranks_of_a_host_and_across_hosts() -> None:
    assert run(4, grouped, ["a", "a", "b", "b"]) == [
        ((0, 1), (0, 2), 1.0, 2), ((0, 1), (1, 3), 1.0, 2), ((2, 3), (0, 2), 5.0, 2), ((2, 3), (1, 3), 5.0, 2)
    ]  # fmt: skip
    assert run(4, grouped, ["a", "b", "b", "b"]) == [
        ((0,), (0, 1), 0.0, 2), ((1, 2, 3), (0, 1), 6.0, 2), ((1, 2, 3), (2,), 6.0, 1), ((1, 2, 3), (3,), 6.0, 1)
    ]  # fmt: skip
