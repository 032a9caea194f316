"""What a dataset says about itself: the manifest, strictly read, and the error that every problem with data is.

The manifest is `manifest.json` beside the shards; equal datasets have equal manifests, byte for byte. Format 2 is
written; format 1, which knows labels only, is read, and stays what it is when it is written again.
"""

import json
import math
import re
import tarfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from diffmoe_ep.config import UserError
from diffmoe_ep.config.foreign import parse_json, read_bytes

FORMAT = 2
MANIFEST_NAME = "manifest.json"
REMEDY = "prepare the dataset (again), for the digits: python -m data_prep digits --out data/digits"
DTYPES = {"pixels": ("uint8", "float16", "float32"), "moments": ("float16", "float32")}
TEXT_DTYPE = "float16"  # of stored text features
BLOCK = 512  # bytes that a member's header takes in a tar
MOST_CLASSES = 10**7
# What tarfile and NumPy raise for bytes that are no tar or npy file, or announce more than there can be.
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, LookupError, RecursionError, OverflowError, MemoryError)
NPY_ERRORS = (ValueError, TypeError, SyntaxError, TokenError, EOFError, RecursionError, OverflowError, MemoryError)


class DataError(UserError):
    """A dataset that cannot be used as it lies there; the message names file, finding and remedy and is shown to the
    user as it is.
    """


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
class TextEncoderInfo:
    """Features of the captions that one text encoder made, and what identifies it."""

    name: str  # of the encoder: t5 or clip; the member is text.NAME.npy
    width: int  # of a token's features
    max_length: int  # tokens; longer captions were cut
    precision: str  # the encoder computed in: float32 or bfloat16
    fingerprint: str  # sha256 over the encoder's config, weights and tokenizer

    @property
    def field(self) -> str:
        """The member that holds the features of all captions of a sample, one after the other: (sum of lengths,
        width).
        """
        return f"text.{self.name}.npy"


