"""Checkpoint folders: found, verified and read, by one process or by all ranks; `saving` writes them.

    checkpoints/step-0000600/    .metadata and __R_0.distcp (torch.distributed.checkpoint), meta.json (progress),
                                 SHA256SUMS
    checkpoints/latest           the name of the newest folder; moves last

Tensors lie under canonical names and logical shapes; how they are cut into pieces is of no concern to a reader, who may
be laid out otherwise. A checkpoint may come from a stranger: its files are compared with their checksums, nothing is
unpickled but `.metadata`, with a short list of allowed classes, and no file outside its folder is opened.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from diffmoe_ep.checkpoint.dcp import ChunkReader, FragmentLoadPlanner, kinds, read_metadata
from diffmoe_ep.checkpoint.fragments import Fragment, whole
from diffmoe_ep.config import UserError
from diffmoe_ep.config.foreign import open_binary, parse_json, read_bytes

T = TypeVar("T")

FORMAT = 1
LATEST, META, METADATA, SUMS = "latest", "meta.json", ".metadata", "SHA256SUMS"
PARTIAL = ".partial"
MOST_STEPS = 10**15
STEP = re.compile(r"step-(\d{7,15})")
REMEDY = "Use the configuration that saved it (config.yaml in its run folder), or another folder for this run"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, trusted, or loaded into this model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were saved; an older one may be sound."""


def load(
    folder: Path,
    fragments: Sequence[Fragment],
    *,
    group: dist.ProcessGroup | None = None,
    world: int = 1,
    allow_extra: bool = False,
    verified: bool = False,
) -> None:
    """Fill the fragments of all ranks in place, whatever layout saved the checkpoint.

    Before anything is written, names, shapes and types are compared on every rank, and the files' checksums, dealt over
    the ranks, unless they were `verified` just now. Unless `allow_extra`, the ranks' fragments together have to name
    every tensor of the checkpoint. Raises CheckpointError, the same on all ranks.
    """
    rank = dist.get_rank(group) if world > 1 else 0
    ranks = Ranks(group if world > 1 else None, world, f"cannot load the checkpoint {folder}")
    found: list[Metadata] = []
    held = {fragment.name for fragment in fragments}
    ranks.together(lambda: found.append(_compared(folder, fragments)))
    metadata = found[0]
    names = sorted(metadata.state_dict_metadata)
    masks = ranks.together(lambda: sum(1 << number for number, name in enumerate(names) if name in held))
    for number, name in enumerate(names):
        if not allow_extra and not any(mask >> number & 1 for mask in masks):
            raise CheckpointError(f"{_another(folder)} it holds {name}, which this run does not have. {REMEDY}")
    if not verified:
        ranks.together(lambda: _verify(folder, _files(metadata)[rank::world]))
    with ranks.errors():
        planner = FragmentLoadPlanner(fragments, metadata)
        reader = ChunkReader(folder, metadata)
        dcp.load({}, storage_reader=reader, planner=planner, process_group=ranks.group, no_dist=ranks.alone)


