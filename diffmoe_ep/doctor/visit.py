"""All hosts of a launcher's ranks, and what lies between them.


Order matters, since a process group waits in silence for a pair of ranks that cannot reach each other:

1. Each rank comes to the first one's store and says who it is; who does not come is known by number.
2. One rank of each host looks at its host.
3. Hosts connect to each other with plain sockets: pairs that fail are named, and clocks are compared.
4. Only then do the ranks join, exchange a number pair by pair, and time collectives. Each of these has a time after
   which the first rank says who is stuck, and all leave.
"""

import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.doctor import host, network
from diffmoe_ep.doctor.between import clocks, differences, listed, pairs, reached
from diffmoe_ep.doctor.examine import Patient, host_findings
from diffmoe_ep.doctor.finding import Finding, Report, Speed
from diffmoe_ep.doctor.reach import AT_ONCE, Contact, Listener, contacts
from diffmoe_ep.doctor.speed import Timed, check_speeds, groups_of, measure, speeds
from diffmoe_ep.parallel.links import Tried, accused, host_groups, try_pairs
from diffmoe_ep.parallel.meeting import Meeting
from diffmoe_ep.parallel.mesh import Mesh, destroy_mesh, init_mesh, launched_rank, launched_world, local_rank, variables
from diffmoe_ep.train.preflight import check_shared

CONNECT_SECONDS = 5.0  # between two hosts
LOOK_SECONDS = 120.0  # that looking at a host may take, imports from a busy network disk included
_found = partial(Finding, "communication")


@dataclass(frozen=True)
class Guest:
    """What a rank says of itself when it comes."""

    name: str  # its host's
    key: str  # which tells hosts apart, also those of one name
    local: int  # its number on the host
    gpus: int  # that it sees; 0 where it computes on the CPU


def examine_hosts(patient: Patient, started: float, show: Callable[[Report], None]) -> bool:
    """All hosts of a launcher's ranks, every one of which calls this; the first one shows the report. Whether all is
    well, on every rank alike.
    """
    rank = launched_rank()
    try:
        visit = Visit(patient, Meeting.join(patient.seconds), started, show)
        visit.come()
        visit.look_at_hosts()
        if visit.complete and visit.reach():
            visit.join()
        report = visit.report()
        if rank == 0:
            show(report)  # before the others leave: a launcher ends all its ranks once one has left with an error
        is_well = visit.meeting.gather(report.is_well)[0]
        visit.meeting.part()
    except ConfigError as error:  # of this rank alone: the first one does not know why it is missing
        if rank == 0 or local_rank() == 0:
            print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
        time.sleep(patient.seconds if rank else 0)  # for the first one to speak
        sys.exit(1)
    if visit.stuck:
        _leave()
    destroy_mesh()
    assert isinstance(is_well, bool) and visit.meeting.world == launched_world()
    return is_well


