"""Exact top-k per expert: against a sort written in a few lines, ties included, over pools of every span."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ep.moe.pool import Pools, topk_per_expert
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import init_mesh, launched_world
from ranks import run


def reference(scores: np.ndarray, k: list[int], pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort each expert's column of each pool by (score descending, token ascending); take the first k."""
    tokens, experts = scores.shape
    chosen, kth = np.zeros((tokens, experts), bool), np.full((tokens // pool, experts), np.inf)
    for number, first in enumerate(range(0, tokens, pool)):
        for expert in range(experts):
            order = sorted(range(first, first + pool), key=lambda token: (-scores[token, expert], token))[: k[expert]]
            chosen[order, expert] = True
            if k[expert]:
                kth[number, expert] = scores[order[-1], expert]
    return chosen, kth


def tied_scores(tokens: int, experts: int, levels: int, seed: int) -> np.ndarray:
    """Scores of few different values, so that many tie."""
    return np.random.default_rng(seed).integers(0, levels, (tokens, experts)).astype(np.float32) / 7


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.data())
def test_selection_is_the_sort(
    pools: int, pool: int, experts: int, levels: int, seed: int, data: st.DataObject
) -> None:
    scores = tied_scores(pools * pool, experts, levels, seed)
    k = data.draw(st.lists(st.integers(0, pool), min_size=experts, max_size=experts))
    chosen, kth = reference(scores, k, pool)
    selection = topk_per_expert(torch.from_numpy(scores), torch.tensor(k), Pools(pool), extra=torch.from_numpy(scores))
    assert np.array_equal(selection.chosen.numpy(), chosen)
    assert np.array_equal(selection.kth_value.numpy(), kth)
    if len(set(k)) == 1:  # one number for all takes another path
        same = topk_per_expert(torch.from_numpy(scores), k[0], Pools(pool), extra=torch.from_numpy(scores))
        assert np.array_equal(same.chosen.numpy(), chosen)
        assert np.array_equal(same.kth_value.numpy(), kth)


def test_earlier_tokens_win_ties() -> None:
    scores = torch.tensor([[1.0], [2.0], [1.0], [1.0], [0.0]])
    assert topk_per_expert(scores, 3, Pools()).chosen[:, 0].tolist() == [True, True, True, False, False]


def test_worked_identity() -> None:
    chosen = topk_per_expert(torch.rand(100, 16), 6, Pools()).chosen
    assert chosen.sum().item() == 96
    assert chosen.sum(0).tolist() == [6] * 16


def on_ranks(rank: int, scores: np.ndarray, also: np.ndarray, k: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Select with this rank's consecutive part of the tokens."""
    local = len(scores) // launched_world()
    mesh = init_mesh(1, max(1, pool // local), 1.0)
    mine = slice(rank * local, (rank + 1) * local)
    group = mesh.pool if pool > local else Group()
    selection = topk_per_expert(
        torch.from_numpy(scores[mine]), k, Pools(pool, group), extra=torch.from_numpy(also[mine])
    )
    return selection.chosen.numpy(), selection.kth_value.numpy()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("pool", [4, 16, 32, 64])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_ranks_choose_what_one_rank_chooses(world: int, pool: int, levels: int) -> None:
    """Law 1: sets and k-th values are bit-equal, for pools inside a rank, over neighbouring ranks and over all."""
    scores, also, k = tied_scores(64, 5, levels, 1), tied_scores(64, 5, levels, 2), max(1, pool // 5)
    results = run(world, on_ranks, scores, also, k, pool)
    chosen, _ = reference(scores, [k] * 5, pool)
    _, kth = reference(also, [k] * 5, pool)
    assert np.array_equal(np.concatenate([result[0] for result in results]), chosen)
    local = 64 // world
    for rank, (_, found) in enumerate(results):
        first = rank * local // pool
        assert np.array_equal(found, kth[first : first + max(1, local // pool)])