def verify(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Raise DamagedCheckpointError unless the files of a checkpoint are those that were saved; of the large ones this
    rank looks at its share.
    """
    read_meta(folder)
    _verify(folder, _files(_metadata(folder))[rank::world])


def read(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Whole tensors by name, on the CPU, in one process."""
    stored = tensors(folder)
    for name in names:
        if name not in stored:
            raise CheckpointError(f"{_another(folder)} it has no tensor {name}. {REMEDY}")
    result = {name: torch.empty(stored[name][0], dtype=stored[name][1]) for name in names}
    load(folder, [whole(name, tensor) for name, tensor in result.items()], allow_extra=True)
    return result


def tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Logical shape and type of every tensor in a checkpoint, by canonical name."""
    return kinds(_metadata(folder))


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` says: `format`, `step`, and `meta` as it was given to `save`."""
    try:
        content = parse_json(_checked(folder, META, sums_of(folder)))
    except UserError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: its {META} is no JSON ({error}): it was not saved by this program") from error
    expected = (("format", int), ("step", int), ("meta", dict))
    if not isinstance(content, dict) or not all(type(content.get(key)) is kind for key, kind in expected):
        raise CheckpointError(f"{folder}: its {META} lacks format, step or meta: it was not saved by this program")
    if not 0 <= content["step"] < MOST_STEPS:
        raise CheckpointError(f"{folder}: its {META} has step {content['step']}: it was not saved by this program")
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has format {content['format']}, this version reads up to {FORMAT}: install a newer diffmoe_ep"
        )
    return content


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint in a `checkpoints` folder: the one that the file `latest` names, else that of the
    highest step.
    """
    return next((folder for folder in newest_first(root) if is_complete(folder)), None)


def newest_first(root: Path) -> list[Path]:
    """The folders of checkpoints, complete or not, in the order in which a run would go on from them: the one that the
    file `latest` names before the older ones; all of them where it names none. Those of later steps are left by a run
    that went back.
    """
    folders, pointer = steps_in(root), root / LATEST
    named = STEP.fullmatch(_line(pointer)) if pointer.is_file() else None
    newest = int(named[1]) if named and int(named[1]) in folders else max(folders, default=0)
    return [folders[step] for step in sorted(folders, reverse=True) if step <= newest]


def _line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(100).strip()


def resolve(path: Path) -> Path:
    """The checkpoint meant by a run folder, a `checkpoints` folder, or one checkpoint folder."""
    if path.name.endswith(PARTIAL):
        raise CheckpointError(
            f"{path} was not finished when its run ended: name another checkpoint, or the run folder for its newest one"
        )
    found = path if is_complete(path) else latest(path / "checkpoints") or latest(path)
    if found is None:
        state = "holds no complete checkpoint" if path.is_dir() else "is not a folder"
        looked = (
            f"{METADATA}, {META} and {SUMS} in it, or folders step-* with these in it or in its folder `checkpoints`"
        )
        raise CheckpointError(f"{path} {state} (looked for {looked}): name a run folder or one of its checkpoints")
    return found


# ---- What is in a folder, and whether it is what was saved ----


def steps_in(root: Path) -> dict[int, Path]:
    """The folders of checkpoints in a folder, by step."""
    matches = ((STEP.fullmatch(path.name), path) for path in (root.iterdir() if root.is_dir() else ()))
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (METADATA, META, SUMS))


def sums_of(folder: Path) -> dict[str, str]:
    """The checkpoint's list of files: name -> sha256, in the manner of the program `sha256sum`."""
    if not is_complete(folder):
        raise DamagedCheckpointError(
            f"{folder} is not a complete checkpoint (it lacks {METADATA}, {META} or {SUMS}): name another one"
        )
    lines = read_bytes(folder / SUMS).decode(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.]+)", line) for line in lines]
    if not all(matches):
        raise DamagedCheckpointError(_damaged(folder, SUMS))
    return {match[2]: match[1] for match in matches if match}


def _checked(folder: Path, name: str, sums: dict[str, str]) -> bytes:
    """A small file's content, compared with its checksum."""
    content = read_bytes(folder / name)
    if hashlib.sha256(content).hexdigest() != sums.get(name):
        raise DamagedCheckpointError(_damaged(folder, name))
    return content


def _verify(folder: Path, names: Sequence[str]) -> None:
    """Compare files with their checksums."""
    sums = sums_of(folder)
    for name in names:
        if not (folder / name).is_file() or sha256(folder / name) != sums.get(name):
            raise DamagedCheckpointError(_damaged(folder, name))


def _files(metadata: Metadata) -> list[str]:
    return sorted({place.relative_path for place in metadata.storage_data.values()})


