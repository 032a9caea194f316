"""Write a small dataset in one go: its samples in their order as shards, the manifest last; an interrupted or damaged
one is completed.

A file with its final name is whole. Finished shards are noted in a journal beside them, so a run that was cut short
keeps them; the journal goes when the manifest stands.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from data_prep.shard import Sample, aside, write_shard, writing_to
from diffmoe_ep.data.manifest import MANIFEST_NAME, DataError, Manifest, Shard, read_manifest
from diffmoe_ep.data.shards import Dataset, load_index, shard_problem

JOURNAL_NAME = "journal.jsonl"


def existing_dataset(folder: Path, wanted: Manifest, shard_size: int) -> Dataset | None:
    """The dataset that `write_dataset` would make, if it is there already and every checksum holds; None if there is
    work to do.

    DataError if the folder holds something else, which is never overwritten.
    """
    with writing_to(folder):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    shard = re.compile(rf"{re.escape(wanted.name)}-\d{{6,}}\.(tar|index\.npy)")
    own = (MANIFEST_NAME, MANIFEST_NAME + ".partial", JOURNAL_NAME)
    foreign = sorted(name for name in names if name not in own and not shard.fullmatch(name.removesuffix(".partial")))
    if foreign:
        raise DataError(
            f"{folder} holds other files ({', '.join(foreign[:3])}); choose another folder with --out, or empty this "
            "one"
        )
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except DataError:
        return None
    if not same_but_shards(manifest, wanted):
        found = f"{manifest.name}, {manifest.kind} {manifest.shape}"
        raise DataError(f"{folder} holds another data set ({found}); choose another folder with --out")
    stored = manifest.shards[0].num_samples
    if stored != min(shard_size, manifest.num_samples):
        raise DataError(
            f"{folder} holds shards of {stored} samples, not {shard_size}; use --shard-size {stored} or another --out"
        )
    dataset = Dataset(folder, manifest)
    try:
        dataset.verify()
    except DataError:
        return None
    return dataset


def same_but_shards(manifest: Manifest, wanted: Manifest) -> bool:
    """Whether a manifest says what is wanted; what format 1 could not say is taken as said."""
    unsaid = (
        {"image_size": wanted.image_size, "encoder": wanted.encoder, "source": wanted.source}
        if manifest.format == 1
        else {}
    )
    return replace(manifest, shards=(), num_samples=0, format=wanted.format, **unsaid) == wanted  # type: ignore[arg-type]


def write_dataset(
    folder: Path,
    samples: Iterable[Sample],
    wanted: Manifest,
    shard_size: int,
    progress: Callable[[int], object] | None = None,
) -> Dataset:
    """Write samples, in their order, as shards of `shard_size`, and return the finished dataset, its checksums
    verified.

    `wanted` is the manifest without shards. Shards of an earlier run that are whole are kept. The same samples make the
    same bytes. `progress` is called with the number of samples after each shard. DataError if the folder holds
    something else or cannot be written; ValueError for keys or fields that do not fit.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected 1 or more")
    dataset = existing_dataset(folder, wanted, shard_size)
    if dataset is not None:
        return dataset
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finished = _finished_shards(folder, wanted, shard_size)
        shards = []
        with (folder / JOURNAL_NAME).open("w") as journal:
            print(_journal_head(wanted, shard_size), file=journal)
            for number, group in enumerate(_groups(samples, shard_size)):
                name = f"{wanted.name}-{number:06d}.tar"
                shard = finished.get(name)
                if shard is None or not _holds(folder, shard, group, wanted):
                    shard = write_shard(folder, name, group, wanted)
                    assert shard is not None  # a group has samples
                shards.append(shard)
                print(json.dumps(asdict(shard)), file=journal, flush=True)
                if progress is not None:
                    progress(len(group))
        manifest = replace(wanted, shards=tuple(shards), num_samples=sum(shard.num_samples for shard in shards))
        with aside(folder / MANIFEST_NAME) as file:
            file.write(manifest.to_json().encode())
        expected = {MANIFEST_NAME} | {name for shard in shards for name in (shard.name, shard.index_name)}
        # Leftovers of a run that was cut short; `existing_dataset` saw that there are no other files.
        for path in folder.iterdir():
            if path.name not in expected:
                path.unlink()
    dataset = Dataset.open(folder)
    dataset.verify()
    return dataset


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group


def _holds(folder: Path, shard: Shard, group: list[Sample], wanted: Manifest) -> bool:
    """Whether a shard of an earlier run is whole and holds just these samples."""
    if shard_problem(folder, shard, wanted.fields, checksum=True):
        return False
    index = load_index(folder / shard.index_name, wanted.fields)
    found = [(row["key"].decode(), *(int(row[field]["crc32"]) for field in wanted.fields)) for row in index]
    return found == [(key, *(zlib.crc32(fields[field]) for field in wanted.fields)) for key, fields in group]


def _journal_head(wanted: Manifest, shard_size: int) -> str:
    return json.dumps({"manifest": asdict(wanted), "shard_size": shard_size})


def _finished_shards(folder: Path, wanted: Manifest, shard_size: int) -> dict[str, Shard]:
    """Shards that an earlier run finished, by name: from its manifest if it came to that, else from its journal."""
    try:
        return {shard.name: shard for shard in read_manifest(folder / MANIFEST_NAME).shards}
    except DataError:
        pass  # no manifest, or a damaged one: the journal decides
    journal = folder / JOURNAL_NAME
    head, *lines = journal.read_text().split("\n") if journal.exists() else [""]
    if head != _journal_head(wanted, shard_size):
        return {}
    shards = [Shard(**json.loads(line)) for line in lines[:-1]]  # what follows the last line's end is empty or torn
    return {shard.name: shard for shard in shards}
