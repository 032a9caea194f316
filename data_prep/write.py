"""Write a dataset: reproducible webdataset tars, an index beside each, the manifest last; an interrupted or damaged one is completed.

Every file is written aside as NAME.partial, synced and renamed, so a file with its final name is whole. Finished shards are
noted in a journal beside them, so a run that was cut short keeps them; the journal goes when the manifest stands.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from diffmoe_ep.data.shards import (
    MANIFEST_NAME,
    MEMBER,
    DataError,
    Dataset,
    Manifest,
    Shard,
    load_index,
    read_manifest,
    sha256_of,
    shard_problem,
)

JOURNAL_NAME = "journal.jsonl"
Sample = tuple[str, Mapping[str, bytes]]  # key, field -> bytes


def existing_dataset(folder: Path, facts: Manifest, shard_size: int) -> Dataset | None:
    """The dataset that `write_dataset` would make, if it is there already and every checksum holds; None if there is work to do.

    DataError if the folder holds something else, which is never overwritten.
    """
    with writing_to(folder):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    shard = re.compile(rf"{re.escape(facts.name)}-\d{{6,}}\.(tar|index\.npy)")
    own = (MANIFEST_NAME, MANIFEST_NAME + ".partial", JOURNAL_NAME)
    foreign = sorted(name for name in names if name not in own and not shard.fullmatch(name.removesuffix(".partial")))
    if foreign:
        raise DataError(f"{folder} holds other files ({', '.join(foreign[:3])}); choose another folder with --out, or empty this one")
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except DataError:
        return None
    if replace(manifest, shards=(), num_samples=0) != facts:
        found = f"{manifest.name}, {manifest.kind} {manifest.shape}"
        raise DataError(f"{folder} holds another data set ({found}); choose another folder with --out")
    stored = manifest.shards[0].num_samples
    if stored != min(shard_size, manifest.num_samples):
        raise DataError(f"{folder} holds shards of {stored} samples, not {shard_size}; use --shard-size {stored} or another --out")
    dataset = Dataset(folder, manifest)
    try:
        dataset.verify()
    except DataError:
        return None
    return dataset


def write_dataset(
    folder: Path, samples: Iterable[Sample], facts: Manifest, shard_size: int, progress: Callable[[int], object] | None = None
) -> Dataset:
    """Write samples, in their order, as shards of `shard_size`, and return the finished dataset, its checksums verified.

    `facts` is the manifest without shards. Shards of an earlier run that are whole are kept. The same samples give the same
    bytes. `progress` is told the number of samples after each shard. DataError if the folder holds something else or cannot be
    written; ValueError for keys or fields that do not fit.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected 1 or more")
    dataset = existing_dataset(folder, facts, shard_size)
    if dataset is not None:
        return dataset
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finished = _finished_shards(folder, facts, shard_size)
        shards = []
        with (folder / JOURNAL_NAME).open("w") as journal:
            print(_journal_head(facts, shard_size), file=journal)
            for number, group in enumerate(_groups(samples, shard_size)):
                _check(group, facts)
                name = f"{facts.name}-{number:06d}.tar"
                shard = finished.get(name)
                if shard is None or not _holds(folder, shard, group, facts):
                    shard = _write_shard(folder, name, group, facts)
                shards.append(shard)
                print(json.dumps(asdict(shard)), file=journal, flush=True)
                if progress is not None:
                    progress(len(group))
        manifest = replace(facts, shards=tuple(shards), num_samples=sum(shard.num_samples for shard in shards))
        with _aside(folder / MANIFEST_NAME) as file:
            file.write(manifest.to_json().encode())
        expected = {MANIFEST_NAME} | {name for shard in shards for name in (shard.name, shard.index_name)}
        for path in folder.iterdir():  # leftovers of a run that was cut short; `existing_dataset` saw that there are no other files
            if path.name not in expected:
                path.unlink()
    dataset = Dataset.open(folder)
    dataset.verify()
    return dataset


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals into a DataError that names the folder."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot prepare {folder} ({error}); choose a folder that you may write to with --out") from error


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group


def _check(group: list[Sample], facts: Manifest) -> None:
    keys = [key for key, _ in group]
    bad = [key for key in keys if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key)]
    if bad or len(set(keys)) < len(keys):
        raise ValueError(f"{facts.name}: keys must differ and consist of 1 to 64 letters, digits, '_' or '-'; got {bad or keys}")
    for key, fields in group:
        if tuple(sorted(fields)) != facts.fields:
            raise ValueError(f"{facts.name}: sample {key} has fields {sorted(fields)}, expected {list(facts.fields)}")


def _holds(folder: Path, shard: Shard, group: list[Sample], facts: Manifest) -> bool:
    """Whether a shard of an earlier run is whole and holds just these samples."""
    if shard_problem(folder, shard, facts.fields, checksum=True):
        return False
    index = load_index(folder / shard.index_name, facts.fields)
    found = [(row["key"].decode(), *(int(row[field]["crc32"]) for field in facts.fields)) for row in index]
    return found == [(key, *(zlib.crc32(fields[field]) for field in facts.fields)) for key, fields in group]


def _write_shard(folder: Path, name: str, group: list[Sample], facts: Manifest) -> Shard:
    """Write one tar and its index; owner, mode and time in the tar are fixed, so its bytes depend on the samples alone."""
    with _aside(folder / name) as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for key, fields in group:
            writer.write({"__key__": key, **fields})
    index = _index_of(folder / name, group, facts)
    shard = Shard(name, (folder / name).stat().st_size, len(group), sha256_of(folder / name), "")
    with _aside(folder / shard.index_name) as file:
        np.lib.format.write_array(file, index, version=(1, 0), allow_pickle=False)
    return replace(shard, index_sha256=sha256_of(folder / shard.index_name))


def _index_of(path: Path, group: list[Sample], facts: Manifest) -> np.ndarray:
    """The index of a finished tar, taken from the tar itself; so building it proves that what was written can be read."""
    width = max(len(key) for key, _ in group)
    index = np.zeros(len(group), dtype=[("key", f"S{width}"), *((field, MEMBER) for field in facts.fields)])
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
        for row, (key, fields) in zip(index, group, strict=True):
            row["key"] = key.encode()
            for field, content in fields.items():
                member = members[f"{key}.{field}"]
                stored = tar.extractfile(member)
                if stored is None or stored.read() != content:
                    raise DataError(f"{path}: {member.name} does not read back as it was written; check the disk")
                row[field] = (member.offset_data, member.size, zlib.crc32(content))
    return index


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a passing name, sync it, and give it its own name when it is whole."""
    partial = path.with_name(path.name + ".partial")
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


def _journal_head(facts: Manifest, shard_size: int) -> str:
    return json.dumps({"facts": asdict(facts), "shard_size": shard_size})


def _finished_shards(folder: Path, facts: Manifest, shard_size: int) -> dict[str, Shard]:
    """Shards that an earlier run finished, by name: from its manifest if it came to that, else from its journal."""
    try:
        return {shard.name: shard for shard in read_manifest(folder / MANIFEST_NAME).shards}
    except DataError:
        pass  # no manifest, or a damaged one: the journal decides
    journal = folder / JOURNAL_NAME
    head, *lines = journal.read_text().split("\n") if journal.exists() else [""]
    if head != _journal_head(facts, shard_size):
        return {}
    shards = [Shard(**json.loads(line)) for line in lines[:-1]]  # what follows the last line's end is empty or torn
    return {shard.name: shard for shard in shards}
