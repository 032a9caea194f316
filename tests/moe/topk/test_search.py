"""Law 1 of the selection: gather, owner and radix give the bits that a stable sort of the joined scores gives, on any
ranks and spans.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffmoe_ep.moe.pool import Pools, topk_per_expert
from diffmoe_ep.parallel.collectives import ALONE, Traffic
from diffmoe_ep.parallel.mesh import init_mesh, launched_world
from ranks import run

ALGORITHMS = ("gather", "owner", "radix")
SPECIAL = np.array([0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, -3e38])


@dataclass(frozen=True)
class Case:
    """One selection over the joined tokens."""

    scores: np.ndarray  # (tokens, N)
    also: np.ndarray | None  # (tokens, M)
    k: int | list[int]
    pool: int  # tokens


def stable_sort(values: np.ndarray, k: list[int], pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Chosen (tokens, columns) and k-th values (pools, columns) by numpy's stable sort of each column of each pool."""
    values = np.where(np.isnan(values), -np.inf, values) + 0.0
    chosen, kth = np.zeros(values.shape, bool), np.full((len(values) // pool, values.shape[1]), np.inf, values.dtype)
    for number, first in enumerate(range(0, len(values), pool)):
        for column, taken in enumerate(k):
            order = first + np.argsort(-values[first : first + pool, column], kind="stable")[:taken]
            chosen[order, column] = True
            if taken:
                kth[number, column] = values[order[-1], column]
    return chosen, kth


def drawn(kind: str, shape: tuple[int, int], dtype: type, generator: np.random.Generator) -> np.ndarray:
    """Scores of few values, all equal, all over the numbers' range, from the ends of it, or a softmax's."""
    if kind == "few":
        return (generator.integers(-2, 3, shape) / 7).astype(dtype)
    if kind == "equal":
        return np.full(shape, -0.25, dtype)
    if kind == "wide":
        return (generator.standard_normal(shape) * 10.0 ** generator.integers(-30, 30, shape)).astype(dtype)
    if kind == "special":
        return generator.choice(SPECIAL, shape).astype(dtype)
    close = (
        0.0625 + generator.integers(0, 40, shape) * np.finfo(dtype).eps / 16
    )  # neighbours: they differ in the last byte alone
    return close.astype(dtype)


def cases(tokens: int, pool: int) -> list[Case]:
    """Of every kind, type and way to give k; 5 and 3 columns, which do not divide over ranks, and 1, which most ranks
    do not own.
    """
    found = []
    generator = np.random.default_rng(tokens + pool)
    for kind in ("few", "equal", "wide", "special", "close"):
        for dtype in (np.float32, np.float64):
            for experts, others, k in (
                (5, 3, int(generator.integers(1, pool))),
                (5, 5, [0, pool, *generator.integers(0, pool + 1, 3).tolist()]),
                (4, 0, [int(number) for number in generator.integers(0, pool + 1, 4)]),
                (1, 0, pool // 2),
                (2, 2, 0),
                (3, 0, pool),
            ):
                also = drawn(kind, (tokens, others), dtype, generator) if others else None
                found.append(Case(drawn(kind, (tokens, experts), dtype, generator), also, k, pool))
    return found


def on_ranks(
    rank: int, given: list[Case], algorithms: tuple[str, ...]
) -> list[list[tuple[np.ndarray, np.ndarray | None]]]:
    """This rank's part of every case by every algorithm."""
    world, found = launched_world(), []
    pool, local = given[0].pool, len(given[0].scores) // world
    mesh = init_mesh(1, max(1, pool // local), 1.0)
    mine, group = slice(rank * local, (rank + 1) * local), mesh.pool if pool > local else ALONE
    for case in given:
        k = torch.tensor(case.k) if isinstance(case.k, list) else case.k
        scores, also = (
            torch.from_numpy(case.scores[mine]),
            None if case.also is None else torch.from_numpy(case.also[mine]),
        )
        selections = [topk_per_expert(scores, k, Pools(pool, group, algorithm), also) for algorithm in algorithms]
        found.append(
            [(one.chosen.numpy(), None if one.kth_value is None else one.kth_value.numpy()) for one in selections]
        )
    return found


@pytest.mark.parametrize(
    ("world", "pool"), [(1, 24), (1, 8), (2, 24), (2, 12), (2, 6), (4, 24), (4, 12), (4, 6), (4, 3)]
)
def test_every_algorithm_is_the_stable_sort(world: int, pool: int) -> None:
    """Pools inside a rank, over two of four ranks and over all of them; sets, k-th values and their signs to the
    bit.
    """
    given = cases(24, pool)
    results = run(world, on_ranks, given, ALGORITHMS)
    local = 24 // world
    for number, case in enumerate(given):
        each = [case.k] * case.scores.shape[1] if isinstance(case.k, int) else case.k
        chosen, _ = stable_sort(case.scores, each, pool)
        for place, algorithm in enumerate(ALGORITHMS):
            found = np.concatenate([results[rank][number][place][0] for rank in range(world)])
            assert np.array_equal(found, chosen), (algorithm, case)
            if case.also is None:
                continue
            _, kth = stable_sort(case.also, (each * case.also.shape[1])[: case.also.shape[1]], pool)
            for rank in range(world):
                first = rank * local // pool
                told = results[rank][number][place][1]
                assert told.dtype == case.also.dtype
                assert told.tobytes() == np.ascontiguousarray(kth[first : first + max(1, local // pool)]).tobytes(), (
                    algorithm,
                    case,
                )


def random_case(seed: int, tokens: int) -> Case:
    """Everything about a case from one seed."""
    generator = np.random.default_rng(seed)
    dtype, kind = generator.choice([np.float32, np.float64]), str(generator.choice(["few", "wide", "special", "close"]))
    experts, shape = int(generator.integers(1, 8)), (tokens, 1)
    k = (
        generator.integers(0, tokens + 1, experts).tolist()
        if generator.random() < 0.5
        else int(generator.integers(0, tokens + 1))
    )
    others = experts if isinstance(k, list) else int(generator.integers(1, 4))
    columns = np.concatenate([drawn(kind, shape, dtype, generator) for _ in range(experts + others)], axis=1)
    return Case(columns[:, :experts], columns[:, experts:], k, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_drawn_cases(world: int) -> None:
    """Sixty cases from seeds over all ranks, with several hundred tokens, so that radix fills its bins."""
    given = [random_case(seed, 320) for seed in range(60)]
    results = run(world, on_ranks, given, ALGORITHMS)
    for number, case in enumerate(given):
        each = [case.k] * case.scores.shape[1] if isinstance(case.k, int) else case.k
        chosen, _ = stable_sort(case.scores, each, 320)
        _, kth = stable_sort(case.also, (each * 4)[: case.also.shape[1]], 320)
        for place, algorithm in enumerate(ALGORITHMS):
            found = np.concatenate([results[rank][number][place][0] for rank in range(world)])
            assert np.array_equal(found, chosen), (number, algorithm)
            assert all(results[rank][number][place][1].tobytes() == kth.tobytes() for rank in range(world)), (
                number,
                algorithm,
            )


def test_scores_are_not_changed_and_need_no_gradient() -> None:
    scores = torch.tensor([[0.5], [float("nan")], [-0.0]], requires_grad=True)
    before = scores.detach().clone()
    selection = topk_per_expert(scores, 2, Pools(), extra=scores)
    assert torch.equal(scores.detach().view(torch.int32), before.view(torch.int32))
    assert not selection.chosen.requires_grad
    assert selection.chosen[:, 0].tolist() == [True, False, True]


# -- bytes and rounds --------------------------------------------------------------------------------------------------


def traffic(
    rank: int, tokens: int, experts: int, others: int, dtype: torch.dtype, algorithms: tuple[str, ...]
) -> list[tuple[int, int]]:
    """Bytes received and rounds of one selection by each algorithm, over all ranks."""
    mesh = init_mesh(1, launched_world(), 1.0)
    generator = torch.Generator().manual_seed(rank)
    scores, also = (torch.randn(tokens, number, generator=generator, dtype=dtype) for number in (experts, others))
    found = []
    for algorithm in algorithms:
        group = replace(mesh.pool, traffic=Traffic())
        topk_per_expert(scores, 7, Pools(None, group, algorithm), also)
        found.append((group.traffic.received, group.traffic.rounds))
        group.traffic.reset()
        assert (group.traffic.received, group.traffic.rounds) == (0, 0)
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8)])
def test_bytes_and_rounds_are_those_of_the_formulas(world: int, dtype: torch.dtype, width: int) -> None:
    """Of W ranks with n tokens and C columns: 4 (W-1) n C; 4 n C (W-1)/W; a histogram of 256 counts of 4 bytes for each
    of 4 passes.
    """
    tokens, experts, others = 1024, 16, 16
    columns = experts + others
    expected = {
        "gather": (width * (world - 1) * tokens * columns, 1),
        "owner": (width * tokens * columns * (world - 1) / world, 2),
        "radix": (width * 256 * 4 * columns, width + 1),
    }
    for results in run(world, traffic, tokens, experts, others, dtype, ALGORITHMS):
        for (received, rounds), (bytes_, times) in zip(results, expected.values(), strict=True):
            assert received == pytest.approx(bytes_, rel=0.01)
            assert rounds == times


@pytest.mark.parametrize("tokens", [8, 4096])
def test_auto_is_the_cheapest(tokens: int) -> None:
    """Where all tokens are few, one round is the best, and where they are many, less bytes and work."""
    (auto, gather, owner, _), _ = run(2, traffic, tokens, 16, 16, torch.float32, ("auto", *ALGORITHMS))
    assert auto == (gather if tokens == 8 else owner)


def exchanges(rank: int) -> list[tuple[int, int]]:
    """Bytes and rounds of each collective with 3 numbers of 8 bytes to every rank."""
    from diffmoe_ep.parallel.collectives import all_gather, all_sum, all_to_all, all_to_all_even

    mesh = init_mesh(1, 1, 1.0)
    x, found = torch.ones(3 * mesh.size, 2, dtype=torch.float64, requires_grad=True), []
    send = [[3, 3], [0, 6]][rank] if mesh.size == 2 else []
    receive = [[3, 0], [3, 6]][rank]
    for call in (
        all_gather,
        all_sum,
        all_to_all_even,
        lambda x, group: all_to_all(x, send, receive, group).sum().backward(),
    ):
        group = replace(mesh.world, traffic=Traffic())
        call(x, group)
        found.append((group.traffic.received, group.traffic.rounds))
    return found


def test_collectives_count_what_comes_from_others() -> None:
    """Uneven splits and none included; a backward is an exchange of its own."""
    first, second = run(2, exchanges)
    assert first == [(96, 1), (96, 1), (48, 1), (0 + 3 * 16, 2)]
    assert second == [(96, 1), (96, 1), (48, 1), (3 * 16 + 0, 2)]
