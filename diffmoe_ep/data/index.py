"""Index webdataset tars that others made: where their samples lie, in what shape, and what is wrong with them; the tars
stay as they are.

The members of a sample (KEY.EXTENSION, next to each other) are taken as their extensions say: one holds the label as
decimal text, one the array as npy. Our names of these fields stand in the index only, so the tars' own names do not
matter.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from diffmoe_ep.config.foreign import open_binary
from diffmoe_ep.data.codec import decode
from diffmoe_ep.data.manifest import (
    DTYPES,
    MANIFEST_NAME,
    NPY_ERRORS,
    TAR_ERRORS,
    DataError,
    Manifest,
    Shard,
    parse_manifest,
)
from diffmoe_ep.data.shards import MEMBER, sha256_of

ANY_LABEL = 10**18  # classes that labels are read with until the largest is known


@dataclass(frozen=True)
class MemberSpec:
    """What the user says about tars that others made."""

    kind: Literal["pixels", "moments"]
    label: str = "cls"  # extension of the member that holds the label
    array: str = "npy"  # extension of the member that holds the array
    scale: float = 1.0  # final latent = stored * scale + shift
    shift: float = 0.0
    num_classes: int | None = None  # None: the largest label + 1
    name: str = "foreign"  # of the dataset
    licence: str = "not stated"  # of the data, and where they come from


@dataclass(frozen=True)
class Indexed:
    """What indexing found."""

    manifest: Manifest
    problems: tuple[str, ...]  # samples and tars that were left out, and why


@dataclass(frozen=True)
class _Sample:
    """A complete sample in a tar."""

    key: bytes
    members: dict[str, tuple[int, int, int]]  # our field -> offset, size, crc32


def index_folder(folder: Path, out: Path, spec: MemberSpec, progress: Callable[[str], object] | None = None) -> Indexed:
    """Write an index for each tar of `folder`, and the manifest, into `out`, which links to the tars if it is another
    folder.

    Samples that lack a member, repeat a key or cannot be read are left out and reported. DataError if nothing is left,
    or if `out` holds a manifest already.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar files; give the folder of a webdataset's (uncompressed) tars")
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out / MANIFEST_NAME} exists; remove it to index anew, or choose another folder with --out")
    scan = _Scan(spec)
    found: list[tuple[Path, list[_Sample]]] = []
    for path in paths:
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", path.name):
            try:
                found.append((path, list(scan.samples(path))))
            except OSError as error:
                scan.problems.append(f"{path}: left out, it cannot be read ({error.strerror})")
        else:
            scan.problems.append(f"{path}: left out, its name is not plain (letters, digits, '_', '-', '.'); rename it")
        if progress is not None:
            progress(path.name)
    if scan.manifest is None:
        raise DataError(f"{folder} holds no sample with members {spec.label} and {spec.array}; {_first(scan.problems)}")
    most = scan.largest_label + 1
    if spec.num_classes is not None and most > spec.num_classes:
        raise DataError(
            f"{folder} holds label {scan.largest_label}, --classes is {spec.num_classes}; use --classes {most} or more"
        )
    out.mkdir(parents=True, exist_ok=True)
    shards = tuple(_write_index(out, path, samples, scan.manifest.fields) for path, samples in found if samples)
    count = sum(shard.num_samples for shard in shards)
    manifest = replace(scan.manifest, num_classes=spec.num_classes or most, shards=shards, num_samples=count)
    parse_manifest(json.loads(manifest.to_json()), str(out / MANIFEST_NAME))  # DataError for what no dataset may be
    _write(out / MANIFEST_NAME, manifest.to_json().encode())
    return Indexed(manifest, tuple(scan.problems))


