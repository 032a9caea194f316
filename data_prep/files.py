"""Image files in folders: listed in an order of their own, then shuffled once, so that no shard holds one class or one
album.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.source import IMAGE_ENDINGS
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.rng import generator_for, permutation

SHUFFLE_SEED = 0  # the order of the samples is part of the dataset


@dataclass(frozen=True)
class ImageFile:
    """One image file below a folder."""

    folder: Path
    name: str  # relative to the folder, with /
    size: int  # bytes

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return self.name

    @property
    def path(self) -> Path:
        """Its path on this machine."""
        return self.folder / self.name

    def read(self) -> bytes:
        """The content of the file; DataError if it cannot be read, which says nothing about the image."""
        return read_file(self.path)


def read_file(path: Path) -> bytes:
    """The content of a file; DataError if it cannot be read, which says nothing about what is in it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); make it readable and run the command again"
        ) from error


def image_files(folder: Path) -> list[ImageFile]:
    """All image files below a folder, sorted by name; links to folders are not followed. DataError if there are
    none.
    """
    found = []

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be listed ({error.strerror}); give a folder that you may read with --source"
        ) from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("."):
                path = Path(parent, name)
                found.append(ImageFile(folder, path.relative_to(folder).as_posix(), path.stat().st_size))
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_ENDINGS)}); give another folder with --source")
    return sorted(found, key=lambda file: file.name)


def archives(source: Path, endings: Sequence[str]) -> list[Path]:
    """The archive that `source` is, or those that lie in it, sorted by name; none if there are none. DataError if there
    is no `source`.
    """
    try:
        if source.is_file():
            return [source] if source.name.endswith(tuple(endings)) else []
        return sorted(path for path in source.iterdir() if path.name.endswith(tuple(endings)) and path.is_file())
    except OSError as error:
        raise DataError(
            f"{source}: cannot be read ({error.strerror}); give another folder or file with --source"
        ) from error


def shuffled(count: int) -> np.ndarray:
    """The order in which `count` samples of a list are stored, the same for ever."""
    return permutation(generator_for(SHUFFLE_SEED, count, "order"), count)


def keys(names: Sequence[str]) -> list[str]:
    """A key for each file of a list: its name without folders and ending if that is plain for all and differs, else its
    number.
    """
    stems = [PurePosixPath(name).stem for name in names]
    if len(set(stems)) == len(stems) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stem) for stem in stems):
        return stems
    return [f"{number:08d}" for number in range(len(names))]
