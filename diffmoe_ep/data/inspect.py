"""What a dataset looks like: its numbers, and a picture of some of its samples."""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.codec import StoredCondition
from diffmoe_ep.data.latent import final_latent, oriented
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.data.shards import Dataset

CELL = 128  # pixels that a picture has about
MARGIN = 8  # pixels around pictures
LINE = 15  # pixels of a line of text
BACK, INK = (24, 24, 28), (225, 225, 225)


@dataclass(frozen=True)
class Stats:
    """The numbers of a dataset."""

    manifest: Manifest
    fingerprint: str
    num_bytes: int  # of all shards
    member_bytes: dict[str, float]  # of each field, mean over the sample
    counts: tuple[int, ...]  # samples of each class; empty where the condition is text
    captions: float  # of an image, mean over the sample; 0 where the condition is a label
    mean: tuple[float, ...]  # of each channel of the final latents, over the sample
    std: tuple[float, ...]
    sampled: int  # samples that the means are over

    def lines(self) -> list[str]:
        """As text."""
        manifest, sizes = self.manifest, [shard.num_samples for shard in self.manifest.shards]
        per_sample = ", ".join(f"{field} {size:,.0f}" for field, size in self.member_bytes.items())
        lines = [
            f"{manifest.name}: {manifest.num_samples:,} samples, {self.num_bytes:,} bytes",
            f"shards: {len(sizes)} of {min(sizes):,} to {max(sizes):,} samples",
            f"stored: {manifest.kind} {manifest.dtype} {manifest.stored_shape}",
            f"final latents: {manifest.shape}, scale {manifest.scale:g}, shift {manifest.shift:g}",
            f"licence: {manifest.licence}",
            f"fingerprint: {self.fingerprint}",
            f"bytes per sample: {self.num_bytes / manifest.num_samples:,.0f} in the tar ({per_sample})",
            f"final latents over {self.sampled} samples, by channel: mean {_row(self.mean)}, standard deviation "
            f"{_row(self.std)}",
        ]
        if self.counts:
            names = manifest.class_names or tuple(map(str, range(manifest.num_classes)))
            used = sum(count > 0 for count in self.counts)
            lines.append(
                f"classes: {used} of {manifest.num_classes} used, {min(self.counts)} to {max(self.counts)} samples each"
            )
            lines += [f"  {name}: {count}" for name, count in zip(names, self.counts, strict=True)]
        else:
            lines.append(f"captions of an image: {self.captions:.2f}")
        return lines


def stats(dataset: Dataset, num: int = 1000, progress: Callable[[int], object] | None = None) -> Stats:
    """The numbers of a dataset: labels of every sample, latents and sizes of `num` samples spread over it."""
    manifest = dataset.manifest
    counts: Counter[bytes] = Counter()
    if manifest.condition == "class":
        for shard, size in enumerate(dataset.sizes):
            counts.update(dataset.member(shard, sample, "cls") for sample in range(size))
            if progress is not None:
                progress(size)
    chosen = spread(dataset, num)
    sizes: Counter[str] = Counter()
    captions, total, squares = 0, np.zeros(manifest.shape[0]), np.zeros(manifest.shape[0])
    for number, (shard, sample) in enumerate(chosen):
        sizes.update({field: len(content) for field, content in dataset.read(shard, sample).items()})
        array, condition = read_sample(dataset, shard, sample)
        captions += 0 if isinstance(condition, int) else len(condition)
        posterior = generator_for(0, number, "posterior").standard_normal(manifest.shape, dtype=np.float32)
        latent = final_latent(oriented(array, manifest, False), manifest, posterior).astype(np.float64)  # (C, H, W)
        total += latent.mean((1, 2))
        squares += (latent**2).mean((1, 2))
    mean = total / len(chosen)
    std = np.sqrt(np.maximum(squares / len(chosen) - mean**2, 0))
    by_class = (
        tuple(counts[str(label).encode()] for label in range(manifest.num_classes))
        if manifest.condition == "class"
        else ()
    )
    if sum(by_class) != sum(counts.values()):
        strange = next(
            text
            for text in counts
            if not text.isdigit() or int(text) >= manifest.num_classes or text != str(int(text)).encode()
        )
        raise DataError(
            f"{dataset.name} holds label {strange[:20]!r}, which is none; diffmoe data check lists all that is wrong"
        )
    return Stats(
        manifest,
        dataset.fingerprint,
        sum(shard.bytes for shard in manifest.shards),
        {field: size / len(chosen) for field, size in sizes.items()},
        by_class,
        captions / len(chosen),
        tuple(mean),
        tuple(std),
        len(chosen),
    )


