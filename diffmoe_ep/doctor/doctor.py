"""What would keep a run from working here, or make it slow: this host, and under a launcher all hosts and what lies
between them.

Order matters, since a process group waits in silence for a pair of ranks that cannot reach each other:

1. Each rank comes to the first one's store and says who it is; who does not come is known by number.
2. One rank of each host looks at its host.
3. Hosts connect to each other with plain sockets: pairs that fail are named, and clocks are compared.
4. Only then do the ranks join, exchange a number pair by pair, and time collectives. Each of these has a time after
   which the first rank says who is stuck, and all leave.
"""

import json
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.doctor import devices, host, network, software
from diffmoe_ep.doctor.finding import Finding, Report, Speed, looked
from diffmoe_ep.doctor.needs import Needs, check_config, check_folders, needs_of
from diffmoe_ep.doctor.reach import Contact, Listener, contacts, skew
from diffmoe_ep.doctor.speed import Timed, check_speeds, groups_of, measure, speeds
from diffmoe_ep.parallel.links import Tried, accused, host_groups, try_pairs
from diffmoe_ep.parallel.meeting import Meeting
from diffmoe_ep.parallel.mesh import Mesh, destroy_mesh, init_mesh, launched_rank, launched_world, local_rank, variables
from diffmoe_ep.train.preflight import check_shared
from diffmoe_ep.train.run_lock import holder

CONNECT_SECONDS = 5.0  # between two hosts
LOOK_SECONDS = 120.0  # that looking at a host may take, imports from a busy network disk included
CLOCK_NOTE, CLOCK_PROBLEM = 1.0, 5.0  # seconds between clocks
SHOWN_PAIRS = 8

_found = partial(Finding, "communication")


@dataclass(frozen=True)
class Patient:
    """What is looked at."""

    config: Config | None = None
    folder: Path | None = None  # the run folder, where one is given
    device: str | None = None  # cpu or cuda; None: GPUs where there are some
    seconds: float = 30.0  # longest wait for a peer

    @property
    def kind(self) -> str:
        """Where ranks compute."""
        wants_cpu = variables("DS_ACCELERATOR").get("DS_ACCELERATOR") == "cpu"
        return self.device or ("cuda" if torch.cuda.is_available() and not wants_cpu else "cpu")


@dataclass(frozen=True)
class Guest:
    """What a rank says of itself when it comes."""

    name: str  # its host's
    key: str  # which tells hosts apart, also those of one name
    local: int  # its number on the host
    gpus: int  # that it sees; 0 where it computes on the CPU


def run(patient: Patient, as_json: bool) -> None:
    """The verb: the first rank prints the report; exit code 1, on every rank, if there is a problem."""
    started = time.monotonic()

    def show(report: Report) -> None:
        width = shutil.get_terminal_size((100, 24)).columns
        print(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines(width)), flush=True)

    if launched_world() == 1:
        report = examine_host(patient, started)
        show(report)
        is_well = report.is_well
    else:
        is_well = examine_hosts(patient, started, show)
    if not is_well:
        sys.exit(1)


def examine_host(patient: Patient, started: float) -> Report:
    """This host alone, for a run of one process."""
    name = platform.node()
    findings = tuple(replace(one, host=name) for one in _host_findings(patient, 1, 1, several=False))
    return Report(findings, (name,), 1, time.monotonic() - started)


def _host_findings(patient: Patient, world: int, here: int, several: bool) -> Iterator[Finding]:
    """All that one process can see of its host. here: ranks on it; several: the run has other hosts, too."""
    said = variables("")
    device = torch.device(patient.kind)
    config, needs = patient.config, Needs()
    if config is not None:
        needs = needs_of(config, world, device.type)
    on_gpus = device.type == "cuda"
    adapters = devices.adapters()
    yield from looked(
        "software",
        (
            ("versions", software.versions),
            ("training", software.imports),
            ("providers", lambda: software.providers(device)),
        ),
    )
    yield from looked(
        "devices",
        (
            ("GPUs", lambda: devices.gpus(needs.memory if on_gpus else 0)),
            ("NCCL", lambda: devices.nccl(said, adapters)),
            ("InfiniBand", devices.infiniband),
        ),
    )
    threads = said.get("OMP_NUM_THREADS", "")
    yield from looked(
        "host",
        (
            ("cores", lambda: host.cores(int(threads) if threads.isdigit() else 0, here)),
            ("memory", lambda: host.memory(0 if on_gpus else needs.memory, here)),
            ("shared memory", lambda: host.shared_memory(needs.batches * here)),
            ("limits", lambda: host.limits(bool(adapters))),
            ("build locks", lambda: host.build_locks(build_folders(said))),
            ("temporary disk", lambda: host.disk("temporary disk", Path(said.get("TMPDIR", "/tmp")))),
        ),
    )
    known = network.interfaces()
    port = said.get("MASTER_PORT", "")
    yield from looked(
        "network",
        (
            ("interfaces", lambda: network.check_interfaces(known, said)),
            ("own name", lambda: network.check_names(platform.node(), several, said, network.resolved)),
            ("port", lambda: () if world > 1 else network.check_port(int(port) if port.isdigit() else network.PORT)),
            ("variables", lambda: network.check_variables(_watched(said))),
        ),
    )
    if patient.folder is not None:
        folder = patient.folder
        yield from looked(
            "run folder",
            (
                ("run folder", lambda: host.writable(folder)),
                ("disk", lambda: host.disk("disk", folder, needs.checkpoints, "checkpoints to come")),
                ("in use", lambda: in_use(folder)),
            ),
        )
    if config is not None:
        launched = world > 1
        yield from looked(
            "this config",
            (
                ("config", lambda: check_config(config, needs, world, launched)),
                ("packages", lambda: software.extras(dict(needs.packages))),
                ("folders", lambda: check_folders(config)),
                ("cache", lambda: host.disk("cache", Path(config.data.cache), needs.cache) if needs.cache else ()),
            ),
        )


