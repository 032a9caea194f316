"""How fast groups of ranks talk: all-reduce and all-to-all, small ones for the latency and large ones for the rate."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch

from diffmoe_ep.doctor.finding import Finding, Operation, Speed
from diffmoe_ep.parallel.collectives import Group, all_to_all_even
from diffmoe_ep.parallel.links import ranks_of, sum_in_place, wait_for_all
from diffmoe_ep.parallel.mesh import Mesh

SMALL_TURNS, LARGE_TURNS = 20, 5
LARGE = {"cpu": 4 << 20, "cuda": 64 << 20}  # bytes that a rank gives
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
SLOW_HOST, SLOW_NETWORK = 50e9, 5e9  # bytes per second of a GPU: PCIe in place of NVLink; TCP in place of InfiniBand

_found = partial(Finding, "communication")


@dataclass(frozen=True)
class Timed:
    """What one rank measured over one group."""

    group: str
    ranks: tuple[int, ...]
    operation: Operation
    latency: float
    nbytes: int
    seconds: float


def groups_of(mesh: Mesh, inside: Group, across: Group) -> dict[str, Group]:
    """The groups that are worth a row: of those with the same ranks one, under both names."""
    named = {"world": mesh.world, "expert group": mesh.expert, "replicas": mesh.replicas}
    named |= {"within a host": inside, "across hosts": across}
    found: dict[tuple[int, ...], tuple[list[str], Group]] = {}
    for name, group in named.items():
        if group.size > 1:
            found.setdefault(ranks_of(group, mesh), ([], group))[0].append(name)
    return {" = ".join(names): group for names, group in found.values()}


def measure(mesh: Mesh, groups: Mapping[str, Group]) -> list[Timed]:
    """Time both collectives over each group, one kind of group after the other; collective."""
    found = []
    for name, group in groups.items():
        for operation in OPERATIONS:
            latency = _seconds(mesh, group, operation, 8 * group.size, SMALL_TURNS, together=True)
            nbytes = LARGE[mesh.device.type] // (4 * group.size) * 4 * group.size
            seconds = _seconds(mesh, group, operation, nbytes, LARGE_TURNS, together=False)
            found.append(Timed(name, ranks_of(group, mesh), operation, latency, nbytes, seconds))
    return found


def _seconds(mesh: Mesh, group: Group, operation: Operation, nbytes: int, turns: int, together: bool) -> float:
    """Seconds of one collective: the median of several, or, together, their mean one right behind the other."""
    x = torch.zeros(nbytes // 4, device=mesh.device)
    act: Callable[[], object] = partial(sum_in_place if operation == "all-reduce" else all_to_all_even, x, group)
    taken = []
    for turn in range(2 if together else turns + 1):  # the first warms up
        wait_for_all(group)
        _settle(mesh.device)
        started = time.perf_counter()
        for _ in range(turns if together else 1):
            act()
        _settle(mesh.device)
        if turn:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) / (turns if together else 1)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds(measured: Sequence[Sequence[Timed]]) -> list[Speed]:
    """Of what all ranks measured, for each kind of group and operation the slowest group, by its slowest rank."""
    found: dict[tuple[str, str], dict[tuple[int, ...], Timed]] = {}
    for timed in (one for rank in measured for one in rank):
        groups = found.setdefault((timed.group, timed.operation), {})
        worst = groups.get(timed.ranks, timed)
        groups[timed.ranks] = Timed(
            timed.group, timed.ranks, timed.operation, max(timed.latency, worst.latency), timed.nbytes,
            max(timed.seconds, worst.seconds),
        )  # fmt: skip
    rows = []
    for (group, _), by_ranks in found.items():
        slowest = max(by_ranks.values(), key=lambda one: one.seconds)
        latency = max(one.latency for one in by_ranks.values())
        rows.append(
            Speed(group, len(slowest.ranks), slowest.operation, latency, slowest.nbytes, slowest.seconds, slowest.ranks)
        )
    return rows


def check_speeds(measured: Sequence[Sequence[Timed]], on_gpus: bool, hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Groups that are much slower than others of their kind, and rates that no NVLink or InfiniBand would have."""
    rows = speeds(measured)
    for speed in rows:
        same = {one.ranks: one.seconds for rank in measured for one in rank if _is_of(one, speed)}
        middle = statistics.median(same.values())
        if len(same) > 2 and speed.seconds > 2 * middle and speed.operation == "all-reduce":
            where = ", ".join(dict.fromkeys(hosts[rank] for rank in speed.slowest))
            text = (
                f"ranks {_span(speed.slowest)} ({where}) take {speed.seconds / middle:.1f} times the middle one's time"
            )
            remedy = f"look at {where}: other work there, a link that is down (nvidia-smi nvlink -s, ibstat), a hot GPU"
            yield _found(speed.group, "note", text, remedy, {"ranks": speed.slowest})
        if on_gpus and speed.operation == "all-reduce":
            crosses = len({hosts[rank] for rank in speed.slowest}) > 1
            least, link = (SLOW_NETWORK, "InfiniBand or RoCE") if crosses else (SLOW_HOST, "NVLink")
            if speed.bus < least:
                text = f"{speed.bus / 1e9:.1f} GB/s, less than {link} gives"
                remedy = f"if there is {link}: NCCL_DEBUG=INFO tells which way NCCL takes, NCCL_SOCKET_IFNAME and "
                remedy += "NCCL_IB_HCA say which it should; nvidia-smi topo -m tells what there is"
                yield _found(speed.group, "note", text, remedy, {"bus_gb_s": speed.bus / 1e9})


def _is_of(timed: Timed, speed: Speed) -> bool:
    return (timed.group, timed.operation) == (speed.group, speed.operation)


def _span(ranks: Sequence[int]) -> str:
    """Ranks in words, a run of neighbours as its ends."""
    run = len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]} to {ranks[-1]}" if run else ", ".join(map(str, ranks))
