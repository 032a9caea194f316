"""What `diffmoe watch` shows of a run, or of several beside each other, as lines of a terminal."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from diffmoe_ep.train.charts import bar, curve, sampled, sparkline
from diffmoe_ep.train.progress import FIGURES, duration, figures
from diffmoe_ep.train.run_view import RunView, number

Line = list[tuple[str, str]]  # parts of a line: text, and a color of COLORS or ""
COLORS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35"}
LABEL = 10  # characters left of a curve
MOST_EVENTS = 3
CELLS = ((20, 8), (14, 4))  # of capacity by layer: (width of a cell, of its bar), where there is room and else


def rendered(lines: Sequence[Line], width: int, color: bool) -> list[str]:
    """Lines as text, cut at the terminal's width; color: with the codes of ANSI terminals."""
    result = []
    for line in lines:
        left, text = width, ""
        for part, name in line:
            part = part[:left]
            left -= len(part)
            text += f"\x1b[{COLORS[name]}m{part}\x1b[0m" if color and name and part else part
        result.append(text if color else text.rstrip())
    return result


def screen(views: Sequence[RunView], width: int, height: int) -> list[Line]:
    """One run in full, several as a table."""
    return _run(views[0], width, height) if len(views) == 1 else _table(views, width)


def _run(view: RunView, width: int, height: int) -> list[Line]:
    head, capacity, foot = _head(view, width), _capacity(view, width), _foot(view)
    norm = _small(view, "grad_norm", "norm", width, of=max)  # which a mean would hide
    curves = [norm, _small(view, "samples_per_second", "samples/s", width)]
    taken = len(head) + 1 + len(curves) + bool(capacity) + len(capacity) + bool(foot) + len(foot) + 1
    loss = _loss(view, width, max(3, min(14, height - taken)))
    lines = [*head, *loss, *([] if not loss else curves)]
    for part in (capacity, foot):
        lines += [[], *part] if part else []
    return lines


def _head(view: RunView, width: int) -> list[Line]:
    """Name, state, how far, figures."""
    state, age = view.state, view.age
    color = "red" if state.is_bad else "green" if state.word in ("trains", "is finished", "starts") else "yellow"
    name, now = str(view.folder.path), time.strftime("%H:%M:%S")
    lines: list[Line] = [
        [(name, "bold"), (" " * max(2, width - len(name) - len(now)), ""), (now, "dim")],
        [(state.word, color), (f"  {state.more}" if state.more else "", "")],
    ]
    heard = [] if age is None else [f"last line {duration(age)} ago"]
    if view.total is None:
        return [*lines, [(f"step {view.step}", ""), ("".join(f"  {part}" for part in heard), "dim")], []]
    if state.word in ("trains", "is quiet") and (left := _left(view)):
        heard.insert(0, f"ETA {left}")
    share = min(1.0, view.step / view.total)
    said = f"step {view.step:,} of {view.total:,}  {share:.1%}"
    more = "".join(f"  {part}" for part in heard)
    room = max(4, width - len(said) - len(more) - 4)
    lines.append([(said, ""), ("  ▕", "dim"), (f"{bar(share, room):<{room}}", "blue"), ("▏", "dim"), (more, "dim")])
    if view.last:
        shown = {key: number(view.last, key) for key, _, _ in FIGURES if key != "eta_seconds" and key in view.last}
        lines += [[], [(figures(shown, width), "bold")]]
    return lines


