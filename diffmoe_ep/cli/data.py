"""Verbs that look after datasets: data index, check, stats, peek."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.config import ConfigError

if TYPE_CHECKING:
    from diffmoe_ep.data.shards import Dataset


def add(verbs: Any) -> None:
    """Declare data index, data check, data stats and data peek."""
    data = verbs.add_parser("data", help="index, check and look at datasets").add_subparsers(
        required=True, metavar="WHAT"
    )
    index = data.add_parser("index", help="make a folder of someone's webdataset tars usable, without changing them")
    index.add_argument("folder", type=Path, help="folder of uncompressed tars: a label and one npy for each key")
    index.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for indexes, manifest and links to the tars (default: beside the tars)",
    )
    index.add_argument("--kind", choices=("moments", "pixels"), required=True, help="what the arrays are")
    index.add_argument("--array", default="npy", metavar="EXTENSION", help="of the arrays' members (default npy)")
    index.add_argument("--label", default="cls", metavar="EXTENSION", help="of the labels' members (default cls)")
    index.add_argument(
        "--scale",
        type=float,
        required=True,
        help="final latent = stored * scale + shift; Stable Diffusion's VAE: 0.18215",
    )
    index.add_argument("--shift", type=float, default=0.0, help="see --scale (default 0)")
    index.add_argument("--classes", type=int, default=None, help="number of classes (default: the largest label + 1)")
    index.add_argument("--name", default=None, help="of the dataset (default: the folder's)")
    index.add_argument(
        "--licence", default="not stated", help="note on whose data they are and what may be done with them"
    )
    index.set_defaults(run=_index)
    check = data.add_parser(
        "check", help="read every byte of a dataset and report all that is wrong with it; exit code 1 if anything is"
    )
    check.add_argument("folder", help="dataset folder")
    check.set_defaults(run=_check)
    stats = data.add_parser("stats", help="counts of the classes, mean and deviation of latents, bytes per sample")
    stats.add_argument(
        "--samples", type=int, default=1000, help="samples for the latents' mean and deviation (default 1000)"
    )
    stats.set_defaults(run=_stats)
    peek = data.add_parser("peek", help="draw some samples with their labels or captions")
    peek.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="picture to write")
    peek.add_argument("--samples", type=int, default=25, help="samples to draw (default 25)")
    peek.set_defaults(run=_peek)
    for verb in (stats, peek):
        verb.add_argument("folder", help="dataset folder or URL")
        verb.add_argument("--cache", default="cache", help="folder for what is fetched from a URL (default cache)")
        verb.add_argument("--cache-gb", type=float, default=100.0, help="bound of --cache in 10^9 bytes (default 100)")
        verb.add_argument("--allow-commands", action="store_true", help="let a pipe: URL run its command")


def add_bench(kinds: Any) -> None:
    """Declare bench stream below the verb bench."""
    stream = kinds.add_parser(
        "stream", help="samples per second of one process, against reading the bytes and plain webdataset"
    )
    stream.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=None,
        help="dataset with labels (default: a synthetic one is written to --out)",
    )
    stream.add_argument(
        "--out", type=Path, default=Path("bench_stream"), help="folder for the synthetic set (default bench_stream)"
    )
    stream.add_argument(
        "--synthetic", type=int, default=16384, metavar="N", help="its samples of 32 KiB (default 16384: 0.6 GB)"
    )
    stream.add_argument("--samples", type=int, default=None, help="samples of a turn (default: all, at most 512)")
    stream.add_argument("--turns", type=int, default=40, help="turns, of which the fastest counts (default 40)")
    stream.add_argument("--workers", type=int, default=2, help="worker processes of the training loop (default 2)")
    stream.add_argument(
        "--step-seconds", type=float, default=0.5, help="length of its steps of 64 samples (default 0.5)"
    )
    stream.add_argument("--steps", type=int, default=20, help="its steps (default 20)")
    stream.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers to FILE")
    stream.set_defaults(run=_bench_stream)


def _bench_stream(options: argparse.Namespace) -> None:
    from diffmoe_ep.bench.stream import bench, write_json, write_synthetic
    from diffmoe_ep.parallel.allocator import keep_freed_memory

    keep_freed_memory()  # as a rank on CPUs; else all of them mostly wait for pages that the system clears
    for name in ("synthetic", "turns", "workers", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    folder = options.folder
    if folder is None:
        folder = options.out
        write_synthetic(folder, options.synthetic, (4, 32, 32), shard_size=1024)
    found = bench(folder, options.turns, options.samples, options.workers, options.step_seconds, options.steps)
    print("\n".join(found.lines()))
    if options.json is not None:
        write_json(found, options.json)
        print(f"written to {options.json}")


def _index(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from diffmoe_ep.data.index import MemberSpec, index_folder

    if options.classes is not None and options.classes < 1:
        raise ConfigError(f"--classes is {options.classes}; it must be at least 1")
    spec = MemberSpec(
        kind=options.kind, label=options.label, array=options.array, scale=options.scale, shift=options.shift,
        num_classes=options.classes, name=options.name or options.folder.resolve().name, licence=options.licence,
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
        f"{out}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {manifest.kind} {manifest.dtype} {manifest.stored_shape},"
        f" {manifest.num_classes} classes; {len(found.problems)} problems"
    )


def _check(options: argparse.Namespace) -> None:
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
    print(
        f"{options.folder}: {found.num_samples} sound samples in {found.num_shards} shards, {len(found.problems)} problems"
    )
    if found.problems:
        sys.exit(1)


def _opened(options: argparse.Namespace) -> "Dataset":
    from diffmoe_ep.data.remote.fetch import Access
    from diffmoe_ep.data.shards import Dataset

    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; it must be at least 1")
    if not options.cache_gb > 0:
        raise ConfigError(f"--cache-gb is {options.cache_gb}; it must be greater than 0")
    access = Access(cache=options.cache, cache_gb=options.cache_gb, allow_commands=options.allow_commands, retries=3)
    return Dataset.open(options.folder, access)


def _stats(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from diffmoe_ep.data.inspect import stats

    dataset = _opened(options)
    with tqdm(unit="sample", disable=not sys.stderr.isatty()) as bar:
        found = stats(dataset, options.samples, bar.update)
    print("\n".join(found.lines()))


def _peek(options: argparse.Namespace) -> None:
    from diffmoe_ep.data.inspect import peek

    dataset = _opened(options)
    try:
        peek(dataset, options.out, options.samples)
    except OSError as error:
        raise ConfigError(
            f"--out {options.out} cannot be written ({error.strerror or error}); give a file in a folder that exists"
        ) from error
    print(f"written to {options.out}")
