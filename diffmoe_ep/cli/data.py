"""Verbs that look after datasets: data index, check, stats, peek."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffmoe_ep.cli.options import Verb, option, positional, required
from diffmoe_ep.config import ConfigError

if TYPE_CHECKING:
    from diffmoe_ep.data.shards import Dataset


@dataclass(frozen=True, kw_only=True)
class Index:
    """Make a folder of someone's webdataset tars usable, without changing them."""

    folder: Path = positional("folder of uncompressed tars: a label and one npy for each key")
    out: Path | None = option(None, "folder for indexes, manifest and links to the tars (default: beside the tars)")
    kind: Literal["moments", "pixels"] = required("what the arrays are")
    array: str = option("npy", "of the arrays' members", "EXTENSION")
    label: str = option("cls", "of the labels' members", "EXTENSION")
    scale: float = required("final latent = stored * scale + shift; Stable Diffusion's VAE: 0.18215")
    shift: float = option(0.0, "see --scale")
    classes: int | None = option(None, "number of classes (default: the largest label + 1)")
    name: str | None = option(None, "of the dataset (default: the folder's)")
    license: str = option("not stated", "note on whose data they are and what may be done with them")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read every byte of a dataset and report all that is wrong with it; exit code 1 if anything is. Warns of samples
    whose values lie a thousand deviations away from those of all.
    """

    folder: str = positional("dataset folder")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset to look at."""

    folder: str = positional("dataset folder or URL")
    cache: str = option("cache", "folder for what is fetched from a URL")
    cache_gb: float = option(100.0, "bound of --cache in 10^9 bytes")
    allow_commands: bool = option(False, "let a pipe: URL run its command")


@dataclass(frozen=True, kw_only=True)
class Stats(Source):
    """Counts of the classes, mean and deviation of latents, bytes per sample."""

    samples: int = option(1000, "samples for the latents' mean and deviation")


@dataclass(frozen=True, kw_only=True)
class Peek(Source):
    """Draw some samples with their labels or captions."""

    out: Path = required("picture to write", "FILE.png")
    samples: int = option(25, "samples to draw")


def _index(options: Index) -> None:
    from tqdm import tqdm

    from diffmoe_ep.data.index import MemberSpec, index_folder

    if options.classes is not None and options.classes < 1:
        raise ConfigError(f"--classes is {options.classes}; it must be at least 1")
    spec = MemberSpec(
        kind=options.kind, label=options.label, array=options.array, scale=options.scale, shift=options.shift,
        num_classes=options.classes, name=options.name or options.folder.resolve().name, licence=options.license,
    )  # fmt: skip
    out = options.out or options.folder
    with tqdm(unit="tar", disable=not sys.stderr.isatty()) as bar:
        try:
            found = index_folder(options.folder, out, spec, lambda _: bar.update())
        except OSError as error:
            raise ConfigError(
                f"{options.folder} cannot be indexed into {out} ({error}); give folders that can be read and written"
            ) from error
    print("\n".join(found.problems), end="\n" if found.problems else "")
    manifest = found.manifest
    print(
        f"{out}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {manifest.kind} {manifest.dtype} "
        f"{manifest.stored_shape},"
        f" {manifest.num_classes} classes; {len(found.problems)} problems"
    )


def _check(options: Check) -> None:
    from tqdm import tqdm

    from diffmoe_ep.data.integrity import check_folder
    from diffmoe_ep.data.remote.fetch import is_remote

    if is_remote(options.folder):
        raise ConfigError(
            f"{options.folder} is a URL; check the folder before it is uploaded: what is fetched is always checked"
        )
    with tqdm(unit="sample", disable=not sys.stderr.isatty()) as bar:
        found = check_folder(Path(options.folder), bar.update)
    print("\n".join(found.problems), end="\n" if found.problems else "")
    for warning in found.warnings:
        print(f"warning: {warning}")
    print(
        f"{options.folder}: {found.num_samples} sound samples in {found.num_shards} shards, {len(found.problems)} "
        f"problems{f', {len(found.warnings)} warnings' if found.warnings else ''}"
    )
    if found.problems:
        sys.exit(1)


def _opened(options: Stats | Peek) -> "Dataset":
    from diffmoe_ep.data.remote.fetch import Access
    from diffmoe_ep.data.shards import Dataset

    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; it must be at least 1")
    if not options.cache_gb > 0:
        raise ConfigError(f"--cache-gb is {options.cache_gb}; it must be greater than 0")
    access = Access(cache=options.cache, cache_gb=options.cache_gb, allow_commands=options.allow_commands, retries=3)
    return Dataset.open(options.folder, access)


def _stats(options: Stats) -> None:
    from tqdm import tqdm

    from diffmoe_ep.data.inspect import stats

    dataset = _opened(options)
    with tqdm(unit="sample", disable=not sys.stderr.isatty()) as bar:
        found = stats(dataset, options.samples, bar.update)
    print("\n".join(found.lines()))


def _peek(options: Peek) -> None:
    from diffmoe_ep.data.inspect import peek

    dataset = _opened(options)
    try:
        peek(dataset, options.out, options.samples)
    except OSError as error:
        raise ConfigError(
            f"--out {options.out} cannot be written ({error.strerror or error}); give a file in a folder that exists"
        ) from error
    print(f"written to {options.out}")


VERBS = (
    Verb(("data", "index"), Index, _index),
    Verb(("data", "check"), Check, _check),
    Verb(("data", "stats"), Stats, _stats),
    Verb(("data", "peek"), Peek, _peek),
)
