"""Write one shard: a reproducible webdataset tar and the index beside it, each aside first, synced and renamed when it
is whole.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from diffmoe_ep.data.manifest import DataError, Manifest, Shard
from diffmoe_ep.data.shards import MEMBER, sha256_of

Sample = tuple[str, Mapping[str, bytes]]  # key, field -> bytes


def write_shard(folder: Path, name: str, samples: Iterable[Sample], manifest: Manifest) -> Shard | None:
    """Write a tar and its index, sample by sample, so that none but the last is held; None, and no file, if there are
    no samples.

    Owner, mode and time in the tar are fixed, so its bytes depend on the samples alone. ValueError for keys or fields
    that do not fit.
    """
    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        return None
    written: dict[str, dict[str, tuple[int, int]]] = {}  # key -> field -> size, crc32
    with aside(folder / name) as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for key, fields in (sample for samples in ((first,), iterator) for sample in samples):
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key) or key in written:
                raise ValueError(
                    f"{manifest.name}: keys must differ and consist of 1 to 64 letters, digits, '_' or '-'; got {key!r}"
                )
            if tuple(sorted(fields)) != manifest.fields:
                raise ValueError(
                    f"{manifest.name}: sample {key} has fields {sorted(fields)}, expected {list(manifest.fields)}"
                )
            writer.write({"__key__": key, **{field: fields[field] for field in manifest.fields}})
            written[key] = {field: (len(fields[field]), zlib.crc32(fields[field])) for field in manifest.fields}
    index = _index_of(folder / name, written, manifest)
    shard = Shard(name, (folder / name).stat().st_size, len(index), sha256_of(folder / name), "")
    with aside(folder / shard.index_name) as file:
        np.lib.format.write_array(file, index, version=(1, 0), allow_pickle=False)
    return replace(shard, index_sha256=sha256_of(folder / shard.index_name))


def _index_of(path: Path, written: dict[str, dict[str, tuple[int, int]]], manifest: Manifest) -> np.ndarray:
    """The index of a finished tar, taken from the tar itself; so building it proves that what was written can be
    read.
    """
    width = max(map(len, written))
    index = np.zeros(len(written), dtype=[("key", f"S{width}"), *((field, MEMBER) for field in manifest.fields)])
    numbers = {key: number for number, key in enumerate(written)}
    found = 0
    with tarfile.open(path) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers otherwise
            key, _, field = member.name.partition(".")
            stored = tar.extractfile(member)
            crc32 = zlib.crc32(stored.read()) if stored is not None else -1
            if written.get(key, {}).get(field) != (member.size, crc32):
                raise DataError(f"{path}: {member.name} does not read back as it was written; check the disk")
            index[numbers[key]]["key"] = key.encode()
            index[numbers[key]][field] = (member.offset_data, member.size, crc32)
            found += 1
    if found != sum(map(len, written.values())):
        raise DataError(f"{path}: {found} members read back, more were written; check the disk")
    return index


@contextmanager
def aside(path: Path, owner: str = "") -> Iterator[BinaryIO]:
    """Write a file under a passing name (its own, if `owner` is), sync it, and give it its right name when it is
    whole.
    """
    partial = path.with_name(f"{path.name}{owner}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals into a DataError that names the folder."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot prepare {folder} ({error}); choose a folder that you may write to with --out"
        ) from error
