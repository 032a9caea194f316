"""The second mode of reading: plain webdataset tars that nobody has indexed, each worker drawing tars at random, with
replacement.

It needs nothing of a dataset but its tars, and promises less than the indexed mode:

- Which samples are read depends on ranks, workers and restarts. Each worker of each rank draws tars by a seed of its
  own, made of the run's seed, its rank, its number and the position at which the stream was started; so a start can be
  repeated, but a run that goes on from a checkpoint draws anew instead of reading what the uncut run would have read.
- There are no epochs: after as many samples as there are, about a third were not seen.
- A bad sample is passed over, counted and listed; the next one takes its place. What is missing at the end of a tar is
  not noticed.

What does hold: positions go on where they stood, and noise, time, flips and dropping are keyed by them as ever; only
the images differ.
"""

import hashlib
import io
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.config.foreign import open_regular
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.codec import Caption, decode_array, decode_label
from diffmoe_ep.data.index import MemberSpec, manifest_of
from diffmoe_ep.data.latent import oriented
from diffmoe_ep.data.loader.assemble import assemble
from diffmoe_ep.data.loader.draw import Draw
from diffmoe_ep.data.loader.micro_steps import RankSlice, Result
from diffmoe_ep.data.loader.quarantine import Fault
from diffmoe_ep.data.loader.reader import RawSample
from diffmoe_ep.data.manifest import TAR_ERRORS, DataError, Manifest
from diffmoe_ep.data.remote.fetch import LONGEST_PAUSE, Access, Unavailable, check_url, chunks, is_remote, shown
from diffmoe_ep.data.rng import generator_for

MOST_BAD = 32  # times the samples of a batch that may be bad before it is full
LEAST_SEEN = 65_536  # samples that bad ones are counted against, however few were seen
ANY_SIZE = 1 << 40  # bytes that a tar may have as far as one knows


class Tar(NamedTuple):
    """Samples of a tar, or what was wrong with it."""

    url: str
    key: str
    members: dict[str, bytes]  # by extension; empty: the tar cannot be read further
    problem: str = ""


