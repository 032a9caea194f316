"""`python -m data_prep SOURCE --out FOLDER`: prepare a data source for training; run again, it checks and completes
what is there.

All sources but the digits are prepared by any number of processes at once, on any number of machines that share the
output folder: under torchrun, or started by hand with --rank and --world. The bytes are the same for any number of
them.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data_prep import digits, digits_captions, imagenet, journeydb, text_image, tiny_t5, write
from data_prep.encode import Encoding
from data_prep.prepare import Preparation
from data_prep.source import Source
from diffmoe_ep.config import UserError
from diffmoe_ep.data.manifest import MANIFEST_NAME, DataError
from diffmoe_ep.encoders.text import PRECISIONS, TextEncoder, load_text_encoder
from diffmoe_ep.encoders.vae import load_vae

SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")


def prepare_digits(options: argparse.Namespace) -> None:
    """Write OUT/train and OUT/heldout, or say that they are there."""
    _demand_no_dataset(options.out)
    for split in SPLITS:
        folder, wanted = options.out / split, digits.manifest_of(split)
        dataset, state = write.existing_dataset(folder, wanted, options.shard_size), "already there, checksums hold"
        if dataset is None:
            with tqdm(desc=f"digits {split}", unit="sample", delay=2.0, leave=False) as bar:
                dataset, state = (
                    write.write_dataset(folder, digits.samples(split), wanted, options.shard_size, bar.update),
                    "written",
                )
        manifest = dataset.manifest
        size = sum(shard.bytes for shard in manifest.shards)
        print(f"{folder}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {size:,} bytes ({state})")
    print(f"licence of the data: {digits.LICENCE}")


def prepare_digits_captions(options: argparse.Namespace) -> None:
    """Write OUT/train and OUT/heldout: canvases with captions."""
    _demand_no_dataset(options.out)
    encoding = _encoding(options)
    for split in SPLITS:
        number = options.samples if split == "train" else options.heldout
        kept = options.legible if split == "train" else 1.0
        source = digits_captions.source(
            split, number, options.image_size, options.shard_size, kept, options.caption_weights
        )
        _prepare(
            options,
            options.out / split,
            source,
            encoding,
            f"digits-captions-{split}",
            digits_captions.LICENCE,
            channels=1,
        )


def prepare_imagenet(options: argparse.Namespace) -> None:
    """Write labelled images."""
    source = imagenet.source(options.source, options.shard_size, options.min_side)
    _prepare(options, options.out, source, _encoding(options), options.name, options.license)


def prepare_text_image(options: argparse.Namespace) -> None:
    """Write images with captions."""
    source = text_image.source(options.source, options.shard_size, options.min_side)
    _prepare(options, options.out, source, _encoding(options), options.name, options.license)


def prepare_journeydb(options: argparse.Namespace) -> None:
    """Write JourneyDB's images with prompts and captions."""
    weights = (options.prompt_weight, options.caption_weight)
    source = journeydb.source(
        options.source, options.annotations, options.rank, options.world, *weights, options.min_side
    )
    _prepare(options, options.out, source, _encoding(options), options.name, options.license)


def prepare_tiny_t5(options: argparse.Namespace) -> None:
    """Write a text encoder for the captions of the digits."""
    _demand_no_dataset(options.out)
    with tqdm(desc="tiny T5", total=options.steps, unit="step", delay=2.0, leave=False) as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        made = tiny_t5.make_tiny_t5(
            options.out, options.steps, options.seed, options.width, options.layers, progress=show
        )
    learnt = f"trained for {options.steps} steps on captions of the digits" if options.steps else "random, not trained"
    print(f"{options.out}: a T5 encoder of bytes, {learnt} ({'written' if made else 'already there'})")


def _demand_no_dataset(out: Path) -> None:
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out} holds another data set ({MANIFEST_NAME}); choose another folder with --out")


