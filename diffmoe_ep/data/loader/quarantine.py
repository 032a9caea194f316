"""The list of stored samples whose bytes are bad: each rank appends to a file of its own, and a reader joins them.

    quarantine-rank3.jsonl    a line for each time that rank 3 met a bad sample: shard, key, reason, position, and what
                              was read in its place
    quarantine.jsonl          a line for each bad sample: shard, key, reason, all its positions (made by `join`)

A run that goes on from a checkpoint meets some of them again; joining counts a position once.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from diffmoe_ep.config.foreign import parse_json_lines, read_bytes
from diffmoe_ep.data.manifest import DataError

NAME = "quarantine.jsonl"


@dataclass(frozen=True)
class Fault:
    """A bad sample met at a position, and the sample that took its place."""

    shard: str  # path or address of the shard
    key: str  # of the sample in it
    reason: str  # what is wrong with it
    position: int  # place in the endless stream
    substitute: str  # shard and key of the sample that was read in its place


@dataclass(frozen=True)
class BadSample:
    """A stored sample whose bytes are bad."""

    shard: str  # path or address of the shard
    key: str  # of the sample in it
    reason: str  # what is wrong with it
    positions: tuple[int, ...]  # at which it was met, ascending


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank lists the bad samples that it meets."""
    return folder / f"quarantine-rank{rank}.jsonl"


def append(path: Path, faults: Sequence[Fault]) -> None:
    """Add lines to a rank's file in one write; what a kill cut short in it is closed off first. DataError when the disk
    takes no more.
    """
    text = "".join(json.dumps(asdict(fault)) + "\n" for fault in faults)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            file.write(("\n" * torn + text).encode())
    except OSError as error:
        raise DataError(
            f"{path}: cannot list a bad sample ({error.strerror}); make room, then run the same command to resume"
        ) from error


def read(folder: Path) -> list[BadSample]:
    """The bad samples that all ranks of a run met, ordered by shard and key."""
    found: dict[tuple[str, str], tuple[str, set[int]]] = {}
    for fault in (fault for path in sorted(folder.glob("quarantine-rank*.jsonl")) for fault in _lines(path)):
        found.setdefault((fault.shard, fault.key), (fault.reason, set()))[1].add(fault.position)
    return [
        BadSample(shard, key, reason, tuple(sorted(positions)))
        for (shard, key), (reason, positions) in sorted(found.items())
    ]


def join(folder: Path) -> None:
    """Write quarantine.jsonl from what all ranks listed so far; DataError when the disk takes no more."""
    aside = folder / (NAME + ".partial")
    try:
        aside.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in read(folder)), encoding="utf-8")
        aside.replace(folder / NAME)
    except OSError as error:
        raise DataError(
            f"{folder / NAME}: cannot be written ({error.strerror}); make room, then run the same command to resume"
        ) from error


def _lines(path: Path) -> Iterable[Fault]:
    """The whole lines of a rank's file; one that a kill cut short is passed over."""
    try:
        lines, _ = parse_json_lines(read_bytes(path), "position")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); move it away") from error
    kinds = {field.name: int if field.name == "position" else str for field in fields(Fault)}
    for line in lines:
        if line.keys() == kinds.keys() and all(type(line[key]) is kind for key, kind in kinds.items()):
            yield Fault(**line)
