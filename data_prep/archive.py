"""Tars of other people: read from the front, or listed with offsets; names of members are names only, never paths on
this machine.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from diffmoe_ep.data.manifest import DataError

MAX_MEMBER = 1 << 28  # bytes; a larger member is no image and no caption, and is not read
ENDINGS = (".tar", ".tgz", ".tar.gz")
DAMAGES = (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile)


class DamagedArchive(ValueError):
    """An archive that cannot be read to its end; what came before it is whole."""


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar."""

    archive: Path
    holder: str  # stem of the innermost tar that holds it
    name: str  # in that tar
    offset: int  # of its content in the archive
    size: int

    @property
    def place(self) -> str:
        """Archive and name, for messages."""
        return f"{self.archive.name}:{self.name}"

    def read(self) -> bytes:
        """The content of the file."""
        try:
            with self.archive.open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise _unreadable(self.archive, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); make it readable and run the command again")


def stem_of(name: str) -> str:
    """A tar's name without its ending."""
    return next((name.removesuffix(ending) for ending in ENDINGS[::-1] if name.endswith(ending)), name)


def stream(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of every file in a tar, plain or gzipped, in order; content None where it is larger than
    MAX_MEMBER.

    DamagedArchive, after all that is whole, where the archive ends early or a header is broken.
    """
    name = "the beginning"
    try:
        with path.open("rb") as beginning:
            mode: Literal["r:gz", "r:"] = "r:gz" if beginning.read(2) == b"\x1f\x8b" else "r:"
        with tarfile.open(path, mode) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers otherwise
                if not member.isreg() or member.issparse():
                    continue
                name = member.name
                content = None
                if member.size <= MAX_MEMBER:
                    file = tar.extractfile(member)
                    content = file.read() if file is not None else None
                    if content is not None and len(content) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                yield member.name, content
            _demand_end(tar)
    except DAMAGES as error:
        raise DamagedArchive(f"the archive is damaged after {name} ({error}); what follows is lost") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def members(path: Path) -> list[Member]:
    """All files of an uncompressed tar, those of uncompressed tars inside it too; DataError if it cannot be listed to
    its end.
    """
    try:
        with path.open("rb") as file:
            return list(_members(path, file, 0, path.stat().st_size, stem_of(path.name), nested=True))
    except DAMAGES as error:
        raise DataError(f"{path}: is not a whole, uncompressed tar ({error}); fetch it again, or unpack it") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _members(path: Path, file: BinaryIO, start: int, size: int, holder: str, nested: bool) -> Iterator[Member]:
    with tarfile.open(fileobj=_Window(file, start, size), mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            tar.members = []
            if not member.isreg() or member.issparse():
                continue
            offset = start + member.offset_data
            if offset + member.size > start + size:
                raise tarfile.ReadError("unexpected end of data")
            if nested and member.name.endswith(".tar"):
                yield from _members(
                    path, file, offset, member.size, stem_of(PurePosixPath(member.name).name), nested=False
                )
            else:
                yield Member(path, holder, member.name, offset, member.size)
        _demand_end(tar)


def _demand_end(tar: tarfile.TarFile) -> None:
    """ReadError unless a block of zeros stands where tarfile stopped: it takes a broken header, and the end of the
    file, for the end.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(512)
    if len(block) < 512:
        raise tarfile.ReadError("unexpected end of data")
    if block.strip(b"\0"):
        raise tarfile.ReadError("a broken header")


class _Window:
    """A part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        content = os.pread(self.file.fileno(), left if count < 0 else min(count, left), self.start + self.position)
        self.position += len(content)
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position