def _loss(view: RunView, width: int, height: int) -> list[Line]:
    """The curve of the loss, on a logarithmic scale where it falls far."""
    columns = max(10, width - LABEL - 1)
    values = sampled(view.steps, view.curves["loss"], 2 * columns)
    if len(values) < 2 or height < 1:
        return []
    low, high = min(values), max(values)
    far = low > 0 and high > 4 * low
    drawn = curve([math.log(value) for value in values] if far else values, height)
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    if height > 2:
        labels[height // 2] = "loss (log)" if far else "loss"
    lines: list[Line] = [
        [(f"{labels.get(row, ''):>{LABEL}}", "dim"), ("▏", "dim"), (text, "blue")] for row, text in enumerate(drawn)
    ]
    ends = f"step {view.steps[0]:,}", f"{view.step:,}"
    gap = max(1, columns - len(ends[0]) - len(ends[1]))
    return [*lines, [(" " * (LABEL + 1) + ends[0] + " " * gap + ends[1], "dim")]]


def _small(view: RunView, key: str, name: str, width: int, of: Callable[[Sequence[float]], float] = fmean) -> Line:
    """A curve in one line, with its least and greatest value."""
    columns = max(10, width - LABEL - 24)
    values = sampled(view.steps, view.curves[key], columns, of)
    if not values:
        return [(f"{name:>{LABEL}}", "dim"), ("▏not logged", "dim")]
    ends = f"  {min(values):.3g} to {max(values):.3g}"
    return [(f"{name:>{LABEL}}", "dim"), ("▏", "dim"), (sparkline(values), "magenta"), (ends, "dim")]


def _capacity(view: RunView, width: int) -> list[Line]:
    """The capacity of each MoE layer as a bar, that of a dense model being half of the longest."""
    layers = view.last.get("capacity_per_layer")
    if not isinstance(layers, list) or not layers or not all(isinstance(each, int | float) for each in layers):
        return []
    cell, wide = next((pair for pair in CELLS if len(layers) <= 3 * (width // pair[0])), CELLS[-1])
    columns = max(1, width // cell)
    rows = math.ceil(len(layers) / columns)
    lines: list[Line] = [[("capacity by layer", "bold"), (f"  1 is a dense model's, {bar(0.5, wide)}", "dim")]]
    for row in range(rows):
        line: Line = []
        for layer in range(row, len(layers), rows):
            drawn = f"{bar(layers[layer] / 2, wide):<{wide}}"
            line += [(f"{layer:>3} ", "dim"), (drawn, "green"), (f" {layers[layer]:<{cell - wide - 5}.2f}", "")]
        lines.append(line)
    return lines


def _foot(view: RunView) -> list[Line]:
    """The last checkpoint and the last events."""
    lines: list[Line] = []
    if view.checkpoint is not None:
        try:
            age = max(0.0, time.time() - view.checkpoint.stat().st_mtime)
        except OSError:  # it has just been replaced
            age = 0.0
        lines.append([("last checkpoint ", "bold"), (view.checkpoint.name, ""), (f"  {duration(age)} ago", "dim")])
    events = view.events()[-MOST_EVENTS:]
    lines += [[(f"step {step:,}  ", "dim"), (text, "yellow")] for step, text in events]
    return lines


def _table(views: Sequence[RunView], width: int) -> list[Line]:
    """A line for each run, with the loss at the last step that all have reached, and its curve on a common scale."""
    common = min(view.step for view in views)
    titles = ("run", "state", "step", "of", "loss", f"at {common:,}", "samples/s", "ETA")
    rows = [titles, *(_row(view, common) for view in views)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = max(10, width - sum(widths) - 2 * len(widths))
    curves = [sampled(view.steps, view.curves["loss"], columns) for view in views]
    every = [value for values in curves for value in values]
    lines: list[Line] = [[(time.strftime("%H:%M:%S"), "dim")]]
    for place, row in enumerate(rows):
        sides = "<<" + ">" * (len(row) - 2)
        text = "".join(f"{cell:{side}{wide}}  " for cell, side, wide in zip(row, sides, widths, strict=True))
        if place == 0:
            lines.append([(text, "bold"), ("loss over its steps", "bold")])
            continue
        state = views[place - 1].state
        drawn = sparkline(curves[place - 1], min(every), max(every)) if every else ""
        lines.append([(text, "red" if state.is_bad else ""), (drawn, "blue")])
    return lines


def _row(view: RunView, common: int) -> tuple[str, ...]:
    loss = view.curves["loss"][-1] if view.steps else None
    speed = number(view.last, "samples_per_second")
    trains = view.state.word == "trains"
    return (
        _short(view.folder.path), view.state.word, f"{view.step:,}", "" if view.total is None else f"{view.total:,}",
        _shown(loss), _shown(view.at(common)), f"{speed:.0f}" if trains else "", _left(view) if trains else "",
    )  # fmt: skip


def _left(view: RunView) -> str:
    """Time left, in words, where it is known."""
    seconds = number(view.last, "eta_seconds")
    return duration(seconds) if math.isfinite(seconds) else ""


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _short(path: Path, most: int = 24) -> str:
    text = str(path)
    return text if len(text) <= most else "…" + text[1 - most :]
