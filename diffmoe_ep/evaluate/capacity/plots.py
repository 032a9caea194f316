"""Pictures of where the compute goes, from plain numbers: each function draws one PNG.

Legend: C capacity, 1 is the compute of a dense model; N experts. Steps run from noise to image.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from diffmoe_ep.config import ConfigError
from diffmoe_ep.sampling.picture import BLUE, GREEN, ORANGE, PALE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Numbers = NDArray[np.float64]
Pictures = Numbers  # (n, H, W, C) in 0..1, C = 1 or 3
HARD, EASY = "#d1495b", "#2a9d8f"
MOST_PANELS = 8  # MoE layers that get a panel of their own
MOST_NAMES = 20  # classes up to which each bar has its name


def steps(path: Path, capacity: Numbers, curves: Numbers, names: Sequence[str], kind: str = "class") -> None:
    """C over sampling steps (steps,), and what the classes or prompts (n, steps), hardest first, add to it (Figure
    1c).
    """
    figure = _figure(9, 4.6)
    axes = figure.subplots()
    place = np.arange(len(capacity))
    if len(curves) > 1:
        many = f"range of {len(curves)} {'prompts' if kind == 'prompt' else 'classes'}"
        axes.fill_between(place, curves.min(0), curves.max(0), color=BLUE, alpha=0.13, linewidth=0, label=many)
        for end, colour, which in ((0, HARD, "hardest"), (-1, EASY, "easiest")):
            label = f"{which} {kind}: {_cut(names[end], 48)} ({curves[end].mean():.3f})"
            axes.plot(place, curves[end], color=colour, linewidth=1.3, label=label)
    axes.plot(
        place,
        capacity,
        color=BLUE,
        linewidth=2.4,
        marker="o" if len(capacity) == 1 else None,
        label=f"all ({capacity.mean():.3f})",
    )
    _dense(axes)
    _finish(axes, "Computation over sampling steps", "sampling step, from noise to image", "capacity C")
    _legend(axes)
    _save(figure, path)


def expert_map(path: Path, capacity: Numbers, blocks: Sequence[int]) -> None:
    """C (steps, layers, N) as one heat map per layer, experts over steps; layers are named by their block."""
    from matplotlib.colors import TwoSlopeNorm

    shown = _spread(len(blocks), MOST_PANELS)
    rows, columns = _panels(len(shown))
    experts = capacity.shape[2]
    figure = _figure(4.4 * columns + 1.4, max(3.0, 0.16 * experts + 1.3) * rows + 0.4)
    norm = TwoSlopeNorm(1, min(capacity.min(), 0.99), max(capacity.max(), 1.01))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        if number >= len(shown):
            axes.set_visible(False)
            continue
        layer = shown[number]
        image = axes.imshow(capacity[:, layer].T, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=norm)
        axes.set_title(
            f"block {blocks[layer]}, C {capacity[:, layer].mean():.3f}", loc="left", fontsize=10, fontweight="bold"
        )
        axes.set_yticks(np.arange(0, experts, max(1, experts // 8)))
        axes.tick_params(labelsize=8, length=2)
        if number % columns == 0:
            axes.set_ylabel("expert", fontsize=9)
        if number + columns >= len(shown):
            axes.set_xlabel("sampling step, from noise to image", fontsize=9)
            axes.tick_params(labelbottom=True)
    bar = figure.colorbar(image, ax=list(grid.flat), shrink=0.85, pad=0.015, aspect=15 + 15 * rows)
    bar.set_label("capacity C of the expert", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    _save(figure, path)


def expert_curves(path: Path, capacity: Numbers, blocks: Sequence[int]) -> None:
    """C (steps, layers, N) as curves of each expert over steps, in up to four layers from first to last (Figure 12)."""
    from matplotlib import colormaps

    shown = _spread(len(blocks), 4)
    rows, columns = _panels(len(shown))
    figure = _figure(5.4 * columns, 3.1 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    place, experts = np.arange(len(capacity)), capacity.shape[2]
    colours = colormaps["turbo"](np.linspace(0.06, 0.94, experts))
    for number, axes in enumerate(grid.flat):
        if number >= len(shown):
            axes.set_visible(False)
            continue
        layer = shown[number]
        for expert in range(experts):
            axes.plot(place, capacity[:, layer, expert], color=colours[expert], linewidth=1.1, alpha=0.85)
        axes.plot(place, capacity[:, layer].mean(1), color="black", linewidth=2.2, label="mean of experts")
        _dense(axes)
        spread = capacity[:, layer].std(0).mean()
        bottom = "sampling step, from noise to image" if number + columns >= len(shown) else ""
        title = f"block {blocks[layer]}, moves by {spread:.3f} over steps"
        _finish(axes, title, bottom, "capacity C" if number % columns == 0 else "")
        axes.tick_params(labelbottom=bool(bottom))
    _legend(grid.flat[0])
    _save(figure, path)


def classes(path: Path, ranked: Sequence[tuple[str, float]], mean: float, kind: str = "class") -> None:
    """C of every class or prompt, hardest first, as bars (Figure 1d); of many classes only the ends are named, of many
    prompts shown.
    """
    from matplotlib import colormaps

    if kind == "prompt":
        _prompts(path, ranked, mean)
        return
    number = len(ranked)
    values = np.array([value for _, value in ranked])
    named = list(range(number)) if number <= MOST_NAMES else [*range(5), *range(number - 5, number)]
    figure = _figure(9, 4.4)
    axes = figure.subplots()
    spread = max(values.max() - values.min(), 1e-9)
    colours = colormaps["coolwarm"](0.08 + 0.84 * (values - values.min()) / spread)
    axes.bar(
        np.arange(number),
        values - mean,
        bottom=mean,
        width=0.78 if number <= MOST_NAMES else 1.0,
        color=colours,
        linewidth=0,
    )
    axes.set_ylim(min(values.min(), 1.0) - 0.2 * spread, max(values.max(), 1.0) + 0.2 * spread)
    if number <= MOST_NAMES:
        for place in named:
            above, box = values[place] >= mean, {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            text, shift, va = f"{values[place]:.3f}", (0, 4 if above else -4), "bottom" if above else "top"
            axes.annotate(
                text,
                (place, values[place]),
                shift,
                textcoords="offset points",
                ha="center",
                va=va,
                fontsize=8,
                bbox=box,
            )
        axes.set_xticks(named, [_short(ranked[place][0]) for place in named], rotation=0 if _are_short(ranked) else 40)
        if not _are_short(ranked):
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
    else:
        _name_ends(axes, ranked)
    axes.axhline(mean, color="black", linewidth=1.2, label=f"mean {mean:.3f}")
    _dense(axes)
    _finish(axes, "Computation by class, hardest to easiest", "class", "C_infer^avg", grid="y")
    _legend(axes, loc="upper right")
    _save(figure, path)


def _prompts(path: Path, ranked: Sequence[tuple[str, float]], mean: float) -> None:
    """C of the prompts at either end of the ranking, as lying bars with their words."""
    ends = list(ranked) if len(ranked) <= MOST_NAMES else [*ranked[: MOST_NAMES // 2], *ranked[-MOST_NAMES // 2 :]]
    values = np.array([value for _, value in ends])
    figure = _figure(9, 0.3 * len(ends) + 1.4)
    axes = figure.subplots()
    place = np.arange(len(ends))
    axes.barh(place, values - mean, left=mean, height=0.72, color=[HARD if value >= mean else EASY for value in values])
    for at, value in zip(place, values, strict=True):
        axes.annotate(f"{value:.3f}", (value, at), (4 if value >= mean else -4, 0), textcoords="offset points", fontsize=8,
                      ha="left" if value >= mean else "right", va="center")  # fmt: skip
    axes.set_yticks(place, [_cut(name, 56) for name, _ in ends], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(mean, color="black", linewidth=1.2, label=f"mean {mean:.3f}")
    left_out = f", the {len(ends)} at either end of {len(ranked)}" if len(ends) < len(ranked) else ""
    _finish(axes, f"Computation by prompt, hardest to easiest{left_out}", "C_infer^avg", "", grid="x")
    _legend(axes, loc="lower right")
    _save(figure, path)


def extremes(
    path: Path,
    hardest: Sequence[tuple[str, float, Pictures]],
    easiest: Sequence[tuple[str, float, Pictures]],
    kinds: str = "classes",
) -> None:
    """Samples of the hardest and of the easiest classes or prompts, a row each: name, C and up to eight samples
    (Figures 13, 14).
    """

    size = 10 if kinds == "classes" else 8

    def called(name: str) -> str:
        return _short(name) if kinds == "classes" else _cut(name, 40)

    rows, columns = (
        max(len(hardest), len(easiest)),
        min(8, max(len(pictures) for _, _, pictures in (*hardest, *easiest))),
    )
    longest = max(len(called(name)) for name, _, _ in (*hardest, *easiest))
    cell, gutter, gap, top = 0.62, 0.95 + 0.09 * longest, 0.25, 0.5
    half = gutter + columns * cell
    width, height = 2 * half + gap + 0.15, rows * cell + top + 0.1
    figure = _figure(width, height, constrained=False)
    for side, (title, colour, part) in enumerate(
        ((f"Hardest {kinds}", HARD, hardest), (f"Easiest {kinds}", EASY, easiest))
    ):
        left = side * (half + gap)
        figure.text(
            (left + gutter) / width, 1 - 0.3 / height, title, color=colour, fontsize=13, fontweight="bold", va="center"
        )
        for row, (name, value, pictures) in enumerate(part):
            bottom = height - top - (row + 1) * cell
            middle = (bottom + cell / 2) / height
            figure.text(
                (left + gutter - 0.68) / width,
                middle,
                called(name),
                fontsize=size,
                ha="right",
                va="center",
                fontweight="bold",
            )
            figure.text(
                (left + gutter - 0.1) / width,
                middle,
                f"C {value:.3f}",
                fontsize=9,
                ha="right",
                va="center",
                color=colour,
            )
            for column, picture in enumerate(pictures[:columns]):
                place = (
                    (left + gutter + column * cell) / width,
                    bottom / height,
                    0.94 * cell / width,
                    0.94 * cell / height,
                )
                _picture(figure.add_axes(place), picture)
    _save(figure, path)


def topk(
    path: Path,
    strips: tuple[Pictures, Pictures] | None,
    names: Sequence[str],
    capacities: tuple[Numbers, Numbers],
    agreement: Numbers,
    together: tuple[Numbers, float],
    blocks: Sequence[int],
) -> None:
    """Batch 1: samples with top-k above those with the predictor, what both cost, and how far they agree (Figure 6).

    strips: (n, H, W, C) with top-k, with the predictor; capacities: C (steps,) of the same; agreement (steps, layers),
    and
    together: over all layers (steps,), and over all steps.
    """
    columns = 0 if strips is None else len(strips[0])
    figure = _figure(11, 3.9 + (2.3 if columns else 0))
    parts = figure.subfigures(2 if columns else 1, 1, height_ratios=(2.3, 3.9) if columns else None, squeeze=False).flat
    lower = parts[-1]
    if strips is not None:
        grid = parts[0].subplots(2, columns, squeeze=False)
        for row, (title, colour) in enumerate((("top-k", ORANGE), ("predictor", BLUE))):
            for column in range(columns):
                axes = grid[row][column]
                _picture(axes, strips[row][column])
                if row == 0:
                    words = (
                        _short(names[column], 12)
                        if len(names[column]) < 20
                        else "\n".join(textwrap.wrap(names[column], 14)[:4])
                    )
                    axes.set_title(words, fontsize=9 if len(names[column]) < 20 else 6)
            grid[row][0].text(
                -0.12,
                0.5,
                title,
                transform=grid[row][0].transAxes,
                ha="right",
                va="center",
                color=colour,
                fontweight="bold",
            )
    cost, agree = lower.subplots(1, 2)
    place = np.arange(len(agreement))
    for values, colour, name in zip(capacities, (ORANGE, BLUE), ("top-k", "predictor"), strict=True):
        cost.plot(np.arange(len(values)), values, color=colour, linewidth=2, label=f"{name} ({values.mean():.3f})")
    _dense(cost)
    _finish(cost, "Computation at batch 1", "sampling step, from noise to image", "capacity C")
    _legend(cost)
    for layer, colour in zip(_spread(len(blocks), 4), (PURPLE, GREEN, "#8c6d31", HARD), strict=False):
        agree.plot(place, agreement[:, layer], color=colour, linewidth=1.1, alpha=0.75, label=f"block {blocks[layer]}")
    agree.plot(place, together[0], color="black", linewidth=2.2, label=f"all layers ({together[1]:.3f})")
    agree.set_ylim(0, 1.02)
    _finish(
        agree,
        "Choices on which top-k and predictor agree",
        "sampling step, from noise to image",
        "share of what either takes",
    )
    _legend(agree)
    _save(figure, path)


def thresholds(
    path: Path, points: Sequence[tuple[str, float, float]], *, score: str, best: str | None, limit: float
) -> None:
    """The score over C of each threshold (its name, C, score): constants in blue, others in red, the best circled
    (Figure 7).
    """
    figure = _figure(8, 4.8)
    axes = figure.subplots()
    constants = sorted((capacity, value, name) for name, capacity, value in points if _is_number(name))
    others = [(capacity, value, name) for name, capacity, value in points if not _is_number(name)]
    axes.plot(
        [one[0] for one in constants],
        [one[1] for one in constants],
        color=BLUE,
        linewidth=1.4,
        marker="o",
        label="constant",
    )
    if others:
        axes.plot(
            [one[0] for one in others],
            [one[1] for one in others],
            "o",
            color=HARD,
            markersize=9,
            label=", ".join(one[2] for one in others),
        )
    for number, (capacity, value, name) in enumerate(constants):
        if math.isfinite(value):
            up = 9 if number % 2 == 0 else -16
            axes.annotate(name, (capacity, value), (0, up), textcoords="offset points", ha="center", fontsize=8)
        if name == best:
            axes.plot(
                [capacity],
                [value],
                "o",
                markersize=15,
                markerfacecolor="none",
                markeredgecolor=ORANGE,
                markeredgewidth=2,
                label=f"best: {name}",
            )
    axes.axvline(limit, color=PALE, linewidth=1.2, linestyle="--", label=f"C = {limit:g}")
    if _wide([one[0] for one in constants]):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    if _wide([one[1] for one in constants]):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    axes.margins(0.08, 0.15)
    _finish(axes, "Interval search over thresholds", "C_infer^avg", score)
    _legend(axes)
    _save(figure, path)


# -- strokes -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, constrained: bool = True) -> "Figure":
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


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, format="png", facecolor="white")


def _dense(axes: "Axes") -> None:
    axes.axhline(1.0, color=PALE, linewidth=1.1, linestyle="--", label="dense model")


def _finish(axes: "Axes", title: str, below: str, beside: str, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylabel(beside, fontsize=9)
    axes.grid(True, axis=grid, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _legend(axes: "Axes", loc: str = "best") -> None:
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5, loc=loc)


def _wide(values: Sequence[float]) -> bool:
    """Whether positive values span a factor of more than 1.8, so that a logarithmic axis shows them better."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 1.8 * min(finite)


