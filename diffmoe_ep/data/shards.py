"""A dataset on disk: a folder of webdataset tars, an index beside each, one manifest; and the order in which samples are visited.

    manifest.json            what the dataset is, and size, count and checksums of every shard (class `Manifest`)
    NAME-000000.tar          a plain webdataset tar: members KEY.cls and KEY.pixels.npy or KEY.moments.npy
    NAME-000000.index.npy    a row per sample: its key, and offset, size and crc32 of each member (npy, no pickle)

The index turns a sample into one `pread` per member, so any sample of any shard is reached at once and a resumed run starts anywhere.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffmoe_ep.config import UserError
from diffmoe_ep.data.keyed import keyed, permutation

FORMAT = 1
MANIFEST_NAME = "manifest.json"
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])
REMEDY = "prepare the dataset (again), for the digits: python -m data_prep digits --out data/digits"
DTYPES = {"pixels": ("uint8", "float16", "float32"), "moments": ("float16", "float32")}


class DataError(UserError):
    """A dataset that cannot be used as it lies there; the message names file, finding and remedy and is shown to the user as it is."""


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset, and what proves that it is whole."""

    name: str  # plain file name, ends in .tar
    bytes: int  # size of the tar
    num_samples: int  # samples in it, at least one
    sha256: str  # of the tar
    index_sha256: str  # of the index beside it

    @property
    def index_name(self) -> str:
        """File name of the index that lies beside the tar."""
        return self.name.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class Manifest:
    """What a dataset is: everything needed to turn its stored bytes into final latents and labels."""

    name: str  # the shards are called NAME-000000.tar, ...
    kind: Literal["pixels", "moments"]  # what is stored: images, or mean and log-variance of a VAE's posterior
    shape: tuple[int, int, int]  # (C, H, W) of a final latent
    dtype: str  # of the stored array
    scale: float  # final latent = stored (pixels) or posterior sample (moments) * scale + shift
    shift: float  # see scale
    num_classes: int  # labels are 0 .. num_classes - 1
    class_names: tuple[str, ...]  # one per class, or none at all
    licence: str  # of the data, and where they come from
    flips: int = 1  # 2: moments of the mirrored image are stored beside those of the image
    num_samples: int = 0  # over all shards
    shards: tuple[Shard, ...] = ()  # in storage order

    @property
    def fields(self) -> tuple[str, str]:
        """Names of the members that every sample has, in the order in which the tar holds them."""
        return ("cls", f"{self.kind}.npy")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array: (C, H, W) of pixels, (flips, 2C, H, W) of moments."""
        channels, height, width = self.shape
        return self.shape if self.kind == "pixels" else (self.flips, 2 * channels, height, width)

    def to_json(self) -> str:
        """The manifest file's text; equal manifests give equal bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest file; DataError when it is absent, unreadable, incomplete or inconsistent."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the manifest ({error.strerror}); {REMEDY}") from error
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file ({error}); {REMEDY}") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: Any, where: str) -> Manifest:
    """Check a manifest's JSON content, strictly, and build the Manifest; `where` opens the messages of the DataErrors raised."""
    kinds = {
        "format": int, "name": str, "kind": str, "shape": list, "dtype": str, "scale": float, "shift": float, "num_classes": int,
        "class_names": list, "licence": str, "flips": int, "num_samples": int, "shards": list,
    }  # fmt: skip
    facts = _typed(content, kinds, where)
    shard_kinds = {"name": str, "bytes": int, "num_samples": int, "sha256": str, "index_sha256": str}
    entries = [_typed(entry, shard_kinds, f"{where}: shards[{number}]") for number, entry in enumerate(facts["shards"])]
    shards = tuple(Shard(**entry) for entry in entries)

    def demand(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise DataError(f"{where}: {key} is {facts[key]!r}, expected {expected}; {REMEDY}")

    demand(facts["format"] == FORMAT, "format", f"{FORMAT}, the one this version reads")
    demand(_is_plain(facts["name"]), "name", "a plain name of letters, digits, '_', '-', '.'")
    demand(facts["kind"] in DTYPES, "kind", " or ".join(DTYPES))
    demand(facts["dtype"] in DTYPES[facts["kind"]], "dtype", f"one of {', '.join(DTYPES[facts['kind']])} for {facts['kind']}")
    demand(len(facts["shape"]) == 3 and all(type(size) is int and size > 0 for size in facts["shape"]), "shape", "[C, H, W], all above 0")
    demand(math.isfinite(facts["scale"]) and facts["scale"] != 0, "scale", "a finite number other than 0")
    demand(math.isfinite(facts["shift"]), "shift", "a finite number")
    demand(facts["num_classes"] > 0, "num_classes", "a number above 0")
    demand(all(type(name) is str for name in facts["class_names"]), "class_names", "a list of texts")
    demand(len(facts["class_names"]) in (0, facts["num_classes"]), "class_names", f"{facts['num_classes']} names (num_classes), or none")
    demand(facts["flips"] in ((1,) if facts["kind"] == "pixels" else (1, 2)), "flips", "1, or 2 for moments")
    demand(facts["num_samples"] > 0 and bool(shards), "num_samples", "samples: the dataset is empty")
    for shard in shards:
        if not (_is_plain(shard.name) and shard.name.endswith(".tar")):
            raise DataError(f"{where}: shard name {shard.name!r} is not a plain file name that ends in .tar; {REMEDY}")
        if shard.num_samples < 1 or shard.bytes < 1 or not all(re.fullmatch("[0-9a-f]{64}", s) for s in (shard.sha256, shard.index_sha256)):
            raise DataError(f"{where}: shard {shard.name} has no samples, no bytes or no checksum ({asdict(shard)}); {REMEDY}")
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{where}: a shard is named twice; {REMEDY}")
    total = sum(shard.num_samples for shard in shards)
    demand(total == facts["num_samples"], "num_samples", f"{total}, the sum over the shards")
    del facts["format"]
    return Manifest(**facts | {"shape": tuple(facts["shape"]), "class_names": tuple(facts["class_names"]), "shards": shards})


def _typed(content: Any, kinds: dict[str, type], where: str) -> dict[str, Any]:
    """The content as a dict that has exactly the keys of `kinds`, each of its type (a whole number may stand for a float)."""
    if not isinstance(content, dict):
        raise DataError(f"{where}: is a {type(content).__name__}, expected an object with keys {', '.join(kinds)}; {REMEDY}")
    missing, unknown = [key for key in kinds if key not in content], [key for key in content if key not in kinds]
    if missing or unknown:
        found = f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        raise DataError(f"{where}: wrong keys ({found}); {REMEDY}")
    typed = {key: float(content[key]) if kind is float and type(content[key]) is int else content[key] for key, kind in kinds.items()}
    for key, kind in kinds.items():
        if type(typed[key]) is not kind:
            raise DataError(f"{where}: {key} is {typed[key]!r} ({type(typed[key]).__name__}), expected {kind.__name__}; {REMEDY}")
    return typed


def _is_plain(name: str) -> bool:
    """Whether a name is safe as a file name that cannot leave its folder."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def load_index(path: Path, fields: Sequence[str]) -> np.ndarray:
    """Memory-map a shard's index, (num_samples,) rows of key and, per field, offset, size, crc32; DataError if it is not one."""
    try:
        index = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, SyntaxError, EOFError) as error:
        raise DataError(f"{path}: cannot read the index ({error}); {REMEDY}") from error
    columns: Mapping[str, Any] = index.dtype.fields or {}
    if list(columns) != ["key", *fields] or columns["key"][0].kind != "S" or any(columns[field][0] != MEMBER for field in fields):
        raise DataError(f"{path}: holds columns {index.dtype}, expected key, {', '.join(fields)}; {REMEDY}")
    if index.ndim != 1 or index.offset + index.nbytes != size:
        raise DataError(f"{path}: has {size} bytes, its header asks for {index.offset + index.nbytes}; {REMEDY}")
    return index


