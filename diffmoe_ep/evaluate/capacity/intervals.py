"""Interval search (Eq. 16): which constant threshold serves best, at no more compute than a dense model's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from diffmoe_ep.config import ConfigError, ModelConfig, SampleConfig, has_experts, has_predictor
from diffmoe_ep.evaluate.capacity.report_files import write_csv
from diffmoe_ep.evaluate.capacity.sample_fn import SampleFn
from diffmoe_ep.evaluate.capacity.strokes import (
    HARD,
    add_legend,
    finish,
    is_number,
    is_wide,
    new_figure,
    plain_numbers,
    save_figure,
)
from diffmoe_ep.sampling.picture import BLUE, ORANGE, PALE
from diffmoe_ep.sampling.sample import Samples
from diffmoe_ep.tables import table

Threshold = float | Literal["dynamic", "raw"]


@dataclass(frozen=True)
class Candidate:
    """One threshold and its result (a row of the paper's Table 10)."""

    threshold: Threshold  # a constant for all experts; or dynamic or raw, for comparison
    capacity: float  # C_infer^avg
    score: float  # of the samples


@dataclass(frozen=True)
class Search:
    """The outcome of an interval search (Eq. 16)."""

    candidates: tuple[Candidate, ...]  # in the order of the request
    # the constant with the best score among those with C_infer^avg <= limit; None: there is none
    best: Candidate | None
    score: str  # what the score is
    lower_is_better: bool
    limit: float  # largest capacity that may win

    def lines(self) -> list[str]:
        """A table for the terminal."""
        rows = [
            (_name(one.threshold), f"{one.capacity:.3f}", f"{one.score:.4g}", self._remark(one))
            for one in self.candidates
        ]
        rows.insert(
            0, ("threshold", "C_infer^avg", self.score, f"{'lower' if self.lower_is_better else 'higher'} is better")
        )
        return [*table(rows, align="<>><", rule=False), self._verdict()]

    def as_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {
            "candidates": [vars(one) for one in self.candidates],
            "best": None if self.best is None else vars(self.best),
            "score": self.score,
            "lower_is_better": self.lower_is_better,
            "limit": self.limit,
        }

    def _remark(self, one: Candidate) -> str:
        if one is self.best:
            return f"best with C <= {self.limit:g}"
        if isinstance(one.threshold, str):
            return "for comparison"
        return "" if one.capacity <= self.limit else f"C > {self.limit:g}"

    def _verdict(self) -> str:
        if self.best is not None:
            return f"best: sample.threshold={self.best.threshold:g}"
        constants = [one for one in self.candidates if not isinstance(one.threshold, str)]
        if any(one.capacity <= self.limit for one in constants):
            return f"no constant with C_infer^avg <= {self.limit:g} has a finite score: nothing to choose"
        largest = max(one.threshold for one in constants)
        return f"none of these constants has C_infer^avg <= {self.limit:g}: try thresholds above {largest:g}"


def check_search(model: ModelConfig, sample: SampleConfig, thresholds: Sequence[Threshold]) -> None:
    """Raise ConfigError, before anything is sampled, unless these thresholds can be tried on this model."""
    if not has_experts(model):
        raise ConfigError(
            "model.family is dense: without experts there is no threshold to search; name a run of family diffmoe"
        )
    if not has_predictor(model):
        raise ConfigError(
            f"model.family {model.family} has no capacity predictor here, so no threshold chooses its tokens; "
            "name a run of family diffmoe"
            + (", or one of ec trained with model.predictor=true" if model.family == "ec" else "")
        )
    if sample.selection == "topk":
        raise ConfigError(
            "sample.selection is topk, which no threshold changes; set sample.selection=threshold or count"
        )
    constants = [value for value in thresholds if not isinstance(value, str)]
    if not constants:
        raise ConfigError("--thresholds names no constant; give some from 0 to 1, for example 0.3,0.4,0.5")
    for value in constants:
        if not 0 <= value <= 1:  # not a number fails too
            raise ConfigError(
                f"--thresholds holds {value:g}; a threshold is compared with a probability, so give numbers from 0 to 1"
            )


def with_threshold(sample_fn: SampleFn, labels: Tensor, config: SampleConfig) -> Callable[[Threshold], Samples | None]:
    """What `search` samples with: the same samples, of classes labels (n,), at whatever threshold."""
    return lambda threshold: sample_fn(labels, replace(config, threshold=threshold), None)


def search(
    sample_with: Callable[[Threshold], Samples | None],
    thresholds: Sequence[Threshold],
    scorer: Callable[[Samples], float],
    *,
    score: str = "score",
    lower_is_better: bool = True,
    limit: float = 1.0,
) -> Search | None:
    """Sample and score with each threshold and pick the best constant with C_infer^avg <= limit; None on all ranks but
    the first.

    Of equal scores the one with the smaller capacity wins; a score that is no finite number never does.
    """
    found: list[Candidate] = []
    first = True
    for threshold in thresholds:
        samples = sample_with(threshold)
        if samples is None:
            first = False
            continue
        found.append(Candidate(threshold, samples.capacity.average(), float(scorer(samples))))
    if not first:
        return None
    fit = [
        one
        for one in found
        if not isinstance(one.threshold, str) and one.capacity <= limit and math.isfinite(one.score)
    ]
    best = min(fit, key=lambda one: (one.score if lower_is_better else -one.score, one.capacity), default=None)
    return Search(tuple(found), best, score, lower_is_better, limit)


def write_search(found: Search, out: Path) -> list[str]:
    """Write thresholds.csv and thresholds.png (Figure 7); returns their names."""
    rows = [(_name(one.threshold), one.capacity, one.score, int(one is found.best)) for one in found.candidates]
    write_csv(out / "thresholds.csv", ("threshold", "capacity", found.score.replace(" ", "_"), "best"), rows)
    points = [(_name(one.threshold), one.capacity, one.score) for one in found.candidates]
    best = None if found.best is None else _name(found.best.threshold)
    plot_thresholds(out / "thresholds.png", points, score=found.score, best=best, limit=found.limit)
    return ["thresholds.csv", "thresholds.png"]


def plot_thresholds(
    path: Path, points: Sequence[tuple[str, float, float]], *, score: str, best: str | None, limit: float
) -> None:
    """The score over C of each threshold (its name, C, score): constants in blue, others in red, the best circled
    (Figure 7).
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    constants = sorted((capacity, value, name) for name, capacity, value in points if is_number(name))
    others = [(capacity, value, name) for name, capacity, value in points if not is_number(name)]
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
    if is_wide([one[0] for one in constants]):
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
    if is_wide([one[1] for one in constants]):
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    axes.margins(0.08, 0.15)
    finish(axes, "Interval search over thresholds", "C_infer^avg", score)
    add_legend(axes)
    save_figure(figure, path)


def _name(threshold: Threshold) -> str:
    return threshold if isinstance(threshold, str) else f"{threshold:g}"
