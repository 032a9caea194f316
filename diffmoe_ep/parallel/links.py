"""Links between ranks, to look at one by one: pairs, the ranks of a host, the ranks across hosts."""

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ep.parallel.collectives import ALONE, Group
from diffmoe_ep.parallel.mesh import Mesh


def host_groups(mesh: Mesh, hosts: Sequence[str], minutes: float) -> tuple[Group, Group]:
    """The ranks that share this rank's host, and the ranks that stand at the same place on other hosts, one of each;
    collective.

    hosts: each rank's host.
    """
    places = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    inside, across = ALONE, ALONE
    for host in dict.fromkeys(hosts):
        inside = _made([rank for rank, one in enumerate(hosts) if one == host], mesh, hosts, minutes) or inside
    for place in range(max(places) + 1):
        across = _made([rank for rank, one in enumerate(places) if one == place], mesh, hosts, minutes) or across
    return inside, across


def _made(ranks: Sequence[int], mesh: Mesh, hosts: Sequence[str], minutes: float) -> Group | None:
    """A group of these ranks where this one is among them; every rank makes every group, as torch demands."""
    if len(ranks) == 1:
        return None
    handle = dist.new_group(list(ranks), timeout=datetime.timedelta(minutes=minutes))
    if mesh.rank not in ranks:
        return None
    return Group(len(ranks), ranks.index(mesh.rank), handle, len({hosts[rank] for rank in ranks}))


def ranks_of(group: Group, mesh: Mesh) -> tuple[int, ...]:
    """The global numbers of a group's ranks."""
    return (mesh.rank,) if group.handle is None else tuple(dist.get_process_group_ranks(group.handle))


def sum_in_place(x: Tensor, group: Group) -> None:
    """The bare all-reduce, to be timed."""
    dist.all_reduce(x, group=group.handle)


def wait_for_all(group: Group) -> None:
    """Return when every rank has come."""
    dist.barrier(group=group.handle)


@dataclass(frozen=True)
class Tried:
    """What one rank knows of its pairs."""

    failed: dict[int, str]  # partner -> why
    rounds: int  # that it took part in; of the others it knows nothing


def rounds_of(world: int) -> list[list[tuple[int, int]]]:
    """All pairs of ranks, in rounds in which each rank has one partner at most (the circle method)."""
    seats = list(range(world + world % 2))  # of an odd number one has nobody in each round
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[place], seats[-1 - place]) for place in range(len(seats) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < world])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def try_pairs(mesh: Mesh, seconds: float) -> Tried:
    """Exchange a number with every other rank over the mesh's own back end; collective.

    A pair has `seconds`. A rank stops after its first failure: in NCCL's queue all else would wait behind the hanging
    exchange, and gloo closes a rank's other pairs with the one that timed out. `accused` tells such pairs from those of
    ranks that had stopped.
    """
    rounds = rounds_of(mesh.size)
    for number, pairs in enumerate(rounds):
        for pair in pairs:
            if mesh.rank in pair:
                partner = pair[pair[0] == mesh.rank]
                problem = _exchange(partner, mesh, time.monotonic() + seconds)
                if problem is not None:
                    return Tried({partner: problem}, number + 1)
    return Tried({}, len(rounds))


def _exchange(partner: int, mesh: Mesh, deadline: float) -> str | None:
    """What is wrong between this rank and another."""
    mine = torch.tensor([mesh.rank], device=mesh.device)
    theirs = torch.full_like(mine, -1)
    group = mesh.world.handle
    try:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine, partner, group), dist.P2POp(dist.irecv, theirs, partner, group)]
        )
        for work in works:
            if not _ended(work, mesh.device, deadline):
                return "no answer in time"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None if int(theirs) == partner else f"it received {int(theirs)} in place of {partner}"


def _ended(work: dist.Work, device: torch.device, deadline: float) -> bool:
    """Whether a transfer ends in time. Gloo's only tells when it is waited for; NCCL's does not block the host."""
    if device.type == "cuda":
        while not work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True
    try:
        work.wait(datetime.timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError as error:
        if "imed out" in str(error) or "imeout" in str(error):
            return False
        raise
    return True


def accused(tried: Sequence[Tried]) -> dict[tuple[int, int], str]:
    """The pairs that do not reach each other, with the reason; not those of which one had stopped trying before."""
    found = {}
    for number, pairs in enumerate(rounds_of(len(tried))):
        for low, high in pairs:
            reason = tried[low].failed.get(high) or tried[high].failed.get(low)
            if reason is not None and min(tried[low].rounds, tried[high].rounds) > number:
                found[low, high] = reason
    return found
