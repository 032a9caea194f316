"""The slowest rank of the slowest group is what is shown, and what is out of the ordinary is noted."""

import pytest

from diffmoe_ep.doctor.speed import LARGE, Timed, check_speeds, groups_of, measure, speeds
from diffmoe_ep.parallel.collectives import ALONE
from diffmoe_ep.parallel.mesh import init_mesh
from ranks import run

HOSTS = {rank: f"node{rank // 2}" for rank in range(8)}


def timed(seconds: list[float], operation: str = "all-reduce") -> list[list[Timed]]:
    """Four pairs of ranks; each rank's seconds."""
    return [
        [Timed("pairs", (rank // 2 * 2, rank // 2 * 2 + 1), operation, value / 10, 1 << 20, value)]  # type: ignore[arg-type]
        for rank, value in enumerate(seconds)
    ]


def test_the_slowest_counts() -> None:
    (row,) = speeds(timed([1, 1, 1, 2, 1, 1, 1.5, 1]))
    assert (row.seconds, row.latency, row.slowest, row.ranks) == (2, 0.2, (2, 3), 2)
    assert row.bus == row.algorithm == (1 << 20) / 2  # 2 (n-1)/n is 1 for two ranks


def test_a_host_that_is_slower_than_the_others_is_named() -> None:
    assert list(check_speeds(timed([1] * 8), False, HOSTS)) == []
    (found,) = check_speeds(timed([1, 1, 1, 1, 5, 5, 1, 1]), False, HOSTS)
    assert found.state == "note"
    assert found.found == "ranks 4, 5 (node2) take 5.0 times the middle one's time"


def test_rates_that_no_fast_link_would_have() -> None:
    (found,) = check_speeds(timed([1e-3] * 8), True, HOSTS)  # 1 GB/s between GPUs of a host
    assert "less than NVLink gives" in found.found
    (found,) = check_speeds(timed([1e-3] * 8), True, dict(enumerate("abcdefgh")))
    assert "less than InfiniBand or RoCE gives" in found.found
    assert list(check_speeds(timed([1e-6] * 8), True, HOSTS)) == []


def measured(rank: int) -> list[Timed]:
    mesh = init_mesh(2, 1, 1.0)
    return measure(mesh, groups_of(mesh, mesh.world, ALONE))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_group_is_measured(world: int) -> None:
    rows = speeds(run(world, measured))
    names = ["world = expert group = within a host"]
    if world == 4:
        names = ["world = within a host", "expert group", "replicas"]
    assert [row.group for row in rows] == [name for name in names for _ in range(2)]
    assert {row.operation for row in rows} == {"all-reduce", "all-to-all"}
    assert all(row.latency > 0 and row.seconds > 0 and row.nbytes <= LARGE["cpu"] for row in rows)
