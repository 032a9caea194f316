"""Ranks meet at the first one's store: all hear what each says, and who does not come is known by number."""

import os
import socket
import time

import pytest

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.meeting import Meeting
from ranks import run


def say(rank: int, rounds: int) -> list[dict[int, object]]:
    heard: list[dict[int, object]] = []
    for _ in range(rounds):  # a second meeting at the same store is another one
        meeting = Meeting.join(60.0)
        heard += [meeting.gather([rank, "x"]), meeting.gather({"rank": rank}), meeting.collect(rank * rank)]
        meeting.part()
    return heard


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_hear_all(world: int) -> None:
    for rank, heard in enumerate(run(world, say, 2)):
        for lists, dicts, squares in (heard[:3], heard[3:]):
            assert lists == {one: [one, "x"] for one in range(world)}
            assert dicts == {one: {"rank": one} for one in range(world)}
            assert squares == ({one: one * one for one in range(world)} if rank == 0 else {})


def stay_away(rank: int) -> tuple[list[dict[int, int]], float]:
    if rank == 1:
        return [], 0.0
    started, meeting = time.monotonic(), Meeting.join(2.0)
    heard = [meeting.gather(rank) for _ in range(20)]
    meeting.part()
    return heard, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_who_does_not_come_is_missing_and_waited_for_once(world: int) -> None:
    came = {rank: rank for rank in range(world) if rank != 1}
    for rank, (heard, seconds) in enumerate(run(world, stay_away)):
        assert heard == ([] if rank == 1 else [came] * 20)
        assert seconds < 20 * 2.0


def too_late(rank: int) -> str:
    meeting = Meeting.join(2.0)
    if rank == 1:
        time.sleep(5.0)
    try:
        meeting.gather(rank)
        if rank == 0:
            time.sleep(8.0)  # the store is to be there when the late one comes
        return ""
    except ConfigError as error:
        return str(error)


@pytest.mark.slow
def test_who_comes_too_late_is_told() -> None:
    first, late = run(2, too_late)
    assert first == ""
    assert "rank 1 came later than the others waited" in late


def nowhere(rank: int, name: str, value: str) -> str:
    os.environ[name] = value
    if rank == 0:
        return ""
    try:
        Meeting.join(1.0)
    except ConfigError as error:
        return str(error)
    return "joined"


@pytest.mark.slow
def test_a_place_that_cannot_be_reached_is_named() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        port = closed.getsockname()[1]
        assert f"could not connect to 127.0.0.1 port {port} " in run(2, nowhere, "MASTER_PORT", str(port))[1]
    assert "MASTER_PORT is 'x'" in run(2, nowhere, "MASTER_PORT", "x")[1]
    assert (
        "the address no-such-host.invalid does not resolve" in run(2, nowhere, "MASTER_ADDR", "no-such-host.invalid")[1]
    )


def taken(rank: int, port: int) -> str:
    os.environ["MASTER_PORT"] = str(port)
    if rank == 1:
        return ""
    try:
        Meeting.join(1.0)
    except ConfigError as error:
        return str(error)
    return "joined"


@pytest.mark.slow
def test_a_port_that_another_program_has_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = run(2, taken, port)[0]
    assert f"port {port} of " in said and "is in use" in said and "--master-port" in said
