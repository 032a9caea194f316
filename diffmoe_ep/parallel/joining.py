"""How ranks find each other at the start; whatever keeps them from it is told in one line that names address, port and
interface.

The ranks meet at a store (a table of keys and values that one process serves over TCP), which is then also how one of
them tells the others why it ends (`common_end`). torch's own waits at it print stacks, or never end where another
program listens at the port, so addresses are tried here before torch connects.
"""

import datetime
import errno
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from diffmoe_ep.config import ConfigError

T = TypeVar("T")

POLL_SECONDS = 0.2
MOST_NAMED = 8  # ranks that a message names


class JoinError(ConfigError):
    """This rank cannot join the others; it says so itself, since they cannot know why."""

    alone = True


@dataclass(frozen=True)
class Place:
    """Where the ranks meet, as the launcher tells each of them."""

    address: str
    """MASTER_ADDR."""
    port: int
    """MASTER_PORT."""
    by_launcher: bool = False
    """Whether the launcher serves the store (torchrun), and not the first rank."""
    attempt: str = "0"
    """Tells starts apart that meet at one store: a launcher may start all ranks again."""
    interface: str | None = None
    """GLOO_SOCKET_IFNAME."""

    def __str__(self) -> str:
        way = self.interface or f"that of {_own_address()}, the address of this host's name"
        return f"{self.address} port {self.port} (MASTER_ADDR, MASTER_PORT; interface, GLOO_SOCKET_IFNAME: {way})"


def join(place: Place, world: int, rank: int, minutes: float) -> dist.Store:
    """Meet the other ranks, and return the store once all have come; collective.

    Raises JoinError within `minutes` or little more where the port is in use, the address does not resolve or answer,
    an interface does not exist, or a rank does not come, whom then the first rank names for all.
    """
    deadline = time.monotonic() + 60 * minutes
    _check_interface(place)
    made = open_store(place, world, rank, 60 * minutes, f"{minutes:g} minutes (parallel.timeout_minutes)")
    store = dist.PrefixStore(f"diffmoe {place.attempt}", made)
    try:
        _await_all(store, place, world, rank, deadline, minutes)
    except dist.DistError as error:
        raise JoinError(
            f"{_here(rank)} lost the connection to {place} before all {world} ranks had come: what served it has "
            "ended, and its output says why"
        ) from error
    return store


def open_store(place: Place, world: int, rank: int, seconds: float, patience: str) -> dist.Store:
    """The store at a place, which the first rank serves where the launcher does not; not collective.

    patience: how long that may take, and where it is set, in words. Raises JoinError within that time or little more.
    """
    deadline = time.monotonic() + seconds
    _resolve(place, min(deadline, time.monotonic() + 60.0))
    serves = rank == 0 and not place.by_launcher
    if not serves:
        _reach(place, deadline, patience)
    timeout = datetime.timedelta(seconds=seconds)

    def connect() -> dist.TCPStore:
        return dist.TCPStore(
            place.address, place.port, world, serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )

    try:
        made = in_time(connect, deadline)
    except (dist.DistError, RuntimeError) as error:
        if errno.errorcode[errno.EADDRINUSE] in str(error):
            raise JoinError(
                f"port {place.port} of {socket.gethostname()} is in use, where the ranks are to meet at {place}; "
                "give the launcher another port (--master_port, --master-port, MASTER_PORT)"
            ) from error
        raise JoinError(f"{_here(rank)} cannot meet the others at {place} ({_first_line(error)})") from error
    if made is None:
        raise JoinError(
            f"{_here(rank)} got no answer within {patience} at {place}: another program may listen there; give the "
            "launcher another port (--master_port, --master-port, MASTER_PORT)"
        )
    return made


def _await_all(store: dist.Store, place: Place, world: int, rank: int, deadline: float, minutes: float) -> None:
    """Wait until the first rank says that all have come, or who has not."""
    store.set(f"came/{rank}", socket.gethostname())
    if rank > 0:
        while not store.check(["start"]):
            if time.monotonic() > deadline + 10:  # the first rank's clock decides, if it is there
                raise JoinError(f"{_here(rank)} waited {minutes:g} minutes at {place}, and rank 0 did not come")
            time.sleep(POLL_SECONDS)
        problem = store.get("start").decode()
    else:
        everyone = [f"came/{each}" for each in range(world)]
        while not (complete := store.check(everyone)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        absent = [] if complete else [each for each in range(world) if not store.check([f"came/{each}"])]
        problem = ""
        if absent:
            problem = (
                f"{ranks(absent)} of {world} did not come within {minutes:g} minutes (parallel.timeout_minutes) to "
                f"{place}; see whether they were started, and whether their hosts reach that address"
            )
        store.set("start", problem)
    if problem:
        raise ConfigError(problem, everywhere=True)


def ranks(numbers: list[int]) -> str:
    """Ranks in words: rank 3; ranks 1, 2, 5 and 12 more."""
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"rank{'s' * (len(numbers) > 1)} {shown}{more}"


def no_connection(place: Place, rank: int, error: Exception) -> JoinError:
    """The ranks have met, and this one cannot connect to some other."""
    return JoinError(
        f"{_here(rank)} met the others at {place} but cannot connect to them ({_first_line(error)}); set "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to an interface over which the hosts reach each other"
    )


def _check_interface(place: Place) -> None:
    known = [name for _, name in socket.if_nameindex()]
    for name in filter(None, (place.interface or "").split(",")):
        if name not in known:
            raise JoinError(
                f"GLOO_SOCKET_IFNAME names the interface {name}, which {socket.gethostname()} has not; it has "
                f"{', '.join(known)}"
            )


def _resolve(place: Place, deadline: float) -> None:
    """Raise JoinError where the address does not resolve; names of hosts that have just started may take a while."""
    while True:
        try:
            socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > deadline:
            raise JoinError(
                f"the address {place.address} does not resolve on {socket.gethostname()} ({reason}); the ranks "
                f"were to meet at {place}: give the launcher a name or address of the first host that all hosts know "
                "(--master_addr, --master-addr, MASTER_ADDR)"
            )
        time.sleep(5 * POLL_SECONDS)


def _reach(place: Place, deadline: float, patience: str) -> None:
    """Raise JoinError unless somebody listens there before the deadline."""
    while True:
        try:
            socket.create_connection((place.address, place.port), max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise JoinError(
                f"{socket.gethostname()} could not connect to {place} for {patience}: {reason}; see whether the first "
                "rank runs there, and whether a firewall lets the port pass"
            )
        time.sleep(POLL_SECONDS)


def in_time(action: Callable[[], T], deadline: float) -> T | None:
    """What the action returns or raises, or None where it has done neither by the deadline."""
    results: list[T] = []
    errors: list[Exception] = []

    def act() -> None:
        try:
            results.append(action())
        except Exception as error:  # raised below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=act, name="in time", daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    return results[0] if results else None


def _here(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "an unknown address"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