@dataclass(frozen=True)
class PlainTars:
    """Tars without an index, as a dataset to stream from."""

    urls: tuple[str, ...]  # paths or URLs
    manifest: Manifest  # what every sample is; it names no shards
    spec: MemberSpec  # extensions of the members
    access: Access
    shuffle: int = 1000  # samples that a worker has at hand and draws from

    @classmethod
    def open(
        cls,
        where: str,
        spec: MemberSpec,
        access: Access,
        condition: Literal["class", "text"] = "class",
        shuffle: int = 1000,
    ) -> "PlainTars":
        """Tars of a folder, of a URL, or of a pattern such as https://host/{000..127}.tar; the first sample tells what
        the others are.

        condition text: the member `spec.label` holds a caption in words. ConfigError or DataError for what cannot be
        read.
        """
        urls = _expanded(where)
        for url in urls:
            if is_remote(url):
                check_url(url, access)
        first = _first(urls[0], access)
        where = f"{shown(first.url)}, key {first.key}"
        if spec.array not in first.members or spec.label not in first.members:
            held = ", ".join(sorted(first.members))
            raise DataError(
                f"{where}: has no member {spec.array} and {spec.label} (it has {held}); say what its members are called"
            )
        try:
            manifest = manifest_of(first.members[spec.array], spec)
        except ValueError as error:
            raise DataError(f"{where}: {error}; say what the arrays are") from error
        if condition == "class" and spec.num_classes is None:
            raise ConfigError(f"{where}: no index tells how many classes there are; give their number")
        num_classes = spec.num_classes or 0 if condition == "class" else 0
        manifest = replace(manifest, condition=condition, num_classes=num_classes)
        return cls(urls, manifest, spec, access, shuffle)

    @property
    def names(self) -> tuple[str, ...]:
        """What the dataset is called in logs and messages."""
        first, last = shown(self.urls[0]), shown(self.urls[-1])
        return (first if len(self.urls) == 1 else f"{first} ... {last}",)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """What the samples are, as of a mixture."""
        return (self.manifest,)

    @property
    def problems(self) -> tuple[str, ...]:
        """Nothing is looked at when it is opened."""
        return ()

    @property
    def fingerprint(self) -> str:
        """Hash of the tars' names and of what a sample is; what they hold is not looked at."""
        lines = [self.manifest.to_json(), *map(shown, self.urls)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Nothing stays open between batches but in the workers."""

    def draw(self, seed: int) -> Iterator[Tar]:
        """Samples of tars drawn at random, for ever; Unavailable when too many tars in a row give none."""
        from webdataset.shardlists import ResampledShards

        wanted = (self.spec.array, self.spec.label)
        failed = 0
        for source in ResampledShards(list(self.urls), seed=seed, worker_seed=lambda: 0, deterministic=True):
            found, problem, url = 0, "it is empty", source["url"]
            try:
                for tar in _samples(url, self.access, wanted):
                    found += 1
                    yield tar
            except DataError:
                raise  # a program to fetch it with is missing
            except OSError as error:
                problem = _reason(error)
                print(f"{shown(url)}: {problem}; drawing another", file=sys.stderr, flush=True)
            except TAR_ERRORS as error:
                problem = _reason(error)
                yield Tar(url, "", {}, problem)
            failed = 0 if found else failed + 1
            if failed > self.access.retries:
                raise Unavailable(
                    f"{shown(url)} gave no sample ({problem}), nor did the {failed - 1} tars drawn before it; see that "
                    "they are there and "
                    "may be read; the run continues from its last checkpoint"
                )
            if failed:
                time.sleep(min(self.access.pause * 2 ** (failed - 1), LONGEST_PAUSE))


class ResampledSteps(IterableDataset["Result"]):
    """A rank's Batch of micro-step after micro-step; worker w of n makes every n-th of them."""

    def __init__(
        self, tars: PlainTars, data: DataConfig, seed: int, of_rank: RankSlice, text: CaptionSpec | None
    ) -> None:
        """As `IndexedSteps`."""
        self.first = 0  # micro-step that the next iteration starts at
        self._tars, self._seed, self._of_rank, self._text = tars, seed, of_rank, text
        self._draw = Draw(seed, data, tars.manifest)
        self._tolerant = data.max_bad_fraction > 0  # bad samples are passed over

    def __iter__(self) -> Iterator[Result]:
        info = get_worker_info()
        worker, count = (info.id, info.num_workers) if info is not None else (0, 1)
        start, part = self.first * self._of_rank.micro_step_samples, (self._of_rank.rank << 32) + worker
        seed = int(generator_for(self._seed, start, "resample", part=part).integers(2**62))
        source = _shuffled(self._tars.draw(seed), self._tars.shuffle, random.Random(seed))
        for micro_step in itertools.count(self.first + worker, count):
            try:
                yield self._batch(source, self._of_rank.positions(micro_step))
            except DataError as error:
                yield error
                return

    def address(self, position: int) -> str | None:  # noqa: ARG002
        """Nobody knows which sample was drawn."""
        return None

    def again(self, micro_step: int) -> Result | None:  # noqa: ARG002
        """Nobody can draw the same samples again."""
        return None

    def passes(self, position: int) -> dict[str, float]:  # noqa: ARG002
        """Nobody knows how often the tars were gone through."""
        return {}

    def num_seen(self, first: int, position: int) -> int:
        """Samples that bad ones among the positions `first` to `position` - 1 are counted against: those, at least
        `LEAST_SEEN`.
        """
        return max(position - first, LEAST_SEEN)

    def _batch(self, source: Iterator[Tar], positions: range) -> Result:
        draws, stored, faults = self._draw(positions), list[RawSample](), list[Fault]()
        for position, flipped in zip(positions, draws.flip, strict=True):
            array, condition = self._next_sound(source, position, faults, MOST_BAD * len(positions))
            values = oriented(array, self._tars.manifest, flipped)
            stored.append(RawSample(self._tars.manifest, values, condition))
        return assemble(positions, stored, draws, self._tars.manifest.num_classes, self._text), tuple(faults)

    def _next_sound(
        self, source: Iterator[Tar], position: int, faults: list[Fault], most_bad: int
    ) -> tuple[np.ndarray, int | Caption]:
        """Array and condition of the next sample that can be used; those passed over are added to the faults."""
        while True:
            tar = next(source)
            try:
                return self._decoded(tar)
            except ValueError as error:
                problem = f"{shown(tar.url)}, key {tar.key}: {error}"
                if not self._tolerant:
                    raise DataError(f"{problem}; mend it, or allow some with data.max_bad_fraction") from error
                if len(faults) == most_bad:
                    raise DataError(
                        f"{problem}; and the {len(faults)} samples before it are bad too; mend the data"
                    ) from error
                faults.append(Fault(shown(tar.url), tar.key, str(error), position, "the next sample"))

    def _decoded(self, tar: Tar) -> tuple[np.ndarray, int | Caption]:
        """ValueError for a sample that cannot be used."""
        spec, manifest = self._tars.spec, self._tars.manifest
        if tar.problem:
            raise ValueError(tar.problem)
        for extension in (spec.array, spec.label):
            if extension not in tar.members:
                raise ValueError(f"it has no member {extension}")
        fields = {f"{manifest.kind}.npy": tar.members[spec.array], "cls": tar.members[spec.label].strip()}
        array = decode_array(fields, manifest)
        if manifest.condition == "class":
            return array, decode_label(fields, manifest)
        words = fields["cls"].decode()
        if not words:
            raise ValueError(f"its caption {spec.label} is empty")
        return array, Caption(words)


def _expanded(where: str) -> tuple[str, ...]:
    """The tars that a folder, URL or pattern names."""
    from webdataset.shardlists import expand_urls

    folder = Path(where)
    if not is_remote(where) and folder.is_dir():
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        if not urls:
            raise DataError(f"data.folder {where} holds no .tar files; give a folder of uncompressed tars")
        return tuple(urls)
    try:
        return tuple(expand_urls(where)) or (where,)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.folder = {shown(where)} is no pattern ({error}); write it as https://host/{{000..127}}.tar"
        ) from error


