"""The rank grid and the collectives that carry gradients."""

from typing import Any

import pytest
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.collectives import Group, all_gather, all_sum, all_to_all, all_to_all_even, gather_objects
from diffmoe_ep.parallel.mesh import init_mesh, launched_world
from ranks import RankError, run


def members(rank: int, expert: int, pool: int) -> dict[str, list[int]]:
    """Which ranks each of this rank's groups holds, found by talking in it."""
    mesh = init_mesh(expert, pool, 1.0)
    return {name: gather_objects(rank, getattr(mesh, name)) for name in ("world", "expert", "replicas", "pool")}


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "pool"), [(1, 1), (2, 2), (4, 1), (1, 2), (2, 4)])
def test_groups_are_runs_of_neighbors_and_their_copies(expert: int, pool: int) -> None:
    for rank, found in enumerate(run(4, members, expert, pool)):
        assert found["world"] == [0, 1, 2, 3]
        assert found["expert"] == [r for r in range(4) if r // expert == rank // expert]
        assert found["replicas"] == [r for r in range(4) if r % expert == rank % expert]
        assert found["pool"] == [r for r in range(4) if r // pool == rank // pool]


def exchanged(rank: int) -> dict[str, Any]:
    mesh = init_mesh(1, 1, 1.0)
    splits = torch.tensor([[2, 0], [0, 0]])  # rows from a rank to each
    send, receive = splits[rank].tolist(), splits[:, rank].tolist()
    x = (10.0 * rank + torch.arange(float(sum(send)))).requires_grad_()
    y = all_to_all(x[:, None], send, receive, mesh.world)
    (y[:, 0] * (rank + 1)).sum().backward()
    return {
        "y": y[:, 0].tolist(), "grad": x.grad, "gather": all_gather(torch.tensor([rank]), mesh.world).tolist(),
        "sum": all_sum(torch.tensor(rank + 1.0), mesh.world).item(),
        "even": all_to_all_even(torch.tensor([rank, rank + 5]), mesh.world).tolist(),
        "same": mesh.same(f"from {rank}"),
    }  # fmt: skip


def test_collectives() -> None:
    """Rank 0 keeps two rows; rank 1 sends nothing and gets nothing; the backward is the exchange turned round."""
    first, second = run(2, exchanged)
    assert (first["y"], second["y"]) == ([0.0, 1.0], [])
    assert first["grad"].tolist() == [1.0, 1.0]
    assert second["grad"] is None or second["grad"].numel() == 0
    assert first["gather"] == second["gather"] == [0, 1]
    assert first["sum"] == second["sum"] == 3.0
    assert (first["even"], second["even"]) == ([0, 1], [5, 6])
    assert second["same"] == "from 0"


def test_alone_they_are_identities() -> None:
    x = torch.arange(3.0)
    for result in (
        all_gather(x, Group()),
        all_sum(x, Group()),
        all_to_all_even(x, Group()),
        all_to_all(x, [3], [3], Group()),
    ):
        assert torch.equal(result, x)


def disagree(rank: int, problems: list[str | None]) -> str:
    mesh = init_mesh(1, 1, 1.0)
    try:
        mesh.agree(problems[rank])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("problems", "told"),
    [([None, None], ""), (["no disk", "no disk"], "no disk"), ([None, "no disk"], "rank 1: no disk")],
)
def test_one_ranks_problem_is_everyones(problems: list[str | None], told: str) -> None:
    assert run(2, disagree, problems) == [told, told]


def test_a_world_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # whatever this process ran before
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 but MASTER_ADDR and MASTER_PORT are not set"):
        init_mesh(1, 1, 1.0)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK is 'first'"):
        init_mesh(1, 1, 1.0)


def outlives(rank: int) -> None:
    mesh = init_mesh(1, 1, 0.05)
    if rank == 0:
        all_sum(torch.ones(1), mesh.world)


@pytest.mark.slow
def test_waiting_for_a_lost_peer_ends() -> None:
    """Each collective that can wait has the configured timeout: three seconds here."""
    with pytest.raises(RankError, match=r"(?i)tim|closed|reset|connection"):
        run(2, outlives, timeout=90)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', which is no whole number from 1 on"),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE is '9{40}', which is no whole number"),
        ("WORLD_SIZE", "²", "WORLD_SIZE is '²', which is no whole number"),
        ("RANK", "-1", "RANK is '-1', which is no whole number from 0 on"),
        ("RANK", "1", "RANK is 1, but WORLD_SIZE is 1"),
        ("LOCAL_RANK", "", "LOCAL_RANK is '', which is no whole number"),
    ],
)
def test_nonsense_of_a_launcher_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        init_mesh(1, 1, 1.0)
    assert launched_world(strict=False) == 1