@dataclass(frozen=True)
class Manifest:
    """What a dataset is: everything needed to turn its stored bytes into final latents and their conditions."""

    name: str  # the shards are called NAME-000000.tar, ...
    kind: Literal["pixels", "moments"]  # what is stored: images, or mean and log-variance of a VAE's posterior
    shape: tuple[int, int, int]  # (C, H, W) of a final latent
    dtype: str  # of the stored array
    scale: float  # final latent = stored (pixels) or posterior sample (moments) * scale + shift
    shift: float  # see scale
    num_classes: int  # labels are 0 .. num_classes - 1; 0 where the condition is text
    class_names: tuple[str, ...]  # one per class, or none at all
    licence: str  # of the data, and where they come from
    flips: int = 1  # 2: moments of the mirrored image are stored beside those of the image
    num_samples: int = 0  # over all shards
    shards: tuple[Shard, ...] = ()  # in storage order
    condition: Literal["class", "text"] = "class"  # what a sample has: a label (cls), or captions (captions.json)
    text: tuple[TextEncoderInfo, ...] = ()  # stored features of the captions, by encoder
    image_size: int = 0  # side of the square images that were stored or encoded; 0: not known
    encoder: str = ""  # sha256 over config and weights of the VAE that made the moments; empty: not known, or pixels
    source: str = ""  # sha256 over names and sizes of the files that the samples were made from; empty: not known
    format: int = FORMAT  # of the manifest file

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the members that every sample has, in the order in which the tar holds them."""
        condition = (
            ("cls",) if self.condition == "class" else ("captions.json", *(features.field for features in self.text))
        )
        return tuple(sorted((*condition, f"{self.kind}.npy")))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array: (C, H, W) of pixels, (flips, 2C, H, W) of moments."""
        channels, height, width = self.shape
        return self.shape if self.kind == "pixels" else (self.flips, 2 * channels, height, width)

    @property
    def least_bytes(self) -> int:
        """Bytes that a sample takes in a tar at least: its members' headers, and the array's values."""
        return BLOCK * len(self.fields) + np.dtype(self.dtype).itemsize * math.prod(self.stored_shape)

    def to_json(self) -> str:
        """The manifest file's text; equal manifests give equal bytes."""
        content = asdict(self)
        content = {key: content[key] for key in (KEYS_OF_FORMAT_1 if self.format == 1 else KEYS)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


KEYS = {
    "format": int,
    "name": str,
    "kind": str,
    "shape": list,
    "dtype": str,
    "scale": float,
    "shift": float,
    "num_classes": int,
    "class_names": list,
    "licence": str,
    "flips": int,
    "condition": str,
    "text": list,
    "image_size": int,
    "encoder": str,
    "source": str,
    "num_samples": int,
    "shards": list,
}
KEYS_OF_FORMAT_1 = {
    key: kind for key, kind in KEYS.items() if key not in ("condition", "text", "image_size", "encoder", "source")
}


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest file; DataError when it is absent, unreadable, incomplete or inconsistent."""
    try:
        content = parse_json(read_bytes(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the manifest ({error.strerror}); {REMEDY}") from error
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file ({error}); {REMEDY}") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: Any, where: str) -> Manifest:
    """Check a manifest's JSON content, strictly, and build the Manifest; `where` opens the messages of the DataErrors
    raised.
    """
    format_1 = isinstance(content, dict) and content.get("format") == 1
    known = _typed(content, KEYS_OF_FORMAT_1 if format_1 else KEYS, where)
    shards = tuple(Shard(**entry) for entry in entries(Shard, known["shards"], f"{where}: shards"))
    text = tuple(
        TextEncoderInfo(**entry) for entry in entries(TextEncoderInfo, known.get("text", []), f"{where}: text")
    )
    known |= {
        "shape": tuple(known["shape"]),
        "class_names": tuple(known["class_names"]),
        "shards": shards,
        "text": text,
    }
    manifest = Manifest(**known)
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    """DataError for the first value that makes no sense, by itself or beside another."""

    def demand(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise DataError(f"{where}: {key} is {_shown(getattr(manifest, key))}, expected {expected}; {REMEDY}")

    demand(manifest.format in (1, FORMAT), "format", f"{FORMAT} or 1, which this version reads")
    demand(_is_plain(manifest.name), "name", "a plain name of letters, digits, '_', '-', '.'")
    demand(manifest.kind in DTYPES, "kind", " or ".join(DTYPES))
    demand(
        manifest.dtype in DTYPES[manifest.kind],
        "dtype",
        f"one of {', '.join(DTYPES[manifest.kind])} for {manifest.kind}",
    )
    demand(
        len(manifest.shape) == 3 and all(type(size) is int and size > 0 for size in manifest.shape),
        "shape",
        "[C, H, W], all above 0",
    )
    demand(math.isfinite(manifest.scale) and manifest.scale != 0, "scale", "a finite number other than 0")
    demand(math.isfinite(manifest.shift), "shift", "a finite number")
    demand(manifest.condition in ("class", "text"), "condition", "class or text")
    if manifest.condition == "class":
        demand(0 < manifest.num_classes <= MOST_CLASSES, "num_classes", f"a number above 0, up to {MOST_CLASSES:,}")
        demand(not manifest.text, "text", "no text features where the condition is class")
    demand(manifest.condition == "class" or manifest.num_classes == 0, "num_classes", "0 where the condition is text")
    demand(all(type(name) is str for name in manifest.class_names), "class_names", "a list of texts")
    demand(
        len(manifest.class_names) in (0, manifest.num_classes),
        "class_names",
        f"{manifest.num_classes} names (num_classes), or none",
    )
    demand(manifest.flips in ((1,) if manifest.kind == "pixels" else (1, 2)), "flips", "1, or 2 for moments")
    demand(manifest.image_size >= 0, "image_size", "0 or more")
    for key in ("encoder", "source"):
        demand(re.fullmatch("([0-9a-f]{64})?", getattr(manifest, key)) is not None, key, "a sha256, or nothing")
    for features in manifest.text:
        sound = re.fullmatch("[a-z0-9]+", features.name) and re.fullmatch("[0-9a-f]{64}", features.fingerprint)
        demand(
            bool(sound) and min(features.width, features.max_length) > 0,
            "text",
            "encoders with name, width, max_length, fingerprint",
        )
    demand(
        len({features.name for features in manifest.text}) == len(manifest.text), "text", "encoders of different names"
    )
    demand(manifest.num_samples > 0 and bool(manifest.shards), "num_samples", "samples: the dataset is empty")
    for shard in manifest.shards:
        if not (_is_plain(shard.name) and shard.name.endswith(".tar")):
            raise DataError(
                f"{where}: shard name {shard.name[:80]!r} is not a plain file name that ends in .tar; {REMEDY}"
            )
        if (
            shard.num_samples < 1
            or shard.bytes < 1
            or not all(re.fullmatch("[0-9a-f]{64}", s) for s in (shard.sha256, shard.index_sha256))
        ):
            raise DataError(
                f"{where}: shard {shard.name} has no samples, no bytes or no checksum ({asdict(shard)}); {REMEDY}"
            )
        if shard.num_samples * manifest.least_bytes > shard.bytes:
            raise DataError(
                f"{where}: shard {shard.name} cannot hold {shard.num_samples} samples in {shard.bytes} bytes, a sample "
                f"takes {manifest.least_bytes} and more; {REMEDY}"
            )
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise DataError(f"{where}: a shard is named twice; {REMEDY}")
    total = sum(shard.num_samples for shard in manifest.shards)
    demand(total == manifest.num_samples, "num_samples", f"{total}, the sum over the shards")


def _shown(value: Any) -> str:
    """A value as a message shows it: tuples as the lists that they are in the file."""
    return repr(list(value) if isinstance(value, tuple) else value)[:200]


def entries(cls: type[Shard] | type[TextEncoderInfo], found: list[Any], where: str) -> list[dict[str, Any]]:
    """The entries of a list, each checked to have just the fields of `cls`."""
    kinds = {
        field.name: {"str": str, "int": int}[str(getattr(field.type, "__name__", field.type))] for field in fields(cls)
    }
    return [_typed(entry, kinds, f"{where}[{number}]") for number, entry in enumerate(found)]


def _typed(content: Any, kinds: dict[str, type], where: str) -> dict[str, Any]:
    """The content as a dict that has exactly the keys of `kinds`, each of its type (a whole number may stand for a
    float).
    """
    if not isinstance(content, dict):
        raise DataError(
            f"{where}: is a {type(content).__name__}, expected an object with keys {', '.join(kinds)}; {REMEDY}"
        )
    missing, unknown = [key for key in kinds if key not in content], [key for key in content if key not in kinds]
    if missing or unknown:
        found = f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        raise DataError(f"{where}: wrong keys ({found}); {REMEDY}")
    typed = dict(content)
    for key, kind in kinds.items():
        if kind is float and type(content[key]) is int and abs(content[key]) < 2**53:
            typed[key] = float(content[key])
        if type(typed[key]) is not kind:
            found = f"{repr(typed[key])[:80]} ({type(typed[key]).__name__})"
            raise DataError(f"{where}: {key} is {found}, expected {kind.__name__}; {REMEDY}")
    return typed


def _is_plain(name: str) -> bool:
    """Whether a name is safe as a file name that cannot leave its folder."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name) is not None
