"""What the plots of capacity have in common: figures, axes, legends, names that fit."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from diffmoe_ep.config import ConfigError
from diffmoe_ep.sampling.picture import PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Numbers = NDArray[np.float64]
Pictures = Numbers  # (n, H, W, C) in 0..1, C = 1 or 3
HARD, EASY = "#d1495b", "#2a9d8f"


def new_figure(width: float, height: float, constrained: bool = True) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "capacity plots need matplotlib, which is not installed: pip install 'diffmoe_ep[log]'"
        ) from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    figure.savefig(path, format="png", facecolor="white")


def dense_line(axes: "Axes") -> None:
    axes.axhline(1.0, color=PALE, linewidth=1.1, linestyle="--", label="dense model")


def finish(axes: "Axes", title: str, below: str, beside: str, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylabel(beside, fontsize=9)
    axes.grid(True, axis=grid, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def add_legend(axes: "Axes", loc: str = "best") -> None:
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5, loc=loc)


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values span a factor of more than 1.8, so that a logarithmic axis shows them better."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 1.8 * min(finite)


def plain_numbers(axis: "Axis") -> None:
    """Label a logarithmic axis with plain numbers, closely enough for one decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def show_picture(axes: "Axes", picture: Numbers) -> None:
    axes.imshow(
        picture[:, :, 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_axis_off()


def name_ends(axes: "Axes", ranked: Sequence[tuple[str, float]]) -> None:
    """Name the five classes at either end of a long ranking in two boxes."""
    for names, x, align, color in ((ranked[:5], 0.02, "left", HARD), (ranked[-5:], 0.8, "right", EASY)):
        text = "\n".join(f"{short_name(name)}  {value:.3f}" for name, value in names)
        axes.text(x, 0.06, text, transform=axes.transAxes, ha=align, va="bottom", fontsize=8, color=color,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85})  # fmt: skip


def evenly_spaced(number: int, most: int) -> list[int]:
    """Up to `most` of the places 0..number-1, evenly spread from first to last."""
    return sorted({round(place * (number - 1) / max(1, min(number, most) - 1)) for place in range(min(number, most))})


def panel_grid(number: int) -> tuple[int, int]:
    """Rows and columns for so many panels: one row of up to three, else two columns."""
    columns = number if number <= 3 else 2
    return math.ceil(number / columns), columns


def shorten(text: str, most: int) -> str:
    text = text or "(no words)"
    return text if len(text) <= most else text[: most - 1] + "…"


def short_name(name: str, most: int = 16) -> str:
    """A class name that fits: its first synonym, cut if it must be."""
    first = name.split(",")[0].strip()
    return shorten(first, most)


def are_short(ranked: Sequence[tuple[str, float]]) -> bool:
    return all(len(short_name(name)) <= 4 for name, _ in ranked)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