def build_folders(said: Mapping[str, str]) -> list[Path]:
    """Where torch and DeepSpeed compile what they load."""
    named = said.get("TORCH_EXTENSIONS_DIR")
    cache = Path(said.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return list(dict.fromkeys([*([Path(named)] if named else []), cache / "torch_extensions"]))


def in_use(folder: Path) -> Iterator[Finding]:
    """Whether a training has the run folder."""
    found = Finding("run folder", "in use", "ok", "by no training")
    if (who := holder(folder)) is not None and who.is_alive:
        told = f"process {who.process} on {who.host} has trained there since {who.since}"
        remedy = "wait for its end, stop it, or give another folder"
        found = replace(found, state="note", found=told, remedy=remedy)
    yield found


def _watched(said: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in said.items() if name.startswith(network.WATCHED)}


# -- over hosts --------------------------------------------------------------------------------------------------------


def examine_hosts(patient: Patient, started: float, show: Callable[[Report], None]) -> bool:
    """All hosts of a launcher's ranks, every one of which calls this; the first one shows the report. Whether all is
    well, on every rank alike.
    """
    world, rank = launched_world(), launched_rank()
    try:
        meeting = Meeting.join(patient.seconds)
    except ConfigError as error:
        if local_rank() == 0:
            print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
        time.sleep(patient.seconds if rank else 0)  # a launcher ends all its ranks once one has left
        sys.exit(1)
    visit = Visit(patient, meeting, started, show)
    visit.come()
    visit.look_at_hosts()
    if visit.complete and visit.reach():
        visit.join()
    is_well = not any(finding.state == "problem" for finding in visit.findings)
    verdict = meeting.gather(is_well)[0]
    if rank == 0:
        show(visit.report())
    if visit.stuck:
        _leave()
    destroy_mesh()
    assert isinstance(verdict, bool) and world == meeting.world
    return verdict


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
                    f"{_listed(away)} of {self.meeting.world} did not come to {place} within {self.patient.seconds:g} s",
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
            mine = [asdict(one) for one in _host_findings(self.patient, self.meeting.world, here, several)]
        for speaker, said in self.meeting.collect(mine, LOOK_SECONDS).items():
            if speaker in self.speakers:
                name = self.names[speaker]
                self.findings += [Finding(**one | {"host": name}) for one in said]
        if self.is_first and several:
            self.findings += _differences(self.findings)

    # 3. who reaches whom

    def reach(self) -> bool:
        """Connect every host with every other; whether all can, on every rank alike."""
        rank = self.meeting.rank
        said, listeners, problem = variables("GLOO_", "NCCL_"), list[Listener](), ""
        mine: dict[str, Any] = {}
        if rank in self.speakers and len(self.speakers) > 1:
            known, on_gpus = network.interfaces(), self.patient.kind == "cuda"
            word = secrets.token_hex(8)
            for address, purpose in network.listening_addresses(
                known, said, platform.node(), on_gpus, network.resolved
            ).items():
                try:
                    listeners.append(Listener(address, word).__enter__())
                except OSError as error:
                    problem = f"{address}, where {purpose} will listen, is not this host's ({error.strerror})"
                else:
                    mine[address] = (listeners[-1].port, word, purpose)
        places = self.meeting.gather({"places": mine, "problem": problem})
        targets = {
            f"{other} {address}": (address, port, word)
            for other in self.speakers
            if other != rank and rank in self.speakers
            for address, (port, word, _) in places[other]["places"].items()
        }
        tried = {name: asdict(one) for name, one in contacts(targets, CONNECT_SECONDS).items()} if targets else {}
        wait = self.patient.seconds + CONNECT_SECONDS * (1 + len(targets) // 16)
        came = self.meeting.gather(tried, wait)
        for listener in listeners:
            listener.__exit__()
        unable = {other: place["problem"] for other, place in places.items() if place["problem"]}
        made = {
            (one, int(name.split()[0]), name.split()[1]): Contact(**contact)
            for one, its in came.items()
            for name, contact in its.items()
        }
        failed = {key: one.problem for key, one in made.items() if one.problem}
        if self.is_first and len(self.speakers) > 1:
            purposes = {
                (other, address): place[2]
                for other in self.speakers
                for address, place in places[other]["places"].items()
            }
            self.findings += self._reached(made, failed, unable, purposes)
            self.findings += self._clocks(made)
        return not failed and not unable

    def _reached(
        self,
        made: Mapping[tuple[int, int, str], Contact],
        failed: Mapping[tuple[int, int, str], str],
        unable: Mapping[int, str],
        purposes: Mapping[tuple[int, str], str],
    ) -> Iterator[Finding]:
        for rank, problem in unable.items():
            remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or give the host its address in /etc/hosts"
            yield _found("address", "problem", problem, remedy, host=self.names[rank])
        for one, other, address in list(failed)[:SHOWN_PAIRS]:
            reason = failed[one, other, address]
            text = (
                f"{self.names[one]} does not reach {self.names[other]} at {address}, where {purposes[other, address]} "
            )
            text += f"listens: {reason}"
            values = {"from": one, "to": other, "address": address, "reason": reason}
            yield _found("pair of hosts", "problem", text, _remedy(reason, address), values)
        if len(failed) > SHOWN_PAIRS:
            rest = sorted({f"{self.names[one]} to {self.names[other]}" for one, other, _ in list(failed)[SHOWN_PAIRS:]})
            text = f"{len(failed) - SHOWN_PAIRS} more ways fail: {', '.join(rest[:SHOWN_PAIRS])}"
            yield _found("pair of hosts", "problem", text, "mend the first ones first", {"failed": len(failed)})
        if not failed and not unable:
            slowest = max(made, key=lambda key: made[key].seconds)
            text = (
                f"each of {len(self.speakers)} reaches each other, in {made[slowest].seconds * 1e6:,.0f} us there and "
            )
            text += f"back at most ({self.names[slowest[0]]} to {self.names[slowest[1]]})"
            yield _found("hosts", "ok", text, values={"seconds": made[slowest].seconds})
        else:
            text = "ranks do not join: they would wait for those pairs"
            yield _found("collectives", "note", f"not measured; {text}", "mend what is named above, and start again")

    def _clocks(self, made: Mapping[tuple[int, int, str], Contact]) -> Iterator[Finding]:
        """From what the first host saw of the others' clocks."""
        first = self.speakers[0]
        seen = {other: one for (asked, other, _), one in made.items() if asked == first and not one.problem}
        if not seen:
            return
        ranks, ahead = [first, *seen], [0.0, *(one.ahead for one in seen.values())]
        number, by = skew(ahead)
        exact = max(one.seconds for one in seen.values()) / 2
        who = self.names[ranks[number]]
        values = {"ahead_seconds": {self.names[rank]: one for rank, one in zip(ranks, ahead, strict=True)}}
        text = f"that of {who} is {abs(by):.3g} s {'ahead of' if by > 0 else 'behind'} the others"
        remedy = (
            f"let {who} follow the others' clock (chrony or ntpd: timedatectl set-ntp true): launchers and locks of "
        )
        remedy += "run folders go by it"
        if abs(by) > CLOCK_NOTE:
            yield _found("clocks", "problem" if abs(by) > CLOCK_PROBLEM else "note", text, remedy, values)
        else:
            yield _found("clocks", "ok", f"within {max(abs(by), exact) * 1e3:.2g} ms", values=values)

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
        tried = self._phase("pairs of ranks", lambda: try_pairs(mesh, min(10.0, patient.seconds)), factor=4)
        all_tried = self.meeting.gather(None if tried is None else [list(tried.failed.items()), tried.rounds])
        known = [Tried(dict(said[0]), said[1]) if said else Tried({}, 0) for said in all_tried.values()]
        bad = accused(known)
        if self.is_first:
            self.findings += _pairs(bad, hosts, world)
        if tried is None or bad or any(one.failed for one in known) or len(known) < world:
            self.stuck = True
            return
        groups = self._phase("groups", lambda: host_groups(mesh, list(hosts.values()), minutes))
        if groups is None:
            return
        timed = self._phase("collectives", lambda: measure(mesh, groups_of(mesh, *groups)), factor=4)
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

    def _phase(self, name: str, act: Callable[[], Any], factor: float = 2.0) -> Any:
        """What every rank does together; None, on this rank, where it fails. If it does not end in time, the first rank
        shows what is known and says who is stuck, and all leave.
        """
        problem, result = "", None
        with self._guard(name, self.patient.seconds * factor):
            try:
                result = act()
            except (ConfigError, RuntimeError) as error:
                problem = str(error).splitlines()[0] or type(error).__name__
        said = self.meeting.gather(problem, self.patient.seconds * factor)
        wrong = {rank: text for rank, text in said.items() if text}
        away = [rank for rank in range(self.meeting.world) if rank not in said]
        if self.is_first and (wrong or away):
            rank = next(iter(wrong or away))
            text = f"rank {rank} on {self.host_of(rank)}: {wrong.get(rank, 'does not come out of it')}"
            text += f" (and {len(wrong) + len(away) - 1} more ranks)" if len(wrong) + len(away) > 1 else ""
            self.findings.append(_found(name, "problem", text, STUCK_REMEDY, {"ranks": [*wrong, *away]}))
        if away:
            self.stuck = True
        return None if wrong or away else result

    @contextmanager
    def _guard(self, name: str, seconds: float) -> Iterator[None]:
        def give_up() -> None:
            if self.is_first:
                text = f"ranks do not come out of it in {seconds:g} s"
                self.findings.append(_found(name, "problem", text, STUCK_REMEDY))
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
    "start again with NCCL_DEBUG=INFO and see the last line of each rank; on CPUs set GLOO_SOCKET_IFNAME to the interface "
    "that leads to the other hosts"
)


def _leave() -> NoReturn:
    """End at once: transfers that hang would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _pairs(bad: Mapping[tuple[int, int], str], hosts: Mapping[int, str], world: int) -> Iterator[Finding]:
    for (low, high), reason in list(bad.items())[:SHOWN_PAIRS]:
        text = f"ranks {low} ({hosts[low]}) and {high} ({hosts[high]}): {reason}"
        remedy = "look at the link between them: nvidia-smi topo -m on one host, ibstat and the firewall between two"
        yield _found("pair of ranks", "problem", text, remedy, {"ranks": [low, high], "reason": reason})
    if len(bad) > SHOWN_PAIRS:
        text = f"{len(bad) - SHOWN_PAIRS} more do not reach each other"
        yield _found("pair of ranks", "problem", text, "mend the first ones first", {"failed": len(bad)})
    if not bad:
        pairs = world * (world - 1) // 2
        yield _found("pairs of ranks", "ok", f"{pairs} of {pairs} exchanged a number", values={"pairs": pairs})


def _differences(findings: Sequence[Finding]) -> Iterator[Finding]:
    """What should be the same on all hosts and is not: versions, variables, devices."""
    for name, only in (("packages", None), ("torch", ("cuda",)), ("GPUs", ("gpus", "driver")), ("variables", None)):
        by_host = {one.host: one.values for one in findings if one.name == name and one.host}
        keys = only or sorted({key for values in by_host.values() for key in values if key not in PER_HOST})
        for key in keys:
            said: dict[str, list[str]] = {}
            for where, values in by_host.items():
                said.setdefault(str(values.get(key, "not set")), []).append(where)
            if len(said) > 1:
                text = "; ".join(f"{value} on {', '.join(hosts[:4])}" for value, hosts in said.items())
                if name == "variables":
                    remedy = (
                        f"export {key} before launch/deepspeed.sh, which hands it to all hosts, or unset it everywhere"
                    )
                    yield _found(key, "note", text, remedy, {"by_host": said})
                elif name == "GPUs":
                    remedy = "let all hosts of a run have as many GPUs and one driver"
                    yield _found(f"{key} of hosts", "note", text, remedy, {"by_host": said})
                else:
                    remedy = "let all hosts use one environment, on a shared disk or from one image"
                    yield _found(f"{key} of hosts", "problem", text, remedy, {"by_host": said})


PER_HOST = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # may differ


def _remedy(reason: str, address: str) -> str:
    if network.is_loopback(address):
        return "set GLOO_SOCKET_IFNAME to the interface that leads to the other hosts, or mend /etc/hosts there"
    if "another" in reason:
        return f"{address} means another host there: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to an interface with "\
            "addresses of its own on each host (not docker0)"  # fmt: skip
    if "refused" in reason or "no answer" in reason or "filtered" in reason:
        return "open all ports between the hosts of a run (NCCL and gloo choose theirs), or choose another network with "\
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"  # fmt: skip
    return "see ip route on both; choose a network that both are in with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"


def _host_key() -> str:
    """What tells hosts apart, also containers of one machine, which have networks of their own."""
    boot, network_of = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    parts = [platform.node()]
    parts += [boot.read_text(encoding="ascii").strip()] if boot.is_file() else []
    parts += [str(network_of.stat().st_ino)] if network_of.exists() else []
    return " ".join(parts)


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:16]))}{', ...' * (len(ranks) > 16)}"