class Visit:
    """One examination of all hosts; findings gather on the first rank."""

    def __init__(self, patient: Patient, meeting: Meeting, started: float, show: Callable[[Report], None]) -> None:
        self.patient, self.meeting, self.started, self.show = patient, meeting, started, show
        self.findings: list[Finding] = []
        self.speeds: list[Speed] = []
        self.guests: dict[int, Guest] = {}
        self.stuck = False  # transfers hang, so that leaving in order would wait for them

    @property
    def is_first(self) -> bool:
        """Whether this rank makes the report."""
        return self.meeting.rank == 0

    @property
    def complete(self) -> bool:
        """Whether all ranks have come, each with a device of its own."""
        return len(self.guests) == self.meeting.world and not self._without_gpu()

    @property
    def speakers(self) -> list[int]:
        """The first rank of each host."""
        keys = [guest.key for guest in self.guests.values()]
        return [list(self.guests)[keys.index(key)] for key in dict.fromkeys(keys)]

    @property
    def names(self) -> dict[int, str]:
        """For each speaker what its host is called here; hosts of one name are told apart by the rank."""
        given = [self.guests[rank].name for rank in self.speakers]
        return {
            rank: name if given.count(name) == 1 else f"{name} (rank {rank})"
            for rank, name in zip(self.speakers, given, strict=True)
        }

    def host_of(self, rank: int) -> str:
        """What a rank's host is called."""
        return next(self.names[one] for one in self.speakers if self.guests[one].key == self.guests[rank].key)

    def report(self) -> Report:
        """All that is known by now."""
        seconds = time.monotonic() - self.started
        return Report(tuple(self.findings), tuple(self.names.values()), self.meeting.world, seconds, tuple(self.speeds))

    # 1. who is there

    def come(self) -> None:
        """Say who this rank is, and learn who the others are."""
        gpus = torch.cuda.device_count() if self.patient.kind == "cuda" else 0
        mine = Guest(platform.node(), _host_key(), local_rank(), gpus)
        came = self.meeting.gather(asdict(mine))
        self.guests = {rank: Guest(**said) for rank, said in came.items()}
        if not self.is_first:
            return
        away = [rank for rank in range(self.meeting.world) if rank not in self.guests]
        said = variables("MASTER_")
        place = f"{said.get('MASTER_ADDR')}:{said.get('MASTER_PORT')}"
        if away:
            self.findings.append(
                _found(
                    "ranks",
                    "problem",
                    f"{listed(away)} of {self.meeting.world} did not come to {place} within {self.patient.seconds:g} s",
                    "see what they print; let the firewall open that port, or give an address that all hosts reach "
                    "with --master-addr",
                    {"missing": away},
                )
            )
        else:
            self.findings.append(_found("ranks", "ok", f"all {self.meeting.world} came to {place}"))
        names = [self.guests[rank].name for rank in self.speakers]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            remedy = (
                "give each host a name of its own (hostnamectl set-hostname): ranks of one name count as one host's"
            )
            self.findings.append(_found("names of hosts", "note", f"several are called {', '.join(twice)}", remedy))
        if lacking := self._without_gpu():
            remedy = "start at most one rank per GPU, or set DS_ACCELERATOR=cpu to run on the CPU"
            text = f"rank {lacking[0]} on {self.host_of(lacking[0])} is number {self.guests[lacking[0]].local} there, "
            text += f"which has {self.guests[lacking[0]].gpus} GPUs"
            self.findings.append(_found("devices", "problem", text, remedy, {"ranks": lacking}))

    def _without_gpu(self) -> list[int]:
        on_gpus = any(guest.gpus for guest in self.guests.values())
        return [rank for rank, guest in self.guests.items() if on_gpus and guest.local >= guest.gpus]

    # 2. what each host has

    def look_at_hosts(self) -> None:
        """One rank of each host looks at it; what differs between hosts and should not is a finding of its own."""
        rank, several = self.meeting.rank, len(self.speakers) > 1
        mine: list[dict[str, Any]] = []
        if rank in self.speakers:
            here = sum(guest.key == self.guests[rank].key for guest in self.guests.values())
            mine = [asdict(one) for one in host_findings(self.patient, self.meeting.world, here, several)]
        for speaker, said in self.meeting.collect(mine, LOOK_SECONDS).items():
            if speaker in self.speakers:
                name = self.names[speaker]
                self.findings += [Finding(**one | {"host": name}) for one in said]
        if self.is_first and several:
            self.findings += differences(self.findings)

    # 3. who reaches whom

    def reach(self) -> bool:
        """Connect every host with every other; whether all can, on every rank alike."""
        with ExitStack() as listening:
            places, problem = self._listen(listening)
            said = self.meeting.gather({"places": places, "problem": problem})
            if self._lost(said):
                return False
            targets = {
                f"{other} {address}": (address, port, word)
                for other in self.speakers
                if other != self.meeting.rank and self.meeting.rank in self.speakers
                for address, (port, word, _) in said[other]["places"].items()
            }
            mine = {name: asdict(one) for name, one in contacts(targets, CONNECT_SECONDS).items()}
            came = self.meeting.gather(mine, self.patient.seconds + CONNECT_SECONDS * (1 + len(targets) // AT_ONCE))
        if self._lost(came):
            return False
        made = {
            (one, int(name.split()[0]), name.split()[1]): Contact(**contact)
            for one, its in came.items()
            for name, contact in its.items()
        }
        unable = {other: place["problem"] for other, place in said.items() if place["problem"]}
        if self.is_first and len(self.speakers) > 1:
            purposes = {
                (other, address): place[2]
                for other in self.speakers
                for address, place in said[other]["places"].items()
            }
            self.findings += reached(made, unable, purposes, self.names)
            self.findings += clocks(made, self.names)
        return not unable and not any(one.problem for one in made.values())

    def _listen(self, listening: ExitStack) -> tuple[dict[str, tuple[int, str, str]], str]:
        """Listen where this host's ranks will: by address the port, the word to answer with, and who will listen
        there; and why that cannot be done. Nothing on ranks that do not speak for their host.
        """
        places: dict[str, tuple[int, str, str]] = {}
        if self.meeting.rank not in self.speakers or len(self.speakers) == 1:
            return places, ""
        known, said, problem = network.interfaces(), variables("GLOO_", "NCCL_"), ""
        word, on_gpus = secrets.token_hex(8), self.patient.kind == "cuda"
        addresses = network.listening_addresses(known, said, platform.node(), on_gpus, network.resolved)
        for address, purpose in addresses.items():
            try:
                places[address] = listening.enter_context(Listener(address, word)).port, word, purpose
            except OSError as error:
                problem = f"{address}, where {purpose} will listen, is not this host's ({error.strerror})"
        return places, problem

    def _lost(self, said: Mapping[int, Any]) -> bool:
        """Whether ranks that had come have left since."""
        gone = [rank for rank in self.guests if rank not in said]
        if gone and self.is_first:
            text = f"{listed(gone)} came, and left or fell silent before all were done"
            self.findings.append(_found("ranks", "problem", text, "see what they print", {"missing": gone}))
        return bool(gone)

    # 4. all together

    def join(self) -> None:
        """Join the ranks, and measure what only they together show."""
        patient, world = self.patient, self.meeting.world
        hosts = {rank: self.host_of(rank) for rank in self.guests}
        minutes = max(1.0, 4 * patient.seconds / 60)
        expert = self._expert()
        mesh = self._phase("process group", lambda: init_mesh(expert, 1, minutes, patient.kind))
        if mesh is None:
            return
        folder = patient.folder
        if folder is not None and len(self.speakers) > 1:
            self._phase("shared folder", lambda: self._shared(folder, mesh))
        most = 4 * patient.seconds + 0.2 * world  # each broken pair stops two ranks, who stop two each, and so on
        tried = self._phase("pairs of ranks", lambda: try_pairs(mesh, min(10.0, patient.seconds)), most)
        all_tried = self.meeting.gather(None if tried is None else [list(tried.failed.items()), tried.rounds])
        known = [Tried(dict(said[0]), said[1]) if said else Tried({}, 0) for said in all_tried.values()]
        bad = accused(known)
        if self.is_first:
            self.findings += pairs(bad, hosts, world)
        if tried is None or bad or any(one.failed for one in known) or len(known) < world:
            self.stuck = True
            return
        groups = self._phase("groups", lambda: host_groups(mesh, list(hosts.values()), minutes))
        if groups is None:
            return
        timed = self._phase("collectives", lambda: measure(mesh, groups_of(mesh, *groups)), 4 * patient.seconds)
        rows = self.meeting.collect([asdict(one) for one in timed or ()], patient.seconds)
        measured = [[Timed(**one | {"ranks": tuple(one["ranks"])}) for one in said] for said in rows.values()]
        if self.is_first and measured:
            self.speeds = speeds(measured)
            self.findings += check_speeds(measured, mesh.device.type == "cuda", hosts)

    def _expert(self) -> int:
        """The size of an expert group: the config's, or the ranks of a host where all have as many."""
        world = self.meeting.world
        config = self.patient.config
        if config is not None:
            expert = config.parallel.expert_parallel
            return expert if world % expert == 0 else 1
        sizes = [sum(guest.key == self.guests[one].key for guest in self.guests.values()) for one in self.speakers]
        return sizes[0] if len(set(sizes)) == 1 else world

    def _shared(self, folder: Path, mesh: Mesh) -> None:
        there = [Path(said) for said in self.meeting.gather(str(host.existing(folder))).values()]
        nearest = min(there, key=lambda path: len(path.parts))  # the run folder may be yet to be made, on all hosts
        try:
            check_shared(nearest, mesh)
        except ConfigError as error:
            text, _, remedy = str(error).partition("; ")
            finding = Finding("run folder", "shared", "problem", text, remedy)
        else:
            finding = Finding("run folder", "shared", "ok", f"all hosts see {nearest}")
        if self.is_first:
            self.findings.append(finding)

    def _phase(self, name: str, act: Callable[[], Any], seconds: float | None = None) -> Any:
        """What every rank does together; None, on this rank, where it fails. If it does not end in time, the first rank
        shows what is known and says who is stuck, and all leave.
        """
        problem, result, most = "", None, seconds or 2 * self.patient.seconds
        with self._guard(name, most):
            try:
                result = act()
            except (ConfigError, RuntimeError) as error:
                problem = str(error).splitlines()[0] or type(error).__name__
        said = self.meeting.gather(problem, most)
        wrong = {rank: text for rank, text in said.items() if text}
        away = [rank for rank in range(self.meeting.world) if rank not in said]
        if self.is_first and (wrong or away):
            rank = next(iter(wrong or away))
            text = f"rank {rank} on {self.host_of(rank)}: {wrong.get(rank, 'does not come out of it')}"
            text += f" (and {len(wrong) + len(away) - 1} more ranks)" if len(wrong) + len(away) > 1 else ""
            self.findings.append(_found(name, "problem", text, STUCK_REMEDY, {"ranks": [*wrong, *away]}))
        if wrong or away:
            self.stuck = True
            return None
        return result

    @contextmanager
    def _guard(self, name: str, seconds: float) -> Iterator[None]:
        def give_up() -> None:
            if self.is_first:
                said = self.meeting.peek()
                inside = [rank for rank in range(self.meeting.world) if rank not in said]
                text = f"{listed(inside)} of {self.meeting.world} did not come out of it in {seconds:g} s"
                for rank, problem in said.items():
                    text += f"; rank {rank} on {self.host_of(rank)}: {problem}" if problem else ""
                self.findings.append(_found(name, "problem", text, STUCK_REMEDY, {"ranks": inside}))
                self.show(self.report())
            _leave()

        timer = threading.Timer(seconds if self.is_first else seconds + 5.0, give_up)  # the first one speaks first
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


STUCK_REMEDY = (
    "start again with NCCL_DEBUG=INFO and see the last line of each rank; on CPUs set GLOO_SOCKET_IFNAME to the "
    "interface that leads to the other hosts"
)


def _leave() -> NoReturn:
    """End at once: transfers that hang would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _host_key() -> str:
    """What tells hosts apart, also containers of one machine, which have networks of their own."""
    boot, network_of = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    parts = [platform.node()]
    parts += [boot.read_text(encoding="ascii").strip()] if boot.is_file() else []
    parts += [str(network_of.stat().st_ino)] if network_of.exists() else []
    return " ".join(parts)
