"""A dataset on disk: a folder of webdataset tars, an index beside each, and one manifest.

    manifest.json            what the dataset is, and size, count and checksums of every shard (class `Manifest`)
    NAME-000000.tar          a plain webdataset tar: members KEY.cls and KEY.pixels.npy or KEY.moments.npy
    NAME-000000.index.npy    a row per sample: its key, and offset, size and crc32 of each member (npy, no pickle)

The index turns a sample into one `pread`, so any sample of any shard is reached at once and a resumed run starts
anywhere. The folder may be a URL: manifest, indexes and whole shards come through a local cache then (`remote`).
"""

import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffmoe_ep.config.foreign import open_binary, open_regular, read_bytes, regular_size
from diffmoe_ep.data.manifest import MANIFEST_NAME, NPY_ERRORS, REMEDY, DataError, Manifest, Shard, read_manifest
from diffmoe_ep.data.remote.fetch import Access, RemoteFolder, Unavailable, is_remote, shown
from diffmoe_ep.data.sources import Content

MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])
MOST_BETWEEN = 1 << 14  # bytes between a sample's members that are rather read along than passed over


def load_index(path: Path, fields: Sequence[str]) -> np.ndarray:
    """Memory-map a shard's index, (num_samples,) rows of key and, per field, offset, size, crc32; DataError if it is
    not one.
    """
    try:
        with open_binary(path) as file:
            place, shape, dtype = _read_header(file, os.fstat(file.fileno()).st_size, fields, str(path))
            return np.memmap(file, dtype, "r", place, shape) if shape[0] else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot read the index ({error.strerror}); {REMEDY}") from error


def parse_index(content: bytes, fields: Sequence[str], where: str) -> np.ndarray:
    """As `load_index`, of a file's content; `where` opens the messages."""
    place, shape, dtype = _read_header(io.BytesIO(content), len(content), fields, where)
    return np.frombuffer(content, dtype, shape[0], place) if shape[0] else np.empty(0, dtype)