def _plain_numbers(axis: "Axis") -> None:
    """Label a logarithmic axis with plain numbers, closely enough for one decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _picture(axes: "Axes", picture: Numbers) -> None:
    axes.imshow(
        picture[:, :, 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_axis_off()


def _name_ends(axes: "Axes", ranked: Sequence[tuple[str, float]]) -> None:
    """Name the five classes at either end of a long ranking in two boxes."""
    for names, x, align, colour in ((ranked[:5], 0.02, "left", HARD), (ranked[-5:], 0.8, "right", EASY)):
        text = "\n".join(f"{_short(name)}  {value:.3f}" for name, value in names)
        axes.text(x, 0.06, text, transform=axes.transAxes, ha=align, va="bottom", fontsize=8, color=colour,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85})  # fmt: skip


def _spread(number: int, most: int) -> list[int]:
    """Up to `most` of the places 0..number-1, evenly spread from first to last."""
    return sorted({round(place * (number - 1) / max(1, min(number, most) - 1)) for place in range(min(number, most))})


def _panels(number: int) -> tuple[int, int]:
    """Rows and columns for so many panels: one row of up to three, else two columns."""
    columns = number if number <= 3 else 2
    return math.ceil(number / columns), columns


def _cut(text: str, most: int) -> str:
    text = text or "(no words)"
    return text if len(text) <= most else text[: most - 1] + "…"


def _short(name: str, most: int = 16) -> str:
    """A class name that fits: its first synonym, cut if it must be."""
    first = name.split(",")[0].strip()
    return _cut(first, most)


def _are_short(ranked: Sequence[tuple[str, float]]) -> bool:
    return all(len(_short(name)) <= 4 for name, _ in ranked)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
