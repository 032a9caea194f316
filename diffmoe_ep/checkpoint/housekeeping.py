"""Looking after the checkpoints of a run: what there are, whether they are sound, which may go."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.checkpoint.saving import discard, superfluous
from diffmoe_ep.checkpoint.sound import DAMAGED
from diffmoe_ep.checkpoint.store import (
    PARTIAL,
    STEP,
    SUMS,
    CheckpointError,
    is_complete,
    latest,
    newest_first,
    read_meta,
    resolve,
    sha256,
    steps_in,
    sums_of,
    tensors,
)
from diffmoe_ep.tables import size, table


@dataclass(frozen=True)
class Entry:
    """A checkpoint as a list shows it; its large files were not read."""

    folder: Path
    saved: float
    """When, in seconds since 1970: by the time of its files."""
    size: int
    """Bytes of all its files."""
    state: str
    layout: str
    """The ranks that wrote it."""


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a run, oldest first."""

    root: Path
    entries: tuple[Entry, ...]

    def lines(self) -> list[str]:
        """As text."""
        rows = [
            (
                entry.folder.name,
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.saved)),
                size(entry.size),
                entry.layout,
                entry.state,
            )
            for entry in self.entries
        ]
        held = size(sum(entry.size for entry in self.entries))
        total = f"{len(rows)} folder{'s' * (len(rows) != 1)} in {self.root}, {held}"
        return [*table([("checkpoint", "saved", "size", "written by", "state"), *rows], "<<><<"), total]


def root_of(path: Path) -> Path:
    """The `checkpoints` folder of a run, which may be named itself."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir() or not any(STEP.match(each.name) for each in root.iterdir()):
        raise CheckpointError(f"{path} holds no checkpoints (looked for folders step-* in {root}): name a run folder")
    return root


def listing(path: Path) -> Listing:
    """What there is, whole or not."""
    root = root_of(path)
    newest = latest(root)
    folders = sorted(each for each in root.iterdir() if STEP.match(each.name) and each.is_dir())
    return Listing(root, tuple(_entry(folder, folder == newest) for folder in folders))


def _entry(folder: Path, newest: bool) -> Entry:
    files = [file.stat() for file in folder.iterdir() if file.is_file()]
    saved, layout = max((file.st_mtime for file in files), default=folder.stat().st_mtime), "?"
    try:
        if folder.name.endswith(PARTIAL):
            state = "unfinished: being written, or goes at the next save"
        else:
            layout = _layout(folder)
            missing = [name for name in sums_of(folder) if not (folder / name).is_file()]
            state = f"DAMAGED: it lacks {', '.join(missing)}" if missing else "complete"
    except CheckpointError as error:
        state = f"DAMAGED: {str(error).removeprefix(f'{folder}').lstrip(': ')}"
    if DAMAGED in folder.name:
        state = "set aside as damaged"
    return Entry(folder, saved, sum(file.st_size for file in files), state + ", latest" * newest, layout)


def _layout(folder: Path) -> str:
    """Ranks, expert parallelism and ZeRO stage, from what the run noted."""
    meta = read_meta(folder)["meta"]
    files = {name.split("_")[2] for name in sums_of(folder) if re.fullmatch(r"__\d+_\d+\.distcp", name)}
    ranks = meta.get("ranks", len(files))  # older ones do not tell; each of their ranks has written a file
    parallel = meta.get("config", {}).get("parallel", {})
    noted = [("EP", "expert_parallel"), ("ZeRO", "zero_stage")]
    return ", ".join(
        [f"{ranks} rank{'s' * (ranks != 1)}", *(f"{name} {parallel.get(key, '?')}" for name, key in noted)]
    )


@dataclass(frozen=True)
class Verdict:
    """Whether the files of a checkpoint are those that were saved."""

    folder: Path
    files: int
    size: int
    problems: tuple[str, ...]

    def line(self) -> str:
        """As text."""
        if not self.problems:
            return f"{self.folder}: sound, {self.files} files, {size(self.size)}"
        return f"{self.folder}: DAMAGED: {'; '.join(self.problems)}"


def to_verify(path: Path) -> list[Path]:
    """The checkpoints meant by a run folder, a `checkpoints` folder, or one checkpoint; newest last."""
    if STEP.match(path.name) or is_complete(path):
        return [resolve(path) if path.name.endswith(PARTIAL) else path]
    folders = steps_in(root_of(path))
    if not folders:
        raise CheckpointError(
            f"{path} holds nothing but unfinished checkpoints or some set aside: there is none to verify"
        )
    return [folders[step] for step in sorted(folders)]


def verdict(folder: Path) -> Verdict:
    """Read every byte of a checkpoint and compare it with its checksums."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: name a run folder or one of its checkpoints")
    total, names, problems = 0, {}, list[str]()
    try:
        names = sums_of(folder)
        for name, digest in sorted(names.items()):
            if not (folder / name).is_file():
                problems.append(f"{name} is missing")
            elif sha256(folder / name) != digest:
                problems.append(f"{name} is not as it was saved (by {SUMS})")
            else:
                total += (folder / name).stat().st_size
        if not problems:
            tensors(folder)
            read_meta(folder)
    except CheckpointError as error:
        problems.append(str(error).removeprefix(f"{folder}").lstrip(": "))
    except OSError as error:
        problems.append(f"it cannot be read ({error})")
    return Verdict(folder, len(names), total, tuple(problems))


@dataclass(frozen=True)
class Plan:
    """Which checkpoints stay, and which may go."""

    go: tuple[Path, ...]
    stay: tuple[Path, ...]
    sound: Path
    """The newest one whose every byte is as it was saved; it stays whatever was asked."""


def plan(root: Path, keep_last: int, keep_every: int) -> Plan:
    """What pruning would remove: of the complete checkpoints up to the latest, all but the last `keep_last`, those at
    multiples of `keep_every` steps (0: none), and the newest sound one.

    Those of later steps, left by a run that went back, and those set aside stay. Raises CheckpointError where none is
    sound.
    """
    mine = {int(folder.name.removeprefix("step-")): folder for folder in newest_first(root) if is_complete(folder)}
    sound = next((folder for folder in mine.values() if not verdict(folder).problems), None)
    if sound is None:
        raise CheckpointError(f"no checkpoint in {root} is sound, so nothing is removed: see diffmoe checkpoint verify")
    go = [mine[step] for step in superfluous(list(mine), keep_last, keep_every) if mine[step] != sound]
    stay = [folder for _, folder in sorted(steps_in(root).items()) if folder not in go]
    return Plan(tuple(go), tuple(stay), sound)


def remove(folders: Sequence[Path]) -> None:
    """Remove checkpoints for good."""
    for folder in folders:
        discard(folder)