class _Scan:
    """Goes through tars, sample by sample, and keeps what is known of all of them."""

    def __init__(self, spec: MemberSpec) -> None:
        self._spec = spec
        self._wanted = {spec.label: "cls", spec.array: f"{spec.kind}.npy"}
        self._keys: set[bytes] = set()
        self.manifest: Manifest | None = None  # of the first sample; all must agree with it
        self.largest_label = -1
        self.problems: list[str] = []

    def samples(self, path: Path) -> Iterator[_Sample]:
        """The complete samples of a tar, in its order."""
        with open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            for key, members in self._groups(file, path):
                where = f"{path}, key {key}"
                missing = [extension for extension in self._wanted if extension not in members]
                if missing:
                    held = ", ".join(sorted(members)) or "none that is not hidden"
                    self.problems.append(f"{where}: left out, it has no member {' and '.join(missing)} (it has {held})")
                    continue
                if key.encode() in self._keys:
                    self.problems.append(f"{where}: left out, a sample with this key came before")
                    continue
                if any(offset + length > size for offset, length in members.values()):
                    self.problems.append(f"{where}: left out, the tar ends within it")
                    continue
                offsets = {field: members[extension][0] for extension, field in self._wanted.items()}
                contents = {
                    field: os.pread(file.fileno(), members[extension][1], offsets[field])
                    for extension, field in self._wanted.items()
                }
                label = contents["cls"]
                offsets["cls"] += len(label) - len(label.lstrip())  # many tools write white space around it
                contents["cls"] = label.strip()
                try:
                    self._check(contents)
                except ValueError as error:
                    self.problems.append(f"{where}: left out, {error}")
                    continue
                self._keys.add(key.encode())
                places = {
                    field: (offsets[field], len(content), zlib.crc32(content)) for field, content in contents.items()
                }
                yield _Sample(key.encode(), places)

    def _groups(self, file: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """Key and members (extension -> offset, size) of the samples: neighbouring files of one name up to its first
        dot.
        """
        group: dict[str, tuple[int, int]] = {}
        current: str | None = None
        try:
            for member in tar_members(file):
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isreg() or not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
                    continue
                key = folder + slash + stem
                if key != current:
                    if current is not None:
                        yield current, group
                    current, group = key, {}
                if extension in group:
                    self.problems.append(f"{path}, key {key}: member {extension} comes twice, the first is taken")
                else:
                    group[extension] = (member.offset_data, member.size)
        except TAR_ERRORS as error:
            self.problems.append(f"{path}: it cannot be read to its end ({error}); what comes before is taken")
        if current is not None:
            yield current, group

    def _check(self, contents: dict[str, bytes]) -> None:
        """ValueError for a sample that differs from the others or cannot be used."""
        if self.manifest is None:
            self.manifest = manifest_of(contents[f"{self._spec.kind}.npy"], self._spec)
        _, label = decode(contents, self.manifest)
        assert isinstance(label, int)
        self.largest_label = max(self.largest_label, label)


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar in its order; one of `TAR_ERRORS` where it makes no sense."""
    with tarfile.open(fileobj=file, mode="r:", errors="replace") as tar:
        before = -1
        for member in tar:
            if member.offset_data <= before:  # its size is below 0: it would go on for ever
                raise tarfile.ReadError("a member lies before the one that it follows")
            before = member.offset_data
            yield member


def manifest_of(content: bytes, spec: MemberSpec) -> Manifest:
    """What a dataset of arrays such as this npy is, as far as one can tell; ValueError for what no dataset holds."""
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except NPY_ERRORS as error:
        raise ValueError(f"its {spec.array} is not an npy file ({error})") from error
    expected = "(C, H, W)" if spec.kind == "pixels" else "(flips, 2C, H, W) with one or two flips"
    if array.dtype.name not in DTYPES[spec.kind] or array.ndim != len(expected.split(" with")[0].split(",")):
        raise ValueError(
            f"its array is {array.dtype} {array.shape}; {spec.kind} are {' or '.join(DTYPES[spec.kind])} {expected}"
        )
    channels, height, width = array.shape[-3:]
    flips = 1 if spec.kind == "pixels" else array.shape[0]
    if not 1 <= flips <= 2 or array.size == 0 or (spec.kind == "moments" and channels % 2):
        raise ValueError(f"its array has shape {array.shape}; {spec.kind} are {expected}")
    return Manifest(
        name=spec.name,
        kind=spec.kind,
        shape=(channels if spec.kind == "pixels" else channels // 2, height, width),
        dtype=array.dtype.name,
        scale=spec.scale,
        shift=spec.shift,
        num_classes=ANY_LABEL,
        class_names=(),
        licence=spec.licence,
        flips=flips,
    )


def _write_index(out: Path, tar: Path, samples: list[_Sample], fields: tuple[str, ...]) -> Shard:
    width = max(len(sample.key) for sample in samples)
    index = np.zeros(len(samples), dtype=[("key", f"S{width}"), *((field, MEMBER) for field in fields)])
    for row, sample in zip(index, samples, strict=True):
        row["key"] = sample.key
        for field in fields:
            row[field] = sample.members[field]
    file = io.BytesIO()
    np.lib.format.write_array(file, index, version=(1, 0), allow_pickle=False)
    link = out / tar.name
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(tar.resolve())
    elif not link.samefile(tar):
        raise DataError(f"{link} exists and is another file; choose an empty folder with --out")
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    shard = Shard(tar.name, tar.stat().st_size, len(samples), sha256_of(tar), digest)
    _write(out / shard.index_name, file.getvalue())
    return shard


def _write(path: Path, content: bytes) -> None:
    """Write a file aside and give it its name when it is whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _first(problems: list[str]) -> str:
    return problems[0] if problems else "the tars are empty"
