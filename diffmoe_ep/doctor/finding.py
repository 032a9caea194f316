"""What a check found, and all of it as a page to read or as JSON."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from diffmoe_ep.tables import table

State = Literal["ok", "note", "problem"]
Operation = Literal["all-reduce", "all-to-all"]
SECTIONS = ("software", "devices", "host", "network", "run folder", "this config", "communication")
SCHEMA = 1  # of the JSON: rises when a field changes its meaning or goes
NARROWEST, WIDEST = 80, 100  # columns of the page


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str  # where it stands on the page
    name: str  # what was looked at
    state: State  # problem: a run fails, hangs or is wrong; note: it may, or is slower than it could be
    found: str  # what is there, in words
    remedy: str = ""  # what to do about it; always there unless the state is ok
    values: Mapping[str, Any] = field(default_factory=dict)  # the same in numbers, for programs
    host: str = ""  # where, when there are several hosts; "" for what concerns all of them

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.remedy, self


@dataclass(frozen=True)
class Speed:
    """One collective over one kind of group; of the groups of a kind the slowest."""

    group: str  # which ranks
    ranks: int  # of each group
    operation: Operation
    latency: float  # seconds of one with 8 bytes for each rank
    nbytes: int  # that each rank gave to the large one
    seconds: float  # of the large one, by the slowest rank
    slowest: tuple[int, ...]  # ranks of the group that was slowest

    @property
    def algorithm(self) -> float:
        """Bytes per second as the caller sees them: what each rank gave, by the time."""
        return self.nbytes / self.seconds

    @property
    def bus(self) -> float:
        """Bytes per second that each rank's link carried one way, which compares with the link's own speed: of an
        all-reduce 2 (n-1)/n of what it gave, of an all-to-all (n-1)/n.
        """
        factor = {"all-reduce": 2, "all-to-all": 1}[self.operation]
        return self.algorithm * factor * (self.ranks - 1) / self.ranks

    def as_dict(self) -> dict[str, Any]:
        """As plain data, with units in the names."""
        return {
            "group": self.group,
            "ranks": self.ranks,
            "operation": self.operation,
            "latency_us": self.latency * 1e6,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "algorithm_gb_s": self.algorithm / 1e9,
            "bus_gb_s": self.bus / 1e9,
            "slowest_ranks": list(self.slowest),
        }


@dataclass(frozen=True)
class Report:
    """All that was found."""

    findings: tuple[Finding, ...]
    hosts: tuple[str, ...]
    ranks: int
    seconds: float  # that it took
    speeds: tuple[Speed, ...] = ()

    def of(self, state: State) -> list[Finding]:
        """The findings in one state."""
        return [finding for finding in self.findings if finding.state == state]

    @property
    def is_well(self) -> bool:
        """Whether there is no problem."""
        return not self.of("problem")

    def as_dict(self) -> dict[str, Any]:
        """As plain data; the room's README says what each field is."""
        return {
            "schema": SCHEMA,
            "well": self.is_well,
            "problems": len(self.of("problem")),
            "notes": len(self.of("note")),
            "hosts": list(self.hosts),
            "ranks": self.ranks,
            "seconds": round(self.seconds, 3),
            "checks": [asdict(finding) | {"host": finding.host or None} for finding in self.findings],
            "speeds": [speed.as_dict() for speed in self.speeds],
        }

    def lines(self, width: int = WIDEST) -> list[str]:
        """As a page: everything by section, then the notes and last the problems with their remedies."""
        width = min(max(width, NARROWEST), WIDEST)
        merged = list(_merged(self.findings, self.hosts))
        page = [_title(self.hosts, self.ranks)]
        for section in sorted({finding.section for finding in merged}, key=SECTIONS.index):
            rows = [finding for finding in merged if finding.section == section]
            page += ["", section]
            for finding in rows:
                page += _entry(MARKS[finding.state], finding.name, finding.found, width)
        if self.speeds:
            page += ["", *_speed_lines(self.speeds)]
        for state, heading in (("note", "notes"), ("problem", "PROBLEMS")):
            listed = [finding for finding in merged if finding.state == state]
            if listed:
                page += ["", f"{heading}, and what to do"]
            for number, finding in enumerate(listed, 1):
                page += _entry(f"{number}.", finding.name, finding.found, width)
                page += _entry("", "", f"-> {finding.remedy}", width, further=3)
        return [*page, "", self._sum(merged)]

    def _sum(self, merged: Sequence[Finding]) -> str:
        checks = f"{len(self.findings)} checks on {_counted(len(self.hosts), 'host')} in {self.seconds:.1f} s"
        counts = [(state, sum(finding.state == state for finding in merged)) for state in ("problem", "note")]
        said = ", ".join(_counted(number, word) for word, number in counts if number)
        return f"{checks}: {said or 'all is well'}"