def _read_header(file: BinaryIO, size: int, fields: Sequence[str], where: str) -> tuple[int, tuple[int, ...], np.dtype]:
    """Where the rows of an index begin, how many there are, and of what; DataError unless they fill its file of `size`
    bytes.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except NPY_ERRORS as error:
        raise DataError(f"{where}: cannot read the index ({error}); {REMEDY}") from error
    _check_columns(dtype, fields, where)
    asked = file.tell() + dtype.itemsize * math.prod(shape)
    if len(shape) != 1 or fortran_order or asked != size:
        raise DataError(f"{where}: has {size} bytes, its header asks for {asked}; {REMEDY}")
    return file.tell(), shape, dtype


def _check_columns(dtype: np.dtype, fields: Sequence[str], where: str) -> None:
    columns: Mapping[str, Any] = dtype.fields or {}
    if (
        list(columns) != ["key", *fields]
        or columns["key"][0].kind != "S"
        or any(columns[field][0] != MEMBER for field in fields)
    ):
        raise DataError(f"{where}: holds columns {dtype}, expected key, {', '.join(fields)}; {REMEDY}")


def _num_indexed(path: Path, fields: Sequence[str]) -> int:
    """The length of `load_index`, found ten times as fast for a sound file: datasets of thousands of shards are opened
    at once.
    """
    descriptor = open_regular(path)
    try:
        head, size = os.read(descriptor, 4096), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    start = 10 + int.from_bytes(head[8:10], "little")  # the size of a version 1.0 header stands in bytes 8 and 9
    count, row_bytes = _parse_header(head[:start], tuple(fields))
    return count if row_bytes and start + count * row_bytes == size else len(load_index(path, fields))


@lru_cache(maxsize=64)
def _parse_header(header: bytes, fields: tuple[str, ...]) -> tuple[int, int]:
    """Rows and bytes of a row of an index with this header, which most of a dataset's share; (0, 0) for any other
    file.
    """
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return 0, 0
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except NPY_ERRORS:
        return 0, 0
    columns: Mapping[str, Any] = dtype.fields or {}
    sound = len(shape) == 1 and list(columns) == ["key", *fields] and columns["key"][0].kind == "S"
    return (shape[0], dtype.itemsize) if sound and all(columns[field][0] == MEMBER for field in fields) else (0, 0)


def shard_problem(folder: Path, shard: Shard, fields: Sequence[str], checksum: bool) -> str | None:
    """What is wrong with a shard or its index, in words that name the file, or None; `checksum` reads every byte."""
    try:
        return shard_damage(folder, shard, fields, checksum)
    except Unavailable as error:
        return str(error)


def shard_damage(folder: Path, shard: Shard, fields: Sequence[str], checksum: bool) -> str | None:
    """As `shard_problem`, but for files that are missing or cannot be read, which raise Unavailable: what they hold may
    be sound.
    """
    path = folder / shard.name
    try:
        size = regular_size(path)
        if size != shard.bytes:
            return f"{path} has {size} bytes, the manifest says {shard.bytes}"
        count = _num_indexed(folder / shard.index_name, fields)
        if count != shard.num_samples:
            return f"{folder / shard.index_name} has {count} samples, the manifest says {shard.num_samples}"
        for name, expected in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)) if checksum else ():
            if sha256_of(folder / name) != expected:
                return f"{folder / name} is damaged (its sha256 is not the manifest's)"
    except FileNotFoundError as error:
        raise Unavailable(f"{error.filename} is missing") from error
    except OSError as error:
        raise Unavailable(f"{error.filename or path} cannot be read ({error.strerror})") from error
    except Unavailable:
        raise
    except DataError as error:
        return str(error).removesuffix(f"; {REMEDY}")
    return None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_manifest(folder: Path) -> DataError:
    """Why a folder has no manifest, as the error to raise."""
    if not folder.is_dir():
        return DataError(f"data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}; {REMEDY}")
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if inside:
        return DataError(
            f"data folder {folder} has no {MANIFEST_NAME}, but there is one in {', '.join(inside)}; name one of these"
        )
    state = f"has no {MANIFEST_NAME} (was its preparation cut short?)" if any(folder.iterdir()) else "is empty"
    return DataError(f"data folder {folder} {state}; {REMEDY}")


@dataclass(frozen=True)
class Opened:
    """A shard held open for reading."""

    descriptor: int
    keys: np.ndarray  # (num_samples,) bytes
    # (num_samples, 2 + 3 fields) int64: where its members begin and how long they are (0: apart); offset, size, crc32
    # of each
    members: np.ndarray


class Dataset:
    """A prepared dataset, open for reading single samples; cheap to pickle and safe to fork (reads carry their own
    offset).
    """

    def __init__(self, folder: Path | RemoteFolder, manifest: Manifest, max_open: int = 128) -> None:
        """Trust `manifest`; `open` is the way in that checks. At most `max_open` shards are held open at once."""
        self.folder: Path | str = folder.url if isinstance(folder, RemoteFolder) else folder
        self.remote = folder if isinstance(folder, RemoteFolder) else None
        self.manifest = manifest
        self.fingerprint = hashlib.sha256(manifest.to_json().encode()).hexdigest()
        self.problems: tuple[str, ...] = ()  # damage that was seen and tolerated when it was opened
        self._max_open = max_open
        self._fields = manifest.fields
        self._crc32 = fastest_crc32()
        self._open: dict[int, Opened] = {}  # the one opened first goes first

    @classmethod
    def open(cls, folder: str | Path, access: Access | None = None, tolerant: bool = False) -> "Dataset":
        """Open a prepared folder after a quick check (manifest, every file's size, every index's count); DataError
        names what is wrong.

        tolerant: damaged shards are only noted in `problems`, since bad samples will be replaced; missing ones are
        never tolerated. Of a URL only the manifest is fetched and checked here; `access` says how it may be read.
        """
        if is_remote(folder):
            remote = RemoteFolder(str(folder), access or Access())
            return cls(remote, remote.manifest())
        folder = Path(folder)
        try:
            if not (folder / MANIFEST_NAME).is_file():
                raise _no_manifest(folder)
        except OSError as error:
            raise DataError(f"data folder {folder} cannot be read ({error.strerror}); grant access to it") from error
        dataset = cls(folder, read_manifest(folder / MANIFEST_NAME))
        dataset.problems = dataset._find_problems(checksum=False, tolerant=tolerant)
        return dataset

    def verify(self) -> None:
        """Compare every byte with the manifest's checksums; DataError names the damaged files. Remote files are
        compared when they come.
        """
        self._find_problems(checksum=True, tolerant=False)

    def _find_problems(self, checksum: bool, tolerant: bool) -> tuple[str, ...]:
        """The damage that is tolerated; DataError for what is not."""
        if not isinstance(self.folder, Path):
            return ()
        tolerated: list[str] = []
        problems: list[str] = []
        for shard in self.manifest.shards:
            try:
                damage = shard_damage(self.folder, shard, self.manifest.fields, checksum)
            except Unavailable as error:
                problems.append(str(error))
                continue
            if damage is not None:
                (tolerated if tolerant else problems).append(damage)
        held = sum(self._held(shard) for shard in self.manifest.shards) if tolerated and not problems else 0
        if tolerated and not problems and held < self.manifest.num_samples:  # work and memory grow with what is there
            problems = [f"they have {held} bytes, and are to hold {self.manifest.num_samples} samples"]
        if problems:
            more = f" (and {len(problems) - 3} more of {len(self.manifest.shards)} shards)" if len(problems) > 3 else ""
            raise DataError(
                f"shards do not match {self.folder / MANIFEST_NAME}: {', '.join(problems[:3])}{more}; {REMEDY}"
            )
        return tuple(tolerated)

    def _held(self, shard: Shard) -> int:
        try:
            return regular_size(Path(self.folder) / shard.name)
        except OSError:
            return 0

    @property
    def name(self) -> str:
        """What it is called in logs and messages: its folder, or its URL without what may be secret."""
        return str(self.folder) if self.remote is None else shown(self.remote.url)

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read."""
        return self.remote is not None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard, in storage order."""
        return tuple(shard.num_samples for shard in self.manifest.shards)

    def read(self, shard: int, sample: int, fields: Sequence[str] | None = None) -> dict[str, Content]:
        """The bytes of a sample's fields, of all or of some; DataError when they are damaged, Unavailable when the file
        cannot be had.
        """
        try:
            return self._read(shard, sample, fields)
        except Unavailable:
            raise
        except DataError:
            # Bytes that were sound when they were fetched can be had again; the order of samples must not depend on a
            # host's disk.
            if self.remote is None or not self.remote.discard_damaged(self.manifest.shards[shard]):
                raise
            self._release(shard)
            return self._read(shard, sample, fields)

    def _read(self, shard: int, sample: int, fields: Sequence[str] | None) -> dict[str, Content]:
        opened = self.opened(shard)
        begin, length, *numbers = opened.members[sample].tolist()
        contents: dict[str, Content] = {}
        block: memoryview | None = None
        try:
            if length and (fields is None or len(fields) == len(self._fields)):
                block = memoryview(os.pread(opened.descriptor, length, begin))
            place = iter(numbers)
            for field, offset, size, expected in zip(self._fields, place, place, place, strict=True):
                if block is not None:
                    content: Content = block[offset - begin : offset - begin + size]
                elif fields is None or field in fields:
                    content = os.pread(opened.descriptor, size, offset)
                else:
                    continue
                if self._crc32(content) != expected or len(content) != size:
                    state = "truncated" if len(content) < size else "damaged (crc32 differs)"
                    raise DataError(f"{self.where(shard, sample)}: {field} is {state}; {REMEDY}")
                contents[field] = content
        except OSError as error:
            raise Unavailable(
                f"{self.where(shard, sample)}: cannot be read ({error.strerror}); see to its disk"
            ) from error
        return contents

    def where(self, shard: int, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        return ", key ".join(self.address(shard, sample))

    def address(self, shard: int, sample: int) -> tuple[str, str]:
        """Path or URL of the shard, and the sample's key; its number, if the index is bad as well."""
        try:
            key = self.opened(shard).keys[sample].decode(errors="replace")
        except DataError:
            key = f"number {sample}"
        return self.place(self.manifest.shards[shard].name), key

    def member(self, shard: int, sample: int, field: str) -> bytes:
        """The bytes of one field of a sample, without reading the others."""
        opened = self.opened(shard)
        place = 2 + 3 * self._fields.index(field)
        offset, size, crc32 = opened.members[sample, place : place + 3].tolist()
        content = os.pread(opened.descriptor, size, offset)
        if self._crc32(content) != crc32:
            raise DataError(f"{self.where(shard, sample)}: {field} is damaged (crc32 differs); {REMEDY}")
        return content

    def place(self, name: str) -> str:
        """Path or URL of a file of the dataset, for messages."""
        return self.remote.place(name) if self.remote is not None else f"{self.folder}/{name}"

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background, in this order, into the cache if they are remote; name those in use too, so
        that they stay.
        """
        if self.remote is not None:
            self.remote.prefetch([self.manifest.shards[shard] for shard in shards])

    def opened(self, shard: int) -> Opened:
        """The shard, held open until others need its place."""
        return self._open.get(shard) or self._opened(shard)

    def _opened(self, shard: int) -> Opened:
        described = self.manifest.shards[shard]
        content, where = self._index(described), self.place(described.index_name)
        index = parse_index(content, self._fields, where)
        if len(index) != described.num_samples:
            raise DataError(f"{where} has {len(index)} samples, the manifest says {described.num_samples}; {REMEDY}")
        while len(self._open) >= self._max_open:
            self._release(next(iter(self._open)))
        if self.remote is not None:
            descriptor = self.remote.open(described, self._release_all)
        else:
            path = Path(self.folder) / described.name
            with _reaching(path):
                descriptor = open_regular(path)
        members = np.empty((len(index), len(self._fields), 3), dtype=np.int64)  # (num_samples, fields, 3)
        for place, field in enumerate(self._fields):
            for part, name in enumerate(MEMBER.names or ()):
                members[:, place, part] = index[field][name]
        offsets, sizes = members[..., 0], members[..., 1]
        # Not their sum: it may overflow.
        outside = (offsets < 0) | (sizes < 0) | (offsets > described.bytes) | (sizes > described.bytes)
        members[outside] = (0, 0, -1)  # a damaged row: it fails its crc32 when it is read
        held = os.fstat(descriptor).st_size  # no more is asked for, whatever index and manifest say
        np.minimum(offsets, held, out=offsets)
        np.minimum(sizes, held + 1, out=sizes)
        begins, lengths = offsets.min(1), (offsets + sizes).max(1) - offsets.min(1)
        lengths[lengths > sizes.sum(1) + MOST_BETWEEN] = 0
        members = np.column_stack([begins, lengths, members.reshape(len(index), -1)])
        self._open[shard] = Opened(descriptor, index["key"].copy(), members)
        return self._open[shard]

    def _index(self, shard: Shard) -> bytes:
        if self.remote is not None:
            return self.remote.index(shard)
        path = Path(self.folder) / shard.index_name
        with _reaching(path):
            return read_bytes(path)

    def _release(self, shard: int) -> None:
        os.close(self._open.pop(shard).descriptor)

    def _release_all(self) -> None:
        while self._open:
            self._release(next(iter(self._open)))

    def close(self) -> None:
        """Close the shards held open and end the fetching ahead; reading opens them again."""
        self._release_all()
        if self.remote is not None:
            self.remote.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self._release_all()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


@cache
def fastest_crc32() -> Callable[[Content], int]:
    """The checksum of members: isal's crc32 where that is installed, which is several times as fast; else zlib's. The
    numbers are the same.
    """
    try:
        from isal import isal_zlib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return zlib.crc32
    crc32: Callable[[Content], int] = isal_zlib.crc32
    return crc32


@contextmanager
def _reaching(path: Path) -> Iterator[None]:
    """A local file that cannot be opened is unavailable: what it holds may be sound."""
    try:
        yield
    except OSError as error:
        remedy = "see that it is there and may be read; the run continues from its last checkpoint"
        raise Unavailable(f"{path}: cannot open it ({error.strerror}); {remedy}") from error
