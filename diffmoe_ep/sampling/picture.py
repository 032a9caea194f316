"""Pictures to look at: a grid of samples, and the curves of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffmoe_ep.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import ImageFont

CELL = 48  # pixels that a cell of the grid has about
CAPTIONED = 112  # the same with a caption under it
LINES, LINE, FONT = 5, 13, 11  # of a caption: most lines, pixels from one to the next, size
GAP = 4  # pixels between cells
GREY = 48  # of the separators, visible beside black cells
RIGHT, WRONG = (60, 170, 90), (200, 60, 60)  # frames of pictures that were judged
BLUE, ORANGE, GREEN, PURPLE, PALE = "#2563eb", "#ea7317", "#15935a", "#7c4dbd", "#9aa3af"


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
            f"a grid shows 1 or more images of 1 or 3 channels in 1 or more columns, not {tuple(pixels.shape)} in {columns}"
        )
    rows = math.ceil(num_images / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows")
    if any(told is not None and len(told) != num_images for told in (captions, right)):
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


def curves(metrics: Path | str, path: Path | str) -> None:
    """Draw a run's metrics.jsonl over samples seen as one PNG: loss, capacity, learning rate, samples per second.

    A step that was logged twice, before and after a resume, counts as it was last logged; lines cut short by a kill and
    missing keys are passed over. Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise ConfigError("curves need matplotlib, which is not installed: pip install 'diffmoe_ep[log]'") from error
    records = _records(Path(metrics))
    figure = Figure(figsize=(12, 7.5), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    loss, capacity, rate, speed = figure.subplots(2, 2, sharex=True).flat
    _draw_loss(loss, records)
    _draw_capacity(capacity, records)
    _draw(rate, records, "lr", PURPLE, "learning rate", smooth=False)
    _draw(speed, records, "samples_per_second", GREEN, "samples/s")
    for axes, title in ((loss, "Loss"), (capacity, "Capacity"), (rate, "Learning rate"), (speed, "Samples per second")):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.grid(True, color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=9)
        if not axes.has_data():
            axes.set_yticks([])
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=PALE)
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("samples seen", fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, format="png")


Record = dict[str, Any]  # one line of metrics.jsonl


def _records(metrics: Path) -> list[Record]:
    """The logged steps in order, each as it was last logged."""
    records: dict[int, Record] = {}
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a line that a kill cut short
            continue
        if isinstance(record, dict) and "step" in record:
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _series(records: list[Record], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Samples seen and values of the steps that logged the key: (m,) and (m,), or (m, layers) for lists."""
    chosen = [record for record in records if record.get(key) is not None]
    samples = np.array([record.get("samples", record["step"]) for record in chosen], dtype=np.float64)
    return samples, np.array([record[key] for record in chosen], dtype=np.float64)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred mean over a thirtieth of the points, (m,) or (m, layers).

    At the start, where curves are steep, the window shrinks evenly; at the end it loses its right half only, to stay
    calm.
    """
    half = max(1, len(values) // 60)
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + np.minimum(place, half), len(values) - 1)
    return np.stack([values[a : b + 1].mean(0) for a, b in zip(first, last, strict=True)])


def _draw(axes: "Axes", records: list[Record], key: str, colour: str, label: str, smooth: bool = True) -> None:
    """One curve: raw in a light tone under its smoothed self, or as it is."""
    samples, values = _series(records, key)
    if not len(values):
        return
    if smooth and len(values) > 10:
        axes.plot(samples, values, color=colour, alpha=0.25, linewidth=0.8)
        values = _smoothed(values)
    axes.plot(samples, values, color=colour, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None)


def _draw_loss(axes: "Axes", records: list[Record]) -> None:
    parts = [("diffusion_loss", BLUE, "diffusion"), ("predictor_loss", ORANGE, "capacity predictor")]
    if not any(len(_series(records, key)[0]) for key, _, _ in parts):
        parts = [("loss", BLUE, "loss")]
    for key, colour, label in parts:
        _draw(axes, records, key, colour, label)
    values = np.concatenate([_series(records, key)[1] for key, _, _ in parts])
    if len(values) and values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")


def _draw_capacity(axes: "Axes", records: list[Record]) -> None:
    samples, layers = _series(records, "capacity_per_layer")
    if layers.ndim == 2:
        for number, values in enumerate(_smoothed(layers).T):
            axes.plot(
                samples, values, color=GREEN, alpha=0.45, linewidth=0.9, label="each MoE layer" if number == 0 else None
            )
    _draw(axes, records, "capacity", GREEN, "mean of layers")
    if axes.has_data():
        axes.axhline(1.0, color=PALE, linewidth=1.0, linestyle="--", label="dense model")
    samples, thresholds = _series(records, "threshold")
    if len(thresholds):
        beside = axes.twinx()
        beside.plot(samples, thresholds, color=ORANGE, linewidth=1.4)
        beside.set_ylabel("threshold", color=ORANGE, fontsize=9)
        beside.spines["top"].set_visible(False)
        beside.tick_params(labelsize=9, labelcolor=ORANGE)
