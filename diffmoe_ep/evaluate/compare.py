"""Runs side by side: parameters, loss, scores and capacity, the seeds of one setting taken together.

A setting is a run's config but for its seed, its folder and how it is laid over ranks, which change nothing or only the
luck. Its name is what tells it from the other settings. Loss is the mean of the last tenth of the logged steps; scores
are those that `diffmoe evaluate` wrote to RUN/scores.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffmoe_ep.config import Config, ConfigError, effective, load_stored, to_tree
from diffmoe_ep.config.foreign import is_number, parse_json, parse_json_lines, read_bytes
from diffmoe_ep.model.count import count
from diffmoe_ep.tables import table

COLUMNS = ("loss", "accuracy", "frechet", "capacity")
UNTIL = " until step "
SCORES, RECIPE = "scores/scores.json", "recipe.jsonl"


@dataclass(frozen=True)
class Found:
    """What one run's folder holds."""

    config: Config
    step: int  # logged last
    values: dict[str, float]  # of COLUMNS those that are known
    recipe: tuple[dict[str, Any], ...] = ()  # how its recipe changed on the way


@dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone."""

    name: str  # the keys in which it differs from the other settings
    seeds: tuple[int, ...]
    steps: tuple[int, ...]  # logged last, by each
    parameters: int  # trainable, in all
    activated: float  # those that work on an average token, at the capacity found (without scores: training's)
    values: dict[str, tuple[float, ...]]  # of each column one value for each seed that has it

    def shown(self, column: str, digits: int) -> str:
        """Mean and largest distance from it over the seeds."""
        values = self.values[column]
        if not values:
            return "-"
        mean = statistics.fmean(values)
        spread = f" ±{max(abs(value - mean) for value in values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Comparison:
    """Settings side by side."""

    settings: tuple[Setting, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As a table to read."""
        rows: list[tuple[str, ...]] = [
            ("setting", "seeds", "steps", "parameters", "activated", "loss", "accuracy", "Fréchet", "C")
        ]
        for setting in self.settings:
            sizes = (f"{setting.parameters:,}", f"{setting.activated:,.0f}")
            scores = tuple(setting.shown(column, digits) for column, digits in zip(COLUMNS, (4, 3, 1, 3), strict=True))
            steps = "-".join(map(str, sorted({min(setting.steps), max(setting.steps)})))
            rows.append((setting.name, ",".join(map(str, setting.seeds)), steps, *sizes, *scores))
        return table(rows, rule=False)


def compare(folders: Sequence[Path]) -> Comparison:
    """Read run folders and lay them side by side, in the order of their first run; raises ConfigError for what is no
    run of any steps.
    """
    groups: dict[str, list[Found]] = {}
    for folder in folders:
        found = read_run(folder)
        groups.setdefault(json.dumps(_setting(found), sort_keys=True), []).append(found)
    trees = [_setting(group[0]) for group in groups.values()]
    return Comparison(
        tuple(_row(group, _name(tree, trees)) for group, tree in zip(groups.values(), trees, strict=True))
    )


def read_run(folder: Path) -> Found:
    """Read a run's folder; raises ConfigError that names what is missing."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}, so it is no run of diffmoe train; name run folders")
    lines, strange = parse_json_lines(_content(folder / "metrics.jsonl"), "step")
    if strange or not all(is_number(line.get("diffusion_loss")) for line in lines):
        raise ConfigError(
            f"{folder}/metrics.jsonl holds lines that are no logged steps with a diffusion_loss; use a sound copy, or "
            "leave the run out"
        )
    if not lines:
        raise ConfigError(
            f"{folder}/metrics.jsonl is empty: the run has logged no step yet; wait for one, or leave the run out"
        )
    losses = [line["diffusion_loss"] for line in lines[-max(1, len(lines) // 10) :]]
    values = {"loss": statistics.fmean(losses)}
    if (folder / SCORES).exists():
        values |= _scores(folder)
    changed = _content(folder / RECIPE) if (folder / RECIPE).exists() else b""
    recipe, strange = parse_json_lines(changed, "step")
    if strange or not all(isinstance(change.get("key"), str) and "was" in change for change in recipe):
        raise ConfigError(f"{folder / RECIPE} holds lines that are no changes of a recipe; use a sound copy")
    return Found(load_stored(folder / "config.yaml"), lines[-1]["step"], values, tuple(recipe))


def _scores(folder: Path) -> dict[str, float]:
    """Of a run's scores those that stand in the table."""
    try:
        found = parse_json(_content(folder / SCORES))
    except ValueError as error:
        raise ConfigError(f"{folder / SCORES} is no JSON ({error}); score the run anew") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{folder / SCORES} holds a {type(found).__name__}, not scores by name; score the run anew")
    known = {key: found[key] for key in COLUMNS if key in found}
    for key, value in known.items():
        if not is_number(value):
            raise ConfigError(f"{folder / SCORES}: {key} is {str(value)[:40]}, not a number; score the run anew")
    return known


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); use a sound copy, or leave the run out"
        ) from error


def _row(group: list[Found], name: str) -> Setting:
    sizes = count(group[0].config.model)
    values = {column: tuple(run.values[column] for run in group if column in run.values) for column in COLUMNS}
    capacity = statistics.fmean(values["capacity"]) if values["capacity"] else None
    seeds = tuple(run.config.seed for run in group)
    return Setting(name, seeds, tuple(run.step for run in group), sizes.total, sizes.activated(capacity), values)


def _setting(run: Found) -> dict[str, Any]:
    """What makes a run's numbers what they are, by dotted key: all that changes what is computed but the seed, for how
    many steps, how the recipe changed on the way, and how samples are drawn, which scores depend on.
    """
    grids = ("grid_every", "grid_size", "prompts")  # of training alone
    sampling = {f"sample.{key}": value for key, value in to_tree(run.config.sample).items() if key not in grids}
    changed = {f"{change['key']}{UNTIL}{change['step']}": change["was"] for change in run.recipe}
    made = {key: value for key, value in effective(run.config, "identity", "recipe").items() if key != "seed"}
    return made | {"train.steps": run.config.train.steps} | sampling | changed


def _name(tree: dict[str, Any], trees: list[dict[str, Any]]) -> str:
    """key=value of every key in which settings differ, whichever of them have it; - for a change that this one did not
    make. A key that has no effect in a setting is not named there: another key says why.
    """
    values = {key: [json.dumps(each[key]) for each in trees if key in each] for each in trees for key in each}
    differing = [
        key for key, found in values.items() if len(set(found)) > 1 or (UNTIL in key and len(found) < len(trees))
    ]
    told = {key: json.dumps(tree.get(key, "-")).strip('"') for key in differing if key in tree or UNTIL in key}
    return " ".join(f"{key}={value}" for key, value in told.items()) or "all runs"
