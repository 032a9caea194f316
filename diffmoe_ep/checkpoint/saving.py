"""Checkpoint folders written: by all ranks beside the final name, checked, then renamed, so that whatever has its name
is complete.

What lies in them stands in `store`.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from diffmoe_ep.checkpoint.dcp import ChunkWriter, FragmentSavePlanner, Sum
from diffmoe_ep.checkpoint.fragments import Fragment
from diffmoe_ep.checkpoint.store import (
    FORMAT,
    LATEST,
    META,
    METADATA,
    PARTIAL,
    SUMS,
    CheckpointError,
    Ranks,
    is_complete,
    sha256,
    steps_in,
)


def save(
    root: Path,
    step: int,
    fragments: Sequence[Fragment],
    meta: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    rank: int = 0,
    world: int = 1,
    keep_last: int = 2,
    keep_every: int = 0,
) -> Path:
    """Write what all ranks' fragments make up as `root/step-...` and return that folder once it is complete, on every
    rank.

    Every element of every tensor has to be given by exactly one rank. `meta` (rank 0's) has to fit into JSON. What was
    written is read back, by the first rank's view of the file system and by another rank than wrote it, before the
    folder gets its name. Then, of the folders up to this step, the last `keep_last` stay and, unless `keep_every` is 0,
    those whose step it divides. Raises CheckpointError on all ranks if one fails; `latest` then still names a complete
    checkpoint, and no older one was removed.
    """
    assert keep_last >= 1, keep_last
    final = root / f"step-{step:07d}"
    partial = final.with_name(final.name + PARTIAL)
    ranks = Ranks(group, world, f"cannot save the checkpoint {final}")
    text = ranks.together(lambda: _prepare(root, partial, step, meta) if rank == 0 else "")[0]
    writer = ChunkWriter(partial, on_host=all(fragment.data.is_cpu for fragment in fragments))
    with ranks.errors():
        planner = FragmentSavePlanner(fragments)
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=ranks.alone)
    written = ranks.together(lambda: (platform.node(), writer.written))
    ranks.together(lambda: _read_back(partial, written, rank))

    def publish() -> None:
        if rank == 0:
            sums = {name: file.digest for _, files in written for name, file in files.items()}
            _publish(final, partial, text, sums)
            _retire(root, step, keep_last, keep_every)

    ranks.together(publish)
    return final


# ---- Steps of saving, all on rank 0 ----


def _prepare(root: Path, partial: Path, step: int, meta: dict[str, Any]) -> str:
    """Make an empty folder to write to, free of what killed saves left, and return the text of its meta.json."""
    text = json.dumps({"format": FORMAT, "step": step, "meta": meta}, indent=2) + "\n"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(exist_ok=True)
    return text


def _read_back(partial: Path, written: Sequence[tuple[str, Mapping[str, Sum]]], rank: int) -> None:
    """Look at what all ranks wrote, each on its host: the first rank at every file's size, every rank at the content of
    its neighbor's files.
    """
    for host, files in written if rank == 0 else ():
        for name, file in files.items():
            found = (partial / name).stat().st_size if (partial / name).is_file() else None
            if found != file.size:
                seen = "does not see it" if found is None else f"sees {found:,} bytes of it"
                raise CheckpointError(
                    f"{partial}: {host} wrote {name}, {file.size:,} bytes, and {platform.node()} {seen}. The run "
                    "folder has to lie on one file system that all hosts see; nothing was replaced"
                )
    host, files = written[(rank + 1) % len(written)]
    for name, file in files.items():
        if sha256(partial / name) != file.digest:
            raise CheckpointError(f"{partial / name} does not hold what {host} wrote: the disk loses data")


def _publish(final: Path, partial: Path, text: str, sums: dict[str, str]) -> None:
    """Complete the folder, give it its name, and let `latest` name it, each step on disk before the next."""
    _write(partial / META, text)
    sums = {**sums, METADATA: sha256(partial / METADATA), META: sha256(partial / META)}
    _write(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    _sync(partial)
    if final.exists():  # the same step once more: a folder cannot be renamed onto another
        discard(final)
    partial.rename(final)
    _sync(final.parent)
    aside = final.with_name(LATEST + PARTIAL)
    _write(aside, final.name + "\n")
    aside.replace(final.with_name(LATEST))
    _sync(final.parent)


def _retire(root: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Remove old checkpoints; those of later steps, left by a run that went back, are not for us to judge."""
    folders = steps_in(root)
    own = [number for number, folder in folders.items() if number <= step and is_complete(folder)]
    for number in superfluous(own, keep_last, keep_every):
        discard(folders[number])


def superfluous(steps: Sequence[int], keep_last: int, keep_every: int) -> list[int]:
    """Of these steps, those whose checkpoints may go, oldest first; keep_every = 0: none is kept for ever."""
    older = sorted(steps)[:-keep_last]
    return [step for step in older if not keep_every or step % keep_every]


def discard(folder: Path) -> None:
    """Take the name from a folder before removing it, so that a half-removed one never counts as complete."""
    aside = folder.with_name(f"{folder.name}.old{PARTIAL}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # what resists (a file open on a network disk) goes at the next save


def _write(path: Path, text: str) -> None:
    """Write a small file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