def _encoding(options: argparse.Namespace) -> Encoding:
    """Load the encoders that the options name onto this rank's device."""
    device = torch.device(options.device or (f"cuda:{_local_rank()}" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)  # another number of threads may change a last bit; more ranks use more cores
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    vae = getattr(options, "vae", None)
    text: list[TextEncoder] = []
    names: tuple[Literal["t5", "clip"], ...] = ("t5", "clip")
    for name in names:
        folder = getattr(options, name, None)
        if folder is not None:
            length = getattr(options, f"{name}_length")
            text.append(
                load_text_encoder(name, folder, max_length=length, precision=options.text_precision, device=device)
            )
    return Encoding(
        image_size=options.image_size,
        flips=getattr(options, "flips", 1),
        vae=load_vae(vae, device) if vae is not None else None,
        text=tuple(text),
        batch=options.batch,
        readers=options.readers,
    )


def _prepare(
    options: argparse.Namespace,
    out: Path,
    source: Source,
    encoding: Encoding,
    name: str,
    licence: str,
    channels: int = 3,
) -> None:
    manifest = encoding.manifest(source, name, licence, channels)
    if channels == 1:
        manifest = replace(manifest, scale=1 / 8)  # the digits' greys are 0 to 16
    preparation = Preparation(
        folder=out,
        source=source,
        encoding=encoding,
        manifest=manifest,
        shard_size=options.shard_size,
        max_bad=options.max_bad,
        rank=options.rank,
        world=options.world,
        patience=60 * options.patience,
    )
    own = len(range(options.rank, source.num_units, options.world))
    total = source.num_samples * own // source.num_units if source.num_samples else None
    who = name if options.world == 1 else f"{name}, rank {options.rank} of {options.world}"
    with tqdm(
        desc=who, unit="sample", total=total, delay=2.0, leave=False, smoothing=0.05, disable=options.rank > 0
    ) as bar:
        report = preparation.run(bar.update)
    if report is None:
        print(
            f"{out}: this rank's {own} of {source.num_units} units are there; rank 0 writes {MANIFEST_NAME} (rank "
            f"{options.rank})"
        )
        return
    state = "written" if report.made else "already there, checksums hold"
    kept = report.seen - report.bad
    print(
        f"{out}: {kept} samples in {source.num_units} units ({state}); {report.bad} bad, listed in bad.jsonl"
        if report.bad
        else f"{out}: {kept} samples in {source.num_units} units ({state})"
    )
    if source.class_names:
        print(f"{len(source.class_names)} classes, from {source.class_names[0]} to {source.class_names[-1]}")
    if report.cut:
        print(f"{report.cut} captions were longer than their encoder's length and were cut")
    print(f"licence of the data: {licence}")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1)


