"""`python -m data_prep SOURCE --out FOLDER`: prepare a data source for training; run again, it checks and completes what is there."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from data_prep import digits, write
from diffmoe_ep.data.shards import MANIFEST_NAME, DataError


def prepare_digits(out: Path, shard_size: int) -> None:
    """Write OUT/train and OUT/heldout, or say that they are there."""
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out} holds another data set ({MANIFEST_NAME}); choose another folder with --out")
    splits: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
    for split in splits:
        folder, facts = out / split, digits.facts(split)
        dataset, state = write.existing_dataset(folder, facts, shard_size), "already there, checksums hold"
        if dataset is None:
            with tqdm(desc=f"digits {split}", unit="sample", delay=2.0, leave=False) as bar:
                dataset, state = write.write_dataset(folder, digits.samples(split), facts, shard_size, bar.update), "written"
        manifest = dataset.manifest
        size = sum(shard.bytes for shard in manifest.shards)
        print(f"{folder}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {size:,} bytes ({state})")
    print(f"licence of the data: {digits.LICENCE}")


def shard_size(text: str) -> int:
    """Parse --shard-size."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of samples, 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 2, with one line on standard error, when the data or the folder are not usable."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    source = sources.add_parser("digits", help="scikit-learn's 1,797 handwritten digits (8x8): OUT/train (1,500) and OUT/heldout (297)")
    source.add_argument("--out", type=Path, required=True, help="folder to write; made if it does not exist")
    source.add_argument("--shard-size", type=shard_size, default=300, help="samples per shard (default 300)")
    options = parser.parse_args(arguments)
    try:
        prepare_digits(options.out, options.shard_size)
    except DataError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
