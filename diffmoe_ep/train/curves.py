"""The curves of a run, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffmoe_ep.config import ConfigError
from diffmoe_ep.config.foreign import is_number, parse_json_lines, read_bytes
from diffmoe_ep.sampling.picture import BLUE, GREEN, ORANGE, PALE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curves(metrics: Path | str, path: Path | str) -> None:
    """Draw a run's metrics.jsonl over samples seen as one PNG: loss, capacity, learning rate, samples per second.

    A step that was logged twice, before and after a resume, counts as it was last logged; lines cut short by a kill and
    missing keys are skipped. Raises ConfigError without matplotlib.
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
    loss, capacity, lr, speed = figure.subplots(2, 2, sharex=True).flat
    _draw_loss(loss, records)
    _draw_capacity(capacity, records)
    _draw(lr, records, "lr", PURPLE, "learning rate", smooth=False)
    _draw(speed, records, "samples_per_second", GREEN, "samples/s")
    for axes, title in ((loss, "Loss"), (capacity, "Capacity"), (lr, "Learning rate"), (speed, "Samples per second")):
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
    for axes in (lr, speed):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("samples seen", fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, format="png")


Record = dict[str, Any]  # one line of metrics.jsonl


def _records(metrics: Path) -> list[Record]:
    """The logged steps in order, each as it was last logged."""
    records = {record["step"]: record for record in parse_json_lines(read_bytes(metrics), "step")[0]}
    return [records[step] for step in sorted(records)]


def _series(records: list[Record], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Samples seen and values of the steps that logged the key: (m,) and (m,), or (m, layers) for lists."""
    chosen = [record for record in records if _is_drawn(record.get(key)) and is_number(record.get("samples", 0))]
    chosen = [record for record in chosen if _length(record[key]) == _length(chosen[0][key])]
    samples = np.array([record.get("samples", record["step"]) for record in chosen], dtype=np.float64)
    return samples, np.array([record[key] for record in chosen], dtype=np.float64)


def _is_drawn(value: Any) -> bool:
    """Whether a value is a number, or a number for each layer."""
    return is_number(value) or (isinstance(value, list) and all(map(is_number, value)))


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred mean over a thirtieth of the points, (m,) or (m, layers).

    At the start, where curves are steep, the window shrinks evenly; at the end it loses its right half only, to stay
    calm.
    """
    half = max(1, len(values) // 60)
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + np.minimum(place, half), len(values) - 1)
    return np.stack([values[a : b + 1].mean(0) for a, b in zip(first, last, strict=True)])


def _draw(axes: "Axes", records: list[Record], key: str, color: str, label: str, smooth: bool = True) -> None:
    """One curve: raw in a light tone under its smoothed self, or as it is."""
    samples, values = _series(records, key)
    if values.shape[0] == 0:
        return
    if smooth and len(values) > 10:
        axes.plot(samples, values, color=color, alpha=0.25, linewidth=0.8)
        values = _smoothed(values)
    axes.plot(samples, values, color=color, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None)


def _draw_loss(axes: "Axes", records: list[Record]) -> None:
    parts = [("diffusion_loss", BLUE, "diffusion"), ("predictor_loss", ORANGE, "capacity predictor")]
    if not any(len(_series(records, key)[0]) for key, _, _ in parts):
        parts = [("loss", BLUE, "loss")]
    for key, color, label in parts:
        _draw(axes, records, key, color, label)
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