def sha256(path: Path) -> str:
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, name: str) -> str:
    remedy = "Use another checkpoint or a sound copy"
    return f"{folder} is damaged: its file {name} is not as it was saved (by {SUMS}). {remedy}"


def _metadata(folder: Path) -> Metadata:
    """What torch.distributed.checkpoint noted of a checkpoint: tensors, chunks and their files."""
    sums = sums_of(folder)
    try:
        metadata = read_metadata(_checked(folder, METADATA, sums), list(sums))
    except CheckpointError:
        raise
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder}: {error}. Do not use it") from error
    files = [folder / name for name in _files(metadata) if (folder / name).is_file()]
    held = sum(path.stat().st_size for path in files)
    for name, (shape, dtype) in kinds(metadata).items() if len(files) == len(_files(metadata)) else ():
        if math.prod(shape) * dtype.itemsize > held:  # so that nobody takes memory for it
            what = f"its {METADATA} gives {name} more bytes than its files have"
            raise DamagedCheckpointError(f"{folder} is damaged: {what}. Use another checkpoint or a sound copy")
    return metadata


def _compared(folder: Path, fragments: Sequence[Fragment]) -> Metadata:
    """The checkpoint's metadata, once the fragments' names, shapes and types were found in it."""
    read_meta(folder)
    metadata = _metadata(folder)
    stored = kinds(metadata)
    for fragment in fragments:
        if fragment.name not in stored:
            raise CheckpointError(
                f"{_another(folder)} it has no tensor {fragment.name}, here of shape {fragment.shape}. {REMEDY}"
            )
        there, here = stored[fragment.name], (fragment.shape, fragment.data.dtype)
        if there != here:
            what, number = ("shape", 0) if there[0] != here[0] else ("type", 1)
            raise CheckpointError(
                f"{_another(folder)} {fragment.name} has {what} {there[number]} there and {here[number]} here. {REMEDY}"
            )
    return metadata


def _another(folder: Path) -> str:
    return f"{folder} is a checkpoint of another model or optimizer:"


@dataclass(frozen=True)
class Ranks:
    """The ranks that save or load together."""

    group: dist.ProcessGroup | None
    """Their process group; None is all ranks."""
    world: int
    """How many they are; with one, no process group is needed."""
    what: str
    """How the message of a failure begins."""

    @property
    def alone(self) -> bool:
        """Whether this is one process that talks to nobody, not even to itself over a group."""
        return self.world == 1 and self.group is None

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run the action on every rank and return all results; if one fails all raise its error, so that none waits for
        it for ever.
        """
        cause: Exception | None = None
        message: str | None = None
        result: T | None = None
        try:
            result = action()
        except Exception as error:  # whatever it is, the others have to hear of it; it is raised below
            cause, message = error, self.message(error)
        everyone = [(message, result)] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, (message, result), group=self.group)
        for failure, _ in everyone:
            if failure is not None:
                raise CheckpointError(failure, everywhere=True) from cause
        return [value for _, value in everyone]  # type: ignore[misc]  # None only where T allows it

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what torch.distributed.checkpoint raises, on all ranks alike, into a CheckpointError."""
        try:
            with warnings.catch_warnings() if self.alone else nullcontext():  # not beside other threads: it is global
                if self.alone:
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
                yield
        except CheckpointException as failure:
            cause = failure.failures[min(failure.failures)][0]
            if not isinstance(cause, Exception):  # an interrupt is no fault of the checkpoint
                raise cause from None
            raise CheckpointError(self.message(cause), everywhere=True) from failure

    def message(self, error: Exception) -> str:
        """What is said of a failure."""
        if isinstance(error, CheckpointError):
            return str(error)
        if isinstance(error, OSError):
            return (
                f"{self.what}: {error}. Its folder needs permission and enough space; other checkpoints are untouched"
            )
        return (
            f"{self.what}: {error}"
            if isinstance(error, ValueError)
            else f"{self.what}: {type(error).__name__}: {error}"
        )
