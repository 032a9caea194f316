"""The rank grid and the collectives that carry gradients."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel import mesh as mesh_module
from diffmoe_ep.parallel.collectives import Group, all_gather, all_sum, all_to_all, all_to_all_even, gather_objects
from diffmoe_ep.parallel.mesh import compute_deterministically, init_mesh, launched_world
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


def made(rank: int, place: int, world: int, expert: int, pool: int) -> tuple[int, dict[str, list[int]]]:
    """The groups that one of many ranks makes, and which ranks its own hold; of the others nothing is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=place, world_size=world, store=FakeStore())
    counted = mock.Mock(side_effect=dist.new_group)
    with (
        mock.patch.dict(os.environ, RANK=str(place), WORLD_SIZE=str(world), LOCAL_RANK="0", DS_ACCELERATOR="cpu"),
        mock.patch.object(mesh_module, "gather_objects", lambda value, group: [value] * group.size),
        mock.patch.object(dist, "new_group", counted),
    ):
        mesh = init_mesh(expert, pool, 1.0)
    own = {name: getattr(mesh, name) for name in ("world", "expert", "replicas", "pool")}
    return counted.call_count, {
        name: [place] if group.handle is None else dist.get_process_group_ranks(group.handle)
        for name, group in own.items()
    }


@pytest.mark.parametrize(
    ("world", "expert", "budget"),
    [(8, 1, 0), (8, 4, 2 + 4), (8, 8, 1 + 8), (32, 1, 0), (32, 8, 4 + 8), (256, 8, 32 + 8)],
)
def test_no_group_is_made_that_is_not_used(world: int, expert: int, budget: int) -> None:
    """Each group costs a large run's start a communicator: no more than the expert groups and those of copies."""
    place = world - 3
    count, found = run(1, made, place, world, expert, world)[0]
    assert count == budget
    assert found["world"] == found["pool"] == list(range(world))
    assert found["expert"] == [rank for rank in range(world) if rank // expert == place // expert]
    assert found["replicas"] == [rank for rank in range(world) if rank % expert == place % expert]


def in_turn(rank: int, layouts: list[tuple[int, int]]) -> list[dict[str, list[int]]]:
    return [members(rank, expert, pool) for expert, pool in layouts]


def test_ranks_can_be_laid_out_anew() -> None:
    layouts = [(2, 1), (1, 2), (2, 2)]
    for rank, found in enumerate(run(2, in_turn, layouts)):
        assert [(one["expert"], one["replicas"], one["pool"]) for one in found] == [
            ([0, 1] if expert == 2 else [rank], [rank] if expert == 2 else [0, 1], [0, 1] if pool == 2 else [rank])
            for expert, pool in layouts
        ]


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


def precision(rank: int) -> str:
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    init_mesh(1, 1, 1.0)
    return torch.get_float32_matmul_precision()


def test_float32_is_float32() -> None:
    assert run(1, precision) == ["highest"]


def kernels() -> dict[str, bool]:
    allowed = torch.backends.cuda
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": allowed.cudnn_sdp_enabled(),
        "others": allowed.flash_sdp_enabled() and allowed.mem_efficient_sdp_enabled() and allowed.math_sdp_enabled(),
    }


def in_one_order(rank: int, own: dict[str, str]) -> tuple[dict[str, bool], dict[str, bool], list[str]]:
    os.environ.update(own)
    before = kernels()
    try:
        compute_deterministically()
        return before, kernels(), [os.environ["NCCL_ALGO"], os.environ["CUBLAS_WORKSPACE_CONFIG"]]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_sums_have_one_order_where_it_is_asked_for() -> None:
    before, after, environment = run(1, in_one_order, {})[0]
    assert before == {"deterministic": False, "only warns": False, "cudnn": True, "others": True}
    assert after == {"deterministic": True, "only warns": False, "cudnn": False, "others": True}
    assert environment == ["^NVLS,NVLSTree", ":4096:8"]
    assert run(1, in_one_order, {"NCCL_ALGO": "Ring"})[0][2][0] == "Ring"  # the user's own value wins


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
