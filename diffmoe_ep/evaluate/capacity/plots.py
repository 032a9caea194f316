"""Pictures of where the compute goes, from plain numbers: each function draws one PNG.

Legend: C capacity, 1 is the compute of a dense model; N experts. Steps run from noise to image.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffmoe_ep.evaluate.capacity.strokes import (
    EASY,
    HARD,
    Numbers,
    Pictures,
    add_legend,
    are_short,
    dense_line,
    evenly_spaced,
    finish,
    name_ends,
    new_figure,
    panel_grid,
    save_figure,
    short_name,
    shorten,
    show_picture,
)
from diffmoe_ep.sampling.picture import BLUE, GREEN, ORANGE, PURPLE

MOST_PANELS = 8  # MoE layers that get a panel of their own
MOST_NAMES = 20  # classes up to which each bar has its name


def steps(path: Path, capacity: Numbers, curves: Numbers, names: Sequence[str], kind: str = "class") -> None:
    """C over sampling steps (steps,), and what the classes or prompts (n, steps), hardest first, add to it (Figure
    1c).
    """
    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    place = np.arange(len(capacity))
    if len(curves) > 1:
        many = f"range of {len(curves)} {'prompts' if kind == 'prompt' else 'classes'}"
        axes.fill_between(place, curves.min(0), curves.max(0), color=BLUE, alpha=0.13, linewidth=0, label=many)
        for end, color, which in ((0, HARD, "hardest"), (-1, EASY, "easiest")):
            label = f"{which} {kind}: {shorten(names[end], 48)} ({curves[end].mean():.3f})"
            axes.plot(place, curves[end], color=color, linewidth=1.3, label=label)
    axes.plot(
        place,
        capacity,
        color=BLUE,
        linewidth=2.4,
        marker="o" if len(capacity) == 1 else None,
        label=f"all ({capacity.mean():.3f})",
    )
    dense_line(axes)
    finish(axes, "Computation over sampling steps", "sampling step, from noise to image", "capacity C")
    add_legend(axes)
    save_figure(figure, path)


def expert_map(path: Path, capacity: Numbers, blocks: Sequence[int]) -> None:
    """C (steps, layers, N) as one heat map per layer, experts over steps; layers are named by their block."""
    from matplotlib.colors import TwoSlopeNorm

    shown = evenly_spaced(len(blocks), MOST_PANELS)
    rows, columns = panel_grid(len(shown))
    experts = capacity.shape[2]
    figure = new_figure(4.4 * columns + 1.4, max(3.0, 0.16 * experts + 1.3) * rows + 0.4)
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
    save_figure(figure, path)


def expert_curves(path: Path, capacity: Numbers, blocks: Sequence[int]) -> None:
    """C (steps, layers, N) as curves of each expert over steps, in up to four layers from first to last (Figure 12)."""
    from matplotlib import colormaps

    shown = evenly_spaced(len(blocks), 4)
    rows, columns = panel_grid(len(shown))
    figure = new_figure(5.4 * columns, 3.1 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    place, experts = np.arange(len(capacity)), capacity.shape[2]
    colors = colormaps["turbo"](np.linspace(0.06, 0.94, experts))
    for number, axes in enumerate(grid.flat):
        if number >= len(shown):
            axes.set_visible(False)
            continue
        layer = shown[number]
        for expert in range(experts):
            axes.plot(place, capacity[:, layer, expert], color=colors[expert], linewidth=1.1, alpha=0.85)
        axes.plot(place, capacity[:, layer].mean(1), color="black", linewidth=2.2, label="mean of experts")
        dense_line(axes)
        spread = capacity[:, layer].std(0).mean()
        bottom = "sampling step, from noise to image" if number + columns >= len(shown) else ""
        title = f"block {blocks[layer]}, moves by {spread:.3f} over steps"
        finish(axes, title, bottom, "capacity C" if number % columns == 0 else "")
        axes.tick_params(labelbottom=bool(bottom))
    add_legend(grid.flat[0])
    save_figure(figure, path)


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
    figure = new_figure(9, 4.4)
    axes = figure.subplots()
    spread = max(values.max() - values.min(), 1e-9)
    colors = colormaps["coolwarm"](0.08 + 0.84 * (values - values.min()) / spread)
    axes.bar(
        np.arange(number),
        values - mean,
        bottom=mean,
        width=0.78 if number <= MOST_NAMES else 1.0,
        color=colors,
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
        axes.set_xticks(
            named, [short_name(ranked[place][0]) for place in named], rotation=0 if are_short(ranked) else 40
        )
        if not are_short(ranked):
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
    else:
        name_ends(axes, ranked)
    axes.axhline(mean, color="black", linewidth=1.2, label=f"mean {mean:.3f}")
    dense_line(axes)
    finish(axes, "Computation by class, hardest to easiest", "class", "C_infer^avg", grid="y")
    add_legend(axes, loc="upper right")
    save_figure(figure, path)


def _prompts(path: Path, ranked: Sequence[tuple[str, float]], mean: float) -> None:
    """C of the prompts at either end of the ranking, as lying bars with their words."""
    ends = list(ranked) if len(ranked) <= MOST_NAMES else [*ranked[: MOST_NAMES // 2], *ranked[-MOST_NAMES // 2 :]]
    values = np.array([value for _, value in ends])
    figure = new_figure(9, 0.3 * len(ends) + 1.4)
    axes = figure.subplots()
    place = np.arange(len(ends))
    axes.barh(place, values - mean, left=mean, height=0.72, color=[HARD if value >= mean else EASY for value in values])
    for at, value in zip(place, values, strict=True):
        side, shift = ("left", 4) if value >= mean else ("right", -4)
        axes.annotate(
            f"{value:.3f}", (value, at), (shift, 0), textcoords="offset points", fontsize=8, ha=side, va="center"
        )
    axes.set_yticks(place, [shorten(name, 56) for name, _ in ends], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(mean, color="black", linewidth=1.2, label=f"mean {mean:.3f}")
    left_out = f", the {len(ends)} at either end of {len(ranked)}" if len(ends) < len(ranked) else ""
    finish(axes, f"Computation by prompt, hardest to easiest{left_out}", "C_infer^avg", "", grid="x")
    add_legend(axes, loc="lower right")
    save_figure(figure, path)


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
        return short_name(name) if kinds == "classes" else shorten(name, 40)

    rows, columns = (
        max(len(hardest), len(easiest)),
        min(8, max(len(pictures) for _, _, pictures in (*hardest, *easiest))),
    )
    longest = max(len(called(name)) for name, _, _ in (*hardest, *easiest))
    cell, gutter, gap, top = 0.62, 0.95 + 0.09 * longest, 0.25, 0.5
    half = gutter + columns * cell
    width, height = 2 * half + gap + 0.15, rows * cell + top + 0.1
    figure = new_figure(width, height, constrained=False)
    for side, (title, color, part) in enumerate(
        ((f"Hardest {kinds}", HARD, hardest), (f"Easiest {kinds}", EASY, easiest))
    ):
        left = side * (half + gap)
        figure.text(
            (left + gutter) / width, 1 - 0.3 / height, title, color=color, fontsize=13, fontweight="bold", va="center"
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
                color=color,
            )
            for column, picture in enumerate(pictures[:columns]):
                place = (
                    (left + gutter + column * cell) / width,
                    bottom / height,
                    0.94 * cell / width,
                    0.94 * cell / height,
                )
                show_picture(figure.add_axes(place), picture)
    save_figure(figure, path)


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
    and together: over all layers (steps,), and over all steps.
    """
    columns = 0 if strips is None else len(strips[0])
    figure = new_figure(11, 3.9 + (2.3 if columns else 0))
    parts = figure.subfigures(2 if columns else 1, 1, height_ratios=(2.3, 3.9) if columns else None, squeeze=False).flat
    lower = parts[-1]
    if strips is not None:
        grid = parts[0].subplots(2, columns, squeeze=False)
        for row, (title, color) in enumerate((("top-k", ORANGE), ("predictor", BLUE))):
            for column in range(columns):
                axes = grid[row][column]
                show_picture(axes, strips[row][column])
                if row == 0:
                    words = (
                        short_name(names[column], 12)
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
                color=color,
                fontweight="bold",
            )
    cost, agree = lower.subplots(1, 2)
    place = np.arange(len(agreement))
    for values, color, name in zip(capacities, (ORANGE, BLUE), ("top-k", "predictor"), strict=True):
        cost.plot(np.arange(len(values)), values, color=color, linewidth=2, label=f"{name} ({values.mean():.3f})")
    dense_line(cost)
    finish(cost, "Computation at batch 1", "sampling step, from noise to image", "capacity C")
    add_legend(cost)
    for layer, color in zip(evenly_spaced(len(blocks), 4), (PURPLE, GREEN, "#8c6d31", HARD), strict=False):
        agree.plot(place, agreement[:, layer], color=color, linewidth=1.1, alpha=0.75, label=f"block {blocks[layer]}")
    agree.plot(place, together[0], color="black", linewidth=2.2, label=f"all layers ({together[1]:.3f})")
    agree.set_ylim(0, 1.02)
    finish(
        agree,
        "Choices on which top-k and predictor agree",
        "sampling step, from noise to image",
        "share of what either takes",
    )
    add_legend(agree)
    save_figure(figure, path)