def shard_problem(folder: Path, shard: Shard, fields: Sequence[str], checksum: bool) -> str | None:
    """What is wrong with a shard or its index, in words that name the file, or None; `checksum` reads every byte."""
    path = folder / shard.name
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{path} has {size} bytes, the manifest says {shard.bytes}"
        count = len(load_index(folder / shard.index_name, fields))
        if count != shard.num_samples:
            return f"{folder / shard.index_name} has {count} samples, the manifest says {shard.num_samples}"
        for name, expected in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)) if checksum else ():
            if sha256_of(folder / name) != expected:
                return f"{folder / name} is damaged (its sha256 is not the manifest's)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except DataError as error:
        return str(error).removesuffix(f"; {REMEDY}")
    return None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_manifest(folder: Path) -> DataError:
    """Why a folder has no manifest, as the error to raise."""
    if not folder.is_dir():
        return DataError(f"data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}; {REMEDY}")
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if inside:
        return DataError(f"data folder {folder} has no {MANIFEST_NAME}, but there is one in {', '.join(inside)}; name one of these")
    state = f"has no {MANIFEST_NAME} (was its preparation cut short?)" if any(folder.iterdir()) else "is empty"
    return DataError(f"data folder {folder} {state}; {REMEDY}")


class Dataset:
    """A prepared dataset, open for reading single samples; cheap to pickle and safe to fork (reads carry their own offset)."""

    def __init__(self, folder: Path, manifest: Manifest, max_open: int = 128) -> None:
        """Trust `manifest`; `open` is the way in that checks. At most `max_open` shards are held open at once."""
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = hashlib.sha256(manifest.to_json().encode()).hexdigest()
        self._max_open = max_open
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # shard -> file descriptor, index

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Open a prepared folder after a quick check (manifest, every file's size, every index's count); DataError names what is wrong."""
        folder = Path(folder)
        try:
            if not (folder / MANIFEST_NAME).is_file():
                raise _no_manifest(folder)
        except OSError as error:
            raise DataError(f"data folder {folder} cannot be read ({error.strerror}); grant access to it") from error
        dataset = cls(folder, read_manifest(folder / MANIFEST_NAME))
        dataset._raise_problems(checksum=False)
        return dataset

    def verify(self) -> None:
        """Compare every byte with the manifest's checksums; DataError names the damaged files."""
        self._raise_problems(checksum=True)

    def _raise_problems(self, checksum: bool) -> None:
        found = [shard_problem(self.folder, shard, self.manifest.fields, checksum) for shard in self.manifest.shards]
        problems = [problem for problem in found if problem]
        if problems:
            more = f" (and {len(problems) - 3} more of {len(found)} shards)" if len(problems) > 3 else ""
            raise DataError(f"shards do not match {self.folder / MANIFEST_NAME}: {', '.join(problems[:3])}{more}; {REMEDY}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard, in storage order."""
        return tuple(shard.num_samples for shard in self.manifest.shards)

    def read(self, shard: int, sample: int) -> dict[str, bytes]:
        """The stored bytes of a sample's fields; DataError when the file is short, gone or fails its crc32."""
        descriptor, index = self._opened(shard)
        row = index[sample]
        members = {}
        for field in self.manifest.fields:
            offset, size, crc32 = row[field].item()
            try:
                content = os.pread(descriptor, size, offset)
            except OSError as error:
                raise DataError(f"{self.where(shard, sample)}: cannot read {field} ({error.strerror}); {REMEDY}") from error
            if len(content) != size or zlib.crc32(content) != crc32:
                state = "truncated" if len(content) != size else "damaged (crc32 differs)"
                raise DataError(f"{self.where(shard, sample)}: {field} is {state}; {REMEDY}")
            members[field] = content
        return members

    def where(self, shard: int, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        key = self._opened(shard)[1][sample]["key"].decode(errors="replace")
        return f"{self.folder / self.manifest.shards[shard].name}, key {key}"

    def _opened(self, shard: int) -> tuple[int, np.ndarray]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        facts = self.manifest.shards[shard]
        index = np.array(load_index(self.folder / facts.index_name, self.manifest.fields))  # a copy: a map would hold a second file open
        if len(index) != facts.num_samples:
            raise DataError(f"{self.folder / facts.index_name} has {len(index)} samples, the manifest says {facts.num_samples}; {REMEDY}")
        try:
            descriptor = os.open(self.folder / facts.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self.folder / facts.name}: cannot open the shard ({error.strerror}); {REMEDY}") from error
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[shard] = (descriptor, index)
        return self._open[shard]

    def close(self) -> None:
        """Close the shards held open; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}


class Order:
    """Which sample stands at which position of the endless stream: a pure function of shard sizes, seed and block.

    An epoch visits every sample once. Its shards are permuted, cut into runs of `block` shards, and the samples of each run are
    permuted together, so reading stays within `block` shards at a time. `block` 0 keeps the storage order in every epoch.
    """

    def __init__(self, sizes: Sequence[int], seed: int, block: int) -> None:
        """Sizes: samples of each shard, all above 0; seed: 0 .. 2^64 - 1; block: shards shuffled together, 0 for no shuffling."""
        if not sizes or min(sizes) < 1 or block < 0:
            raise ValueError(f"an order needs shards with samples and a block of 0 or more shards; got {len(sizes)} shards, block {block}")
        self.seed = seed
        self.block = block
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self.total = int(self._sizes.sum())
        self._layout: tuple[int, np.ndarray, np.ndarray] = (-1, self._sizes, self._sizes)  # of the epoch last asked for

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, sample in it) at a position, 0 or above."""
        epoch, place = divmod(position, self.total)
        shards, starts = self._epoch(epoch)
        if self.block:
            number = (int(np.searchsorted(starts, place, side="right")) - 1) // self.block
            begin, end = starts[number * self.block], starts[min((number + 1) * self.block, len(shards))]
            place = begin + _block_permutation(self.seed, epoch, number, int(end - begin))[place - begin]
        slot = int(np.searchsorted(starts, place, side="right")) - 1
        return int(shards[slot]), int(place - starts[slot])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in their order, (num_shards,), and the place at which each starts, (num_shards + 1,)."""
        if self._layout[0] != epoch:
            shards = permutation(keyed(self.seed, epoch, "order"), len(self._sizes)) if self.block else np.arange(len(self._sizes))
            starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._sizes[shards])])
            self._layout = (epoch, shards, starts)
        return self._layout[1], self._layout[2]


@lru_cache(maxsize=4)
def _block_permutation(seed: int, epoch: int, block: int, count: int) -> np.ndarray:
    """The order of a block's samples; kept, since neighbouring positions share it. Part 0 of the stream orders the epoch's shards."""
    return permutation(keyed(seed, epoch, "order", part=block + 1), count)
