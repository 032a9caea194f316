"""What a source hands over: its samples as they lie there, cut into units that do not depend on who prepares them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffmoe_ep.data.codec import StoredCondition

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason that is listed, beside the place in the source."""


@dataclass(frozen=True)
class Raw:
    """One sample of a source, not yet decoded."""

    place: str  # where it lies in the source, for the list of bad samples
    key: str  # of the sample in the shards: letters, digits, '_', '-'
    image: Callable[[], bytes] | np.ndarray | None  # reads the file; or pixels (C, H, W) uint8; None: see problem
    condition: StoredCondition | None  # label, or captions without features
    problem: str = ""  # why the sample cannot be used, if that shows already


@dataclass(frozen=True)
class Source:
    """All samples of a source in a fixed order: unit after unit, and in each unit one after the other."""

    num_units: int  # a unit is prepared by one rank, from its beginning to its end
    read: Callable[[int], Iterator[Raw]]  # the samples of a unit, in order
    fingerprint: str  # sha256 over names and sizes of the source's files
    condition: Literal["class", "text"]  # what its samples are conditioned on
    # Whether a unit is an archive of any length and makes a shard of every --shard-size samples; else it makes one.
    cut: bool = False
    num_samples: int | None = None  # over all units, where that is known
    class_names: tuple[str, ...] = ()  # one per class
    min_side: int = 1  # images with a shorter side are bad


def chunks(count: int, size: int) -> list[range]:
    """The places 0 .. count - 1 in runs of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def fingerprint_of(files: Iterable[tuple[str, int]]) -> str:
    """The sha256 over names and sizes of files, in their order."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