MARKS: dict[State, str] = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def looked(section: str, checks: Iterable[tuple[str, Callable[[], Iterable[Finding]]]]) -> Iterator[Finding]:
    """The findings of checks by name; one that the system does not let look is a note, and the others go on."""
    for name, check in checks:
        try:
            yield from check()
        except OSError as error:
            yield Finding(
                section, name, "note", f"could not be looked at ({error})", "look at it yourself, as a user who may"
            )


def _title(hosts: Sequence[str], ranks: int) -> str:
    if len(hosts) == 1:
        return f"diffmoe doctor: {_counted(ranks, 'process', 'es')} on {hosts[0]}"
    named = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"diffmoe doctor: {ranks} ranks on {len(hosts)} hosts: {named}"


def _merged(findings: Sequence[Finding], hosts: Sequence[str]) -> Iterator[Finding]:
    """One row for what several hosts have in common: of what is well the first host's, of the rest each wording."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        told_apart = ("",) if one.state == "ok" else (one.found, one.remedy)
        groups.setdefault((one.section, one.name, one.state, *told_apart), []).append(one)
    for group in groups.values():
        first, wordings = group[0], {one.found for one in group}
        if not first.host or len(hosts) == 1:
            yield from group
        elif len(group) == len(hosts):
            end = "" if len(wordings) == 1 else f" ({first.host}; others likewise)"
            everywhere = "" if first.state == "ok" else "on all hosts: "
            yield replace(first, found=everywhere + first.found + end)
        else:
            where = ", ".join(one.host for one in group[:4]) + (f" and {len(group) - 4} more" * (len(group) > 4))
            yield replace(first, found=f"{where}: {first.found}")


def _entry(mark: str, name: str, text: str, width: int, further: int = 0) -> list[str]:
    """A row of the page, its text wrapped below itself; further: by how much more its later lines are set in."""
    head = f"  {mark:<7}  {name:<17}  "
    if name and len(name) > 17:
        return [f"  {mark:<7}  {name}", *_entry("", "", text, width, further)]
    return textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=" " * (len(head) + further), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _speed_lines(speeds: Sequence[Speed]) -> list[str]:
    rows: list[tuple[str, ...]] = [("collectives", "ranks", "latency", "bus GB/s", "latency", "bus GB/s")]
    for group in dict.fromkeys(speed.group for speed in speeds):
        both = {speed.operation: speed for speed in speeds if speed.group == group}
        cells = [
            cell
            for operation in ("all-reduce", "all-to-all")
            for cell in (f"{both[operation].latency * 1e6:,.0f} us", f"{both[operation].bus / 1e9:,.2f}")
        ]
        rows.append((group, str(both["all-reduce"].ranks), *cells))
    lines = table(rows, "<>", groups=(("", 2), ("all-reduce", 2), ("all-to-all", 2)))
    sent = speeds[0].nbytes / 2**20
    return [*lines, f"bus GB/s: one way over a link, {sent:.3g} MiB a rank; the slowest group of a kind"]


def _counted(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{plural * (number != 1)}"