def spread(dataset: Dataset, num: int) -> list[tuple[int, int]]:
    """(shard, sample) of at most `num` samples, evenly spread over the whole dataset."""
    ends = np.cumsum(dataset.sizes)
    places = np.unique(np.linspace(0, ends[-1] - 1, min(num, int(ends[-1]))).round().astype(np.int64))
    shards = np.searchsorted(ends, places, side="right")
    return [
        (int(shard), int(place - ends[shard] + dataset.sizes[shard]))
        for place, shard in zip(places, shards, strict=True)
    ]


def peek(dataset: Dataset, path: Path, num: int = 25, columns: int = 5) -> None:
    """Write a PNG of `num` samples spread over the dataset, each above its label or captions.

    Pixels are shown as they are; of moments the mean, its first three channels as red, green and blue. ConfigError
    without Pillow.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ConfigError("a picture needs Pillow, which is not installed: pip install 'diffmoe_ep[sample]'") from error
    chosen = [read_sample(dataset, *place) for place in spread(dataset, num)]
    pictures = colours([array for array, _ in chosen], dataset.manifest)  # (n, H, W, 3)
    enlarge = max(1, round(CELL / max(pictures.shape[1:3])))
    width, height = pictures.shape[2] * enlarge, pictures.shape[1] * enlarge
    texts = [_lines(condition, dataset.manifest, max(8, (max(width, CELL)) // 7)) for _, condition in chosen]
    cell_width, cell_height = max(width, CELL) + MARGIN, height + LINE * max(map(len, texts)) + MARGIN
    rows = -(-len(chosen) // columns)
    canvas = Image.new("RGB", (min(columns, len(chosen)) * cell_width + MARGIN, rows * cell_height + MARGIN), BACK)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for number, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left, top = MARGIN + number % columns * cell_width, MARGIN + number // columns * cell_height
        canvas.paste(Image.fromarray(picture.repeat(enlarge, 0).repeat(enlarge, 1)), (left, top))
        for line, text in enumerate(lines):
            draw.text((left, top + height + 2 + line * LINE), text, fill=INK, font=font)
    canvas.save(path, format="PNG")


def colours(arrays: Sequence[NDArray[np.generic]], manifest: Manifest) -> NDArray[np.uint8]:
    """Stored arrays as pictures (n, H, W, 3): pixels by their own range, the mean of moments by what 1% and 99% of its
    values are.
    """
    if manifest.kind == "pixels":
        values = np.stack(arrays).astype(np.float64) * manifest.scale + manifest.shift  # (n, C, H, W) in [-1, 1]
        low, high = np.full((1, values.shape[1], 1, 1), -1.0), np.ones((1, 1, 1, 1))
    else:
        values = np.stack([array[0, : manifest.shape[0]] for array in arrays]).astype(np.float64)
        low, high = (np.percentile(values, percent, axis=(0, 2, 3), keepdims=True) for percent in (1, 99))
    shades = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    shades = shades[:, :3] if shades.shape[1] >= 3 else shades[:, :1].repeat(3, 1)
    return (255 * shades).round().astype(np.uint8).transpose(0, 2, 3, 1)


def _lines(condition: StoredCondition, manifest: Manifest, width: int) -> list[str]:
    if isinstance(condition, int):
        return [manifest.class_names[condition][:width] if manifest.class_names else str(condition)]
    texts = [caption.text for caption in condition]
    more = f" (+{len(texts) - 1} more)" if len(texts) > 1 else ""
    return textwrap.wrap(texts[0] + more, width, max_lines=4, placeholder="…") or [""]


def _row(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
