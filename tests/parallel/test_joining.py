"""How ranks meet: each way in which they cannot is one line that names address, port and interface."""

import socket
import threading
from collections.abc import Iterator

import pytest

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.joining import JoinError, Place, join, ranks

pytestmark = pytest.mark.slow
SOON = 0.03  # minutes


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which a program listens that has nothing to do with us."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free(taken: int) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int) and port != taken
    return port


def refused(meeting: Place, rank: int, world: int = 2) -> str:
    with pytest.raises(ConfigError) as caught:
        join(meeting, world, rank, SOON)
    text = str(caught.value)
    assert "\n" not in text
    assert isinstance(caught.value, JoinError) != caught.value.everywhere  # either this rank says it, or all know it
    return text


def test_a_port_in_use_is_named(taken: int) -> None:
    told = refused(Place("127.0.0.1", taken, interface="lo"), 0)
    assert f"port {taken} of {socket.gethostname()} is in use" in told
    assert "interface, GLOO_SOCKET_IFNAME: lo" in told


def test_a_stranger_at_the_port_is_not_waited_for_for_ever(taken: int) -> None:
    told = refused(Place("127.0.0.1", taken), 1)
    assert f"rank 1 on {socket.gethostname()} got no answer within {SOON:g} minutes" in told
    assert f"127.0.0.1 port {taken}" in told and "another program may listen there" in told


@pytest.mark.parametrize("rank", [0, 1])
def test_an_address_that_does_not_resolve_is_named(free: int, rank: int) -> None:
    told = refused(Place("nobody.invalid", free), rank)
    assert f"the address nobody.invalid does not resolve on {socket.gethostname()}" in told
    assert f"port {free}" in told


def test_nobody_at_the_port_is_named(free: int) -> None:
    assert f"could not connect to 127.0.0.1 port {free}" in refused(Place("127.0.0.1", free), 1)


def test_an_interface_that_is_not_there_is_named(free: int) -> None:
    told = refused(Place("127.0.0.1", free, interface="lo,nix9"), 0)
    assert "GLOO_SOCKET_IFNAME names the interface nix9" in told and "it has lo" in told


def test_ranks_that_do_not_come_are_named_on_all(free: int) -> None:
    meeting, told = Place("127.0.0.1", free), dict[int, str]()
    comers = [
        threading.Thread(target=lambda rank=rank: told.update({rank: refused(meeting, rank, 4)})) for rank in (0, 2)
    ]
    for thread in comers:
        thread.start()
    for thread in comers:
        thread.join()
    assert told[0] == told[2]
    assert told[0].startswith(f"ranks 1, 3 of 4 did not come within {SOON:g} minutes")
    assert f"127.0.0.1 port {free}" in told[0]


def test_those_who_come_meet_and_a_second_start_is_not_the_first(free: int) -> None:
    stores = dict[int, object]()

    def come(rank: int, attempt: str) -> None:
        stores[rank] = join(Place("127.0.0.1", free, attempt=attempt), 2, rank, 1.0)

    for attempt in ("0", "1"):
        both = [threading.Thread(target=come, args=(rank, attempt)) for rank in (0, 1)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        first, second = stores[0], stores[1]
        assert not first.check(["end"])  # type: ignore[attr-defined]
        second.set("end", "told")  # type: ignore[attr-defined]
        assert first.get("end") == b"told"  # type: ignore[attr-defined]


def test_many_ranks_are_told_in_few_words() -> None:
    assert ranks([3]) == "rank 3"
    assert ranks(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
