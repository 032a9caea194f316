"""Everything that can be wrong with a prepared folder, found by reading every byte of it."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffmoe_ep.config.foreign import open_binary, regular_size
from diffmoe_ep.data.codec import decode
from diffmoe_ep.data.index import tar_members
from diffmoe_ep.data.manifest import MANIFEST_NAME, REMEDY, TAR_ERRORS, DataError, Shard, read_manifest
from diffmoe_ep.data.plausible import FAR, Spread, Usual
from diffmoe_ep.data.shards import Dataset, load_index, sha256_of

# How names of shards' files end, whole or cut short: who joins tars by a pattern would read such strangers too. Other
# files beside the shards (what a preparation notes of its progress and of bad images, a quarantine list) are nobody's
# samples.
OF_SHARDS = (".tar", ".index.npy", ".tar.partial", ".index.npy.partial")


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    num_shards: int
    num_samples: int  # that could be read as they should be
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()  # of samples that can be read and are hardly meant


def check_folder(folder: Path, progress: Callable[[int], object] | None = None) -> Checked:
    """Check all shards: sizes, checksums, indexes, tars, and of every sample its fields, shapes, values and label.

    DataError if there is no manifest that can be read, for then nothing is known of the rest. `progress` is called with
    the number of samples after each shard.
    """
    manifest = read_manifest(folder / MANIFEST_NAME)
    dataset = Dataset(folder, manifest)
    problems: list[str] = []
    keys: set[bytes] = set()
    num_good = 0
    spreads = array("d")  # of each sample: shard, sample, and its Spread
    for number, shard in enumerate(manifest.shards):
        problems += _of_files(folder, shard)
        try:
            index = np.array(load_index(folder / shard.index_name, manifest.fields))
        except DataError as error:
            problems.append(_short(error))
            continue
        if len(index) != shard.num_samples:
            problems.append(
                f"{folder / shard.index_name} has {len(index)} samples, the manifest says {shard.num_samples}"
            )
        if not (folder / shard.name).is_file():
            continue
        problems += _of_tar(folder / shard.name, index, manifest.fields)
        repeated = [key.decode(errors="replace") for key in index["key"].tolist() if key in keys or keys.add(key)]  # type: ignore[func-returns-value]
        problems += [f"{folder / shard.name}, key {key}: it has come before" for key in repeated]
        if len(index) == shard.num_samples:
            found = list(_of_samples(dataset, number, spreads))
            num_good += len(index) - len(found)
            problems += found
        dataset.close()
        if progress is not None:
            progress(shard.num_samples)
    named = {MANIFEST_NAME} | {name for shard in manifest.shards for name in (shard.name, shard.index_name)}
    strangers = sorted(
        path.name for path in folder.iterdir() if path.name not in named and path.name.endswith(OF_SHARDS)
    )
    problems += [f"{folder / name} is not in the manifest" for name in strangers]
    return Checked(len(manifest.shards), num_good, tuple(problems), tuple(_far_away(dataset, spreads)))


def _of_files(folder: Path, shard: Shard) -> Iterator[str]:
    path = folder / shard.name
    try:
        size = regular_size(path)
        if size != shard.bytes:
            yield f"{path} has {size} bytes, the manifest says {shard.bytes}"
        elif sha256_of(path) != shard.sha256:
            yield f"{path} is damaged (its sha256 is not the manifest's)"
    except OSError as error:
        yield f"{path} cannot be read ({error.strerror})"
    try:
        if sha256_of(folder / shard.index_name) != shard.index_sha256:
            yield f"{folder / shard.index_name} is damaged (its sha256 is not the manifest's)"
    except OSError:
        return  # reading the index says it


def _of_tar(path: Path, index: np.ndarray, fields: tuple[str, ...]) -> Iterator[str]:
    """Where the tar itself and its index differ: members that the one has and not the other."""
    members: dict[int, tuple[str, int]] = {}  # offset -> key, end
    try:
        with open_binary(path) as file:
            for member in tar_members(file):
                folder, slash, name = member.name.rpartition("/")
                members[member.offset_data] = (
                    folder + slash + name.partition(".")[0],
                    member.offset_data + member.size,
                )
    except (OSError, *TAR_ERRORS) as error:
        yield f"{path} cannot be read as a tar to its end ({error})"
    starts = np.array(sorted(members), dtype=np.int64)
    for row in index:
        key = row["key"].decode(errors="replace")
        for field in fields:
            offset, size = int(row[field]["offset"]), int(row[field]["size"])
            place = int(np.searchsorted(starts, offset, side="right")) - 1  # a label may begin behind white space
            found, end = members[int(starts[place])] if place >= 0 and offset < 2**63 else ("", 0)
            if found != key or offset + size > end:
                yield f"{path}, key {key}: {field} is missing in the tar at the place that the index says"
    indexed = {key.decode(errors="replace") for key in index["key"].tolist()}
    for key in sorted({key for key, _ in members.values()} - indexed):
        yield f"{path}, key {key}: the index does not have it"


def _of_samples(dataset: Dataset, shard: int, spreads: "array[float]") -> Iterator[str]:
    """What is wrong with a shard's samples; of those with which nothing is, where their values lie is noted."""
    for sample in range(dataset.manifest.shards[shard].num_samples):
        try:
            stored, _ = decode(dataset.read(shard, sample), dataset.manifest)
        except DataError as error:
            yield _short(error)
        except ValueError as error:
            yield f"{dataset.where(shard, sample)}: {error}"
        else:
            spreads.extend((shard, sample, *Spread.of_stored(stored, dataset.manifest)))


def _far_away(dataset: Dataset, spreads: "array[float]") -> Iterator[str]:
    rows = np.frombuffer(spreads).reshape(-1, 6)
    usual = Usual.of(rows[:, 2:])
    for shard, sample, *values in rows.tolist():
        spread = Spread(*values)
        if (distance := usual.distance(spread)) > FAR:
            yield (
                f"{dataset.where(int(shard), int(sample))}: its values, {spread.low:.3g} to {spread.high:.3g}, lie up "
                f"to {distance:.3g} deviations from the mean of all; a run may diverge at it: prepare it anew, or "
                "leave it out"
            )


def _short(error: DataError) -> str:
    return str(error).removesuffix(f"; {REMEDY}")
