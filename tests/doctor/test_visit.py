"""Two hosts, made of ranks that take themselves for such: a sound pair is well, and each fault is named by host."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffmoe_ep.doctor import examine, reach, visit
from diffmoe_ep.doctor.examine import Patient
from diffmoe_ep.doctor.finding import Finding, Report
from diffmoe_ep.doctor.visit import examine_hosts
from diffmoe_ep.parallel import links
from diffmoe_ep.parallel.mesh import is_initialized
from diffmoe_ep.train import preflight
from ranks import RankError, run

pytestmark = pytest.mark.slow

Planted = Callable[[int], contextlib.AbstractContextManager[Any]]  # a fault, on one rank


class Left(BaseException):
    """In place of the end of a process."""


def examined(rank: int, world: int, fault: str, folder: Path | None) -> tuple[bool, dict[str, Any] | None, bool]:
    """What a rank of `world`, half of which stand on each of two hosts, hears: the verdict, the report as data (on the
    first rank), and whether it joined a process group.
    """
    reports: list[Report] = []
    name = "alpha" if rank < world // 2 else "beta"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = str(rank % (world // 2))

    def leave() -> None:
        raise Left

    def nothing() -> Iterator[Finding]:
        return iter(())

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(visit.platform, "node", return_value=name))
        stack.enter_context(mock.patch.object(visit, "_host_key", return_value=name))
        stack.enter_context(mock.patch("diffmoe_ep.parallel.mesh.socket.gethostname", return_value=name))
        stack.enter_context(mock.patch.object(visit, "_leave", leave))
        stack.enter_context(mock.patch.object(examine.software, "imports", nothing))  # seconds
        if fault:
            stack.enter_context(FAULTS[fault](rank))
        joined = False
        try:
            verdict = examine_hosts(Patient(None, folder, "cpu", 20.0), time.monotonic(), reports.append)
        except Left:
            verdict, joined = False, is_initialized()
    (report,) = reports or [None]
    return verdict, report.as_dict() if report else None, joined


def no_fault(_: int) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def deaf_host(rank: int) -> contextlib.AbstractContextManager[Any]:
    """Beta cannot connect to alpha, alpha to beta it can."""

    def contact(*_: object) -> reach.Contact:
        return reach.Contact("no answer")

    return mock.patch.object(reach, "contact", contact) if rank else contextlib.nullcontext()


def wrong_clock(rank: int) -> contextlib.AbstractContextManager[Any]:
    """Every host but alpha is a minute ahead."""
    real = time.time
    return (
        mock.patch.object(reach.time, "time", side_effect=lambda: real() + 60.0) if rank else contextlib.nullcontext()
    )


def own_disk(rank: int) -> contextlib.AbstractContextManager[Any]:
    """What one host writes the other does not see."""
    return mock.patch.object(preflight, "_appears", return_value=rank == 0)


def broken_pair(rank: int) -> contextlib.AbstractContextManager[Any]:
    """Ranks 0 and 1 have no link."""
    original = links._exchange

    def exchange(partner: int, *given: Any) -> str | None:
        return "no answer in time" if {rank, partner} == {0, 1} else original(partner, *given)

    return mock.patch.object(links, "_exchange", exchange)


def other_variable(rank: int) -> contextlib.AbstractContextManager[Any]:
    """Beta has a variable of its own."""
    return mock.patch.dict(os.environ, {"NCCL_ALGO": "Ring"} if rank else {})


def other_torch(rank: int) -> contextlib.AbstractContextManager[Any]:
    """Beta has another DeepSpeed."""
    original = examine.software._version

    def version(package: str) -> str | None:
        return "0.19.9" if rank and package == "deepspeed" else original(package)

    return mock.patch.object(examine.software, "_version", version)


FAULTS: dict[str, Planted] = {
    "none": no_fault,
    "deaf host": deaf_host,
    "clock": wrong_clock,
    "disk": own_disk,
    "pair": broken_pair,
    "variable": other_variable,
    "torch": other_torch,
}


def named(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What is not well, by name."""
    mine = ("communication", "run folder")
    return {
        one["name"]: (one["state"], one["found"])
        for one in report["checks"]
        if one["state"] != "ok" and one["section"] in mine
    }