def _number(text: str) -> int:
    """Parse a count."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of samples, 1 or more")
    return int(text)


def _non_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a number, 0 or more")
    return int(text)


def _fraction(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return share


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number, 0 or more")
    return amount


def _weights(text: str) -> tuple[float, float, float]:
    try:
        places, counts, relations = (_amount(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not three weights such as 2,1,1") from None
    return places, counts, relations


def _width(text: str) -> int:
    if not text.isdigit() or int(text) < 16 or int(text) % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a width: a multiple of 16")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="command", required=True, metavar="SOURCE")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], help_text: str, shard_size: int
    ) -> argparse.ArgumentParser:
        source = sources.add_parser(name, help=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        source.add_argument("--out", type=Path, required=True, help="folder to write; made if it does not exist")
        source.add_argument("--shard-size", type=_number, default=shard_size, help="samples of the source per shard")
        source.set_defaults(run=run)
        return source

    add(
        "digits",
        prepare_digits,
        "scikit-learn's 1,797 handwritten digits (8x8): OUT/train (1,500) and OUT/heldout (297)",
        300,
    )

    source = add(
        "digits_captions", prepare_digits_captions, "one to three of those digits on a canvas, with captions", 1000
    )
    source.add_argument(
        "--samples", type=_number, default=20000, help="canvases of OUT/train, from the digits of the train split"
    )
    source.add_argument(
        "--heldout", type=_number, default=1000, help="canvases of OUT/heldout, from the held-out digits"
    )
    source.add_argument("--image-size", type=_number, default=24, help="side of the canvas, 24 or more")
    source.add_argument(
        "--legible",
        type=_fraction,
        default=1.0,
        help="share of OUT/train's digits of each class: those easiest to read",
    )
    source.add_argument(
        "--caption-weights",
        type=_weights,
        default=digits_captions.WEIGHTS,
        help="how often captions tell places, counts, a relation",
    )
    _add_text(source)
    _add_ranks(source)

    encoder = sources.add_parser(
        "tiny_t5", help="a T5 encoder of bytes for those captions, trained here in a few minutes"
    )
    encoder.add_argument("--out", type=Path, required=True, help="folder to write")
    encoder.add_argument(
        "--steps",
        type=_non_negative,
        default=tiny_t5.STEPS,
        help="steps of 32 captions; 0: random (default %(default)s)",
    )
    encoder.add_argument("--seed", type=_non_negative, default=0, help="of weights and text (default %(default)s)")
    encoder.add_argument("--width", type=_width, default=64, help="of a token's features (default %(default)s)")
    encoder.add_argument("--layers", type=_number, default=3, help="(default %(default)s)")
    encoder.set_defaults(run=prepare_tiny_t5)

    source = add(
        "imagenet",
        prepare_imagenet,
        "images in a folder per class, or uncompressed tars of such (image-net.org's own too)",
        1000,
    )
    source.add_argument(
        "--source", type=Path, required=True, help="folder of class folders, folder of tars, or one tar"
    )
    _add_images(source, name="imagenet", licence=imagenet.LICENCE, min_side=1)
    _add_ranks(source)

    source = add(
        "text_image",
        prepare_text_image,
        "images with captions: img2dataset's tars, or a folder of images with .txt beside",
        1000,
    )
    source.add_argument("--source", type=Path, required=True, help="folder of tars, one tar, or folder of images")
    _add_images(source, name="text-image", licence=text_image.LICENCE, min_side=64)
    _add_text(source)
    _add_ranks(source)

    source = add("journeydb", prepare_journeydb, "JourneyDB: archives of images and a file of annotation lines", 1000)
    source.add_argument("--source", type=Path, required=True, help="folder of the archives 000.tgz, 001.tgz, ...")
    source.add_argument("--annotations", type=Path, required=True, help="the file of JSON lines, unpacked")
    source.add_argument(
        "--prompt-weight", type=_amount, default=1.0, help="how often an image's prompt is taken; 0: never"
    )
    source.add_argument("--caption-weight", type=_amount, default=1.0, help="how often its caption is taken; 0: never")
    _add_images(source, name="journeydb", licence=journeydb.LICENCE, min_side=64)
    _add_text(source)
    _add_ranks(source)
    return parser


def _add_images(source: argparse.ArgumentParser, name: str, licence: str, min_side: int) -> None:
    source.add_argument("--image-size", type=_number, default=256, help="side of the square crop, in pixels")
    source.add_argument(
        "--vae", type=Path, help="local folder of a diffusers AutoencoderKL: store latents (default: pixels)"
    )
    source.add_argument(
        "--flips", type=int, choices=(1, 2), default=1, help="2: store the latents of the mirror image too"
    )
    source.add_argument(
        "--min-side", type=_number, default=min_side, help="images with a shorter side below this are bad"
    )
    source.add_argument("--name", default=name, help="of the dataset and its shards")
    source.add_argument("--license", default=licence, help="note on the rights to the data, kept in the manifest")


def _add_text(source: argparse.ArgumentParser) -> None:
    source.add_argument(
        "--t5", type=Path, help="local folder of a T5 encoder with its tokenizer: store features of the captions"
    )
    source.add_argument("--t5-length", type=_number, default=120, help="tokens; longer captions are cut")
    source.add_argument(
        "--clip", type=Path, help="local folder of a CLIP text model with its tokenizer: store features of the captions"
    )
    source.add_argument("--clip-length", type=_number, default=77, help="tokens; longer captions are cut")
    source.add_argument(
        "--text-precision", choices=tuple(PRECISIONS), default="float32", help="that the text encoders compute in"
    )


def _add_ranks(source: argparse.ArgumentParser) -> None:
    source.add_argument(
        "--max-bad", type=_fraction, default=0.01, help="share of bad samples above which the preparation fails"
    )
    source.add_argument("--batch", type=_number, default=32, help="samples that are encoded together")
    source.add_argument("--readers", type=_number, default=8, help="threads of a process that decode images")
    source.add_argument(
        "--device", help="that the encoders run on (default: this rank's GPU, or the CPU where there is none)"
    )
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    source.add_argument(
        "--rank", type=_non_negative, default=rank, help="of this process (default: RANK, as torchrun sets it)"
    )
    source.add_argument(
        "--world", type=_number, default=world, help="processes in all (default: WORLD_SIZE, as torchrun sets it)"
    )
    source.add_argument(
        "--patience", type=_amount, default=60.0, help="minutes that rank 0 waits while no other rank finishes anything"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 2, with one line on standard error, when the data or the folder are not
    usable.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
