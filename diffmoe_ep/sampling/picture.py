"""From samples to pixels, and to a PNG that shows a grid of them."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.sampling.sample import Samples

if TYPE_CHECKING:
    from PIL import ImageFont

CELL = 48  # pixels that a cell of the grid has about
CAPTIONED = 112  # the same with a caption under it
LINES, LINE, FONT = 5, 13, 11  # of a caption: most lines, pixels from one to the next, size
GAP = 4  # pixels between cells
GREY = 48  # of the separators, visible beside black cells
RIGHT, WRONG = (60, 170, 90), (200, 60, 60)  # frames of pictures that were judged
# the colors of all plots
BLUE, ORANGE, GREEN, PURPLE, PALE = "#2563eb", "#ea7317", "#15935a", "#7c4dbd", "#9aa3af"


def check_pictures(data_info: DataInfo, vae: str | None) -> None:
    """Raise ConfigError, before anything is sampled, if these data cannot be shown as a grid here; vae: sample.vae."""
    if find_spec("PIL") is None:
        raise ConfigError("grids need Pillow: pip install 'diffmoe_ep[sample]', or set sample.grid_every=0")
    if data_info.kind == "moments":
        if vae is None:
            raise ConfigError(
                f"the data {data_info.name} are latents of a VAE; set sample.vae to its local folder to see pictures, "
                "or sample.grid_every=0"
            )
        return
    if not are_pictures(data_info):
        raise ConfigError(
            f"the data {data_info.name} (shape {data_info.shape}, scale {data_info.scale}, shift {data_info.shift}) "
            "are no pictures of 1 or 3 channels with values up to 255; set sample.grid_every=0"
        )


def are_pictures(data_info: DataInfo) -> bool:
    """Whether stored samples can be shown: pixels of 1 or 3 channels, with values up to 255."""
    return data_info.kind == "pixels" and data_info.shape[:1] in ((1,), (3,)) and 1 <= highest(data_info) <= 255


def check_pixels(data_info: DataInfo) -> None:
    """Raise ConfigError if samples cannot be compared with stored pixels."""
    if data_info.kind != "pixels":
        raise ConfigError(
            f"the data {data_info.name} are latents of a VAE, and scores compare stored pixels; draw pictures with "
            "diffmoe sample sample.vae=FOLDER and score its samples.npz by other means"
        )
    check_pictures(data_info, None)


def highest(data_info: DataInfo) -> int:
    """The stored value that the data's scaling puts at 1: 16 for the digits, 255 for photographs and what a VAE
    decodes.
    """
    if data_info.kind == "moments":
        return 255
    assert data_info.scale and data_info.shift is not None, "known of pixels"
    return round((1 - data_info.shift) / data_info.scale)


def pixels_of(samples: Samples, data_info: DataInfo) -> Tensor:
    """The samples as pixels, stored ones or decoded ones: uint8 (n, C, H, W)."""
    if samples.decoded is not None:
        return samples.decoded
    assert data_info.scale and data_info.shift is not None, "known of pixels"
    return to_pixels(samples.latents, data_info.scale, data_info.shift, highest(data_info))


def to_pixels(latents: Tensor, scale: float, shift: float, highest: int | None = None) -> Tensor:
    """Undo `final = stored * scale + shift` for data of kind pixels: uint8 (n, C, H, W) in 0..highest.

    highest is the largest stored value; without it, the one that the data's scaling puts at 1 (pixels trained in [-1,
    1]: 16 for the digits, 255 for photographs).
    """
    top = round((1 - shift) / scale) if highest is None else highest
    if not 1 <= top <= 255:
        raise ValueError(
            f"scale {scale} and shift {shift} put stored value {top} at 1: give the largest stored value, from 1 to 255"
        )
    return ((latents.double() - shift) / scale).round().clamp(0, top).to(torch.uint8)


def write_grid(
    samples: Samples,
    data_info: DataInfo,
    path: Path,
    most: int = 200,
    columns: int = 10,
    right: Sequence[bool] | None = None,
) -> None:
    """Write the first `most` samples as a PNG, in rows of up to `columns`, prompts under their pictures.

    right: whether each picture shows what its prompt says, seen from its frame.
    """
    pixels = pixels_of(samples, data_info)[:most]
    grid(
        pixels, path, columns=min(columns, len(pixels)), highest=highest(data_info),
        captions=samples.prompts[:most] or None, right=None if right is None else right[:most],
    )  # fmt: skip


def grid(
    pixels: Tensor,
    path: Path | str,
    *,
    columns: int,
    highest: int = 255,
    enlarge: int | None = None,
    row_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    right: Sequence[bool] | None = None,
) -> None:
    """Write images uint8 (n, C, H, W) with values 0..highest and 1 or 3 channels as one PNG, row by row.

    Each pixel becomes a square of `enlarge` (default: so that a cell has about 48 pixels, with captions 112).
    row_labels are written at the left of the rows, captions under the images; `right` frames each image green or red.
    Raises ConfigError without Pillow and ValueError for other channels or too few labels.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ConfigError(
            "sample grids need Pillow, which is not installed: pip install 'diffmoe_ep[sample]'"
        ) from error
    num_images, channels, height, width = pixels.shape
    if num_images < 1 or channels not in (1, 3) or columns < 1:
        raise ValueError(
            f"a grid shows 1 or more images of 1 or 3 channels in 1 or more columns, not {tuple(pixels.shape)} in "
            f"{columns}"
        )
    rows = math.ceil(num_images / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows")
    if any(given is not None and len(given) != num_images for given in (captions, right)):
        raise ValueError(f"a grid of {num_images} images needs a caption and a verdict for each, or none at all")
    enlarge = max(1, round((CAPTIONED if captions else CELL) / max(height, width))) if enlarge is None else enlarge
    cell_height, cell_width = height * enlarge, width * enlarge
    shades = (
        (pixels.permute(0, 2, 3, 1).cpu().numpy().astype(np.float64) * (255 / highest))
        .round()
        .clip(0, 255)
        .astype(np.uint8)
    )
    cells = shades.repeat(enlarge, axis=1).repeat(enlarge, axis=2)  # (n, cell height, cell width, C), nearest neighbour

    font = ImageFont.load_default(size=18)
    small = ImageFont.load_default(size=FONT)
    wrapped = [wrap(text, small, cell_width) for text in captions or ()]
    below = max(map(len, wrapped), default=0) * LINE
    gutter = math.ceil(max((font.getlength(text) for text in row_labels), default=0)) + 16 if row_labels else 0
    canvas = np.zeros(
        (rows * (cell_height + below + GAP) + GAP, gutter + columns * (cell_width + GAP) + GAP, 3), dtype=np.uint8
    )
    canvas[:, gutter:] = GREY
    for place in range(rows * columns):
        top = GAP + place // columns * (cell_height + below + GAP)
        left = gutter + GAP + place % columns * (cell_width + GAP)
        if right is not None and place < num_images:
            canvas[top - GAP // 2 : top + cell_height + GAP // 2, left - GAP // 2 : left + cell_width + GAP // 2] = (
                RIGHT if right[place] else WRONG
            )
        canvas[top : top + cell_height, left : left + cell_width] = cells[place] if place < num_images else 0
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for place, lines in enumerate(wrapped):
        top = GAP + place // columns * (cell_height + below + GAP) + cell_height
        left = gutter + GAP + place % columns * (cell_width + GAP)
        for number, line in enumerate(lines):
            draw.text((left, top + number * LINE + 2), line, fill=(220, 220, 220), font=small)
    for row, text in enumerate(row_labels or ()):
        middle = GAP + row * (cell_height + below + GAP) + cell_height / 2
        draw.text((gutter / 2, middle), text, fill=(200, 200, 200), font=font, anchor="mm")
    image.save(path, format="PNG")


def wrap(text: str, font: "ImageFont.FreeTypeFont", width: int) -> list[str]:
    """The lines of a text that are no wider than `width` pixels, broken at blanks or, for a long word, anywhere; at
    most `LINES`.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], last + "…"]
    return lines