@pytest.mark.parametrize("world", [2, 4])
def test_sound_hosts_are_well(world: int, tmp_path: Path) -> None:
    first, *others = run(world, examined, world, "none", tmp_path / "run")
    verdict, report, _ = first
    assert report is not None
    assert named(report) == {}
    assert report["hosts"] == ["alpha", "beta"]
    assert {one["name"]: one["found"] for one in report["checks"]}["shared"] == f"all hosts see {tmp_path}"
    groups = {row["group"]: row["ranks"] for row in report["speeds"]}
    assert groups == (
        {"world = replicas = across hosts": 2}
        if world == 2
        else {"world": 4, "expert group = within a host": 2, "replicas = across hosts": 2}
    )
    assert all(row["latency_us"] > 0 and row["bus_gb_s"] > 0 for row in report["speeds"])
    assert [one[1] for one in others] == [None] * (world - 1)  # one report
    assert {one[0] for one in others} == {verdict} == {report["well"]}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "name", "state", "said"),
    [
        ("deaf host", "pair of hosts", "problem", "beta does not reach alpha at 127.0.0.1, where gloo listens: no ans"),
        ("clock", "clocks", "problem", "60 s"),
        ("disk", "shared", "problem", "is not shared: beta does not see there what alpha wrote"),
        ("pair", "pair of ranks", "problem", "ranks 0 (alpha) and 1 (beta): no answer in time"),
        ("variable", "NCCL_ALGO", "note", "not set on alpha; Ring on beta"),
        ("torch", "deepspeed of hosts", "problem", "0.19.9 on beta"),
    ],
)  # fmt: skip
def test_each_fault_is_named(tmp_path: Path, fault: str, name: str, state: str, said: str) -> None:
    found = run(2, examined, 2, fault, tmp_path)
    report = found[0][1]
    assert report is not None
    # collectives are not measured where they would hang; files on beta have alpha's time when its clock is wrong
    assert set(named(report)) - {"collectives", "clock" if fault == "clock" else ""} == {name}
    assert named(report)[name][0] == state
    assert said in named(report)[name][1]
    assert {one[0] for one in found} == {state != "problem"}
    if fault == "deaf host":
        assert [one[2] for one in found] == [False, False]
        assert report["speeds"] == []


def away(rank: int) -> dict[str, Any] | None:
    """Rank 1 never comes."""
    reports: list[Report] = []
    if rank == 0:
        with mock.patch.object(examine.software, "imports", return_value=()):
            assert not examine_hosts(Patient(None, None, "cpu", 2.0), time.monotonic(), reports.append)
    return reports[0].as_dict() if reports else None


def test_a_rank_that_does_not_come_is_named() -> None:
    report = run(2, away)[0]
    assert named(report)["ranks"][0] == "problem"
    assert named(report)["ranks"][1].startswith("rank 1 of 2 did not come to 127.0.0.1:")


def hanging(rank: int, file: Path) -> None:
    """Rank 0 waits for rank 1 for ever, which could not join."""

    def show(report: Report) -> None:
        file.write_text("\n".join(report.lines()))

    def join(*_: object) -> None:
        if rank == 1:
            raise RuntimeError("Gloo connectFullMesh failed\nand more")
        time.sleep(600)

    with (
        mock.patch.object(visit, "init_mesh", join),
        mock.patch.object(examine.software, "imports", return_value=()),
    ):
        examine_hosts(Patient(None, None, "cpu", 2.0), time.monotonic(), show)


def test_ranks_that_hang_say_so_and_leave(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="ended with exit code 1"):
        run(2, hanging, tmp_path / "page")
    page = " ".join((tmp_path / "page").read_text().split())
    assert "PROBLEM process group rank 0 of 2 did not come out of it in 4 s; rank 1 on" in page
    assert "Gloo connectFullMesh failed" in page
    assert "ok packages" in page