def _first(url: str, access: Access) -> Tar:
    """The first sample of a tar; DataError if there is none."""
    try:
        found = next(_samples(url, access), None)
    except DataError:
        raise
    except (OSError, *TAR_ERRORS) as error:
        raise DataError(f"{shown(url)} cannot be read ({_reason(error)}); give uncompressed tars") from error
    if found is None:
        raise DataError(f"{shown(url)} holds no sample; give uncompressed tars of members KEY.EXTENSION")
    return found


def _reason(error: Exception) -> str:
    texts = [part for part in error.args if isinstance(part, str)] or [type(error).__name__]
    return texts[0].partition(" @ ")[0]  # behind it webdataset shows an object


def _samples(url: str, access: Access, wanted: Sequence[str] = ()) -> Iterator[Tar]:
    """The samples of a tar: neighbouring members of one name up to its first dot, all or the wanted ones.

    OSError for what cannot be fetched, one of `TAR_ERRORS` for what cannot be read.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    def select(name: str) -> bool:
        stem, _, extension = name.rpartition("/")[2].partition(".")
        return not (stem.startswith("__") and stem.endswith("__")) and (not wanted or extension in wanted)

    with closing(_opened(url, access)) as stream:
        files = ({**file, "__url__": url} for file in tar_file_iterator(stream, select_files=select))
        for sample in group_by_keys(files, lcase=False):
            yield Tar(
                url,
                sample["__key__"],
                {name: content for name, content in sample.items() if isinstance(content, bytes)},
            )


def _opened(url: str, access: Access) -> io.IOBase:
    if not is_remote(url):
        return io.BufferedReader(io.FileIO(open_regular(url)), 1 << 20)
    return io.BufferedReader(_Chunks(chunks(url, ANY_SIZE, access)), 1 << 20)


class _Chunks(io.RawIOBase):
    """Pieces of bytes as they come, read as one file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._rest = self._rest or next(self._pieces, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed and hasattr(self._pieces, "close"):
            self._pieces.close()  # ends the command behind it
        super().close()


def _shuffled(source: Iterator[Tar], size: int, drawn: random.Random) -> Iterator[Tar]:
    """Each sample in the place of one drawn from `size` that are at hand; what could not be read is passed on at
    once.
    """
    held: list[Tar] = []
    for tar in source:
        if tar.problem:
            yield tar
        elif len(held) < size:
            held.append(tar)
        else:
            place = drawn.randrange(size)
            yield held[place]
            held[place] = tar
