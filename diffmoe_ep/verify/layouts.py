"""Draws the losses of one training in several layouts on one another: `python -m diffmoe_ep.verify.layouts OUT RUN...`.

The first run is the one that the others are compared with; `launch/same_run.sh` trains them.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.config import Config, ConfigError, load

COLOURS = ("#f2b134", "#ed553b", "#c05a9d", "#6a4c93", "#2a7ab9", "#14213d")
EPSILON = 2.0**-24  # half a unit in the last place of a float32 between 1 and 2


@dataclass(frozen=True)
class Run:
    """The losses of a run, step by step, and how it was laid out."""

    label: str
    losses: tuple[float, ...]


def read(folder: Path) -> Run:
    """The losses and the layout that a run folder holds; ConfigError names a folder without them."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        config = load(folder / "config.yaml")
        ranks = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["ranks"]
    except (OSError, KeyError) as error:
        raise ConfigError(f"{folder} is no run whose losses can be drawn ({error}); train it first") from error
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return Run(_label(config, ranks), tuple(losses[step] for step in sorted(losses)))


def _label(config: Config, ranks: int) -> str:
    layout = config.parallel
    return f"{ranks} rank{'s' * (ranks > 1)}, EP {layout.expert_parallel}, ZeRO {layout.zero_stage}"


def largest_difference(runs: list[Run]) -> float:
    """The largest distance of a loss from that of the first run at the same step."""
    return max(abs(one - other) for run in runs[1:] for one, other in zip(run.losses, runs[0].losses, strict=True))


def draw(runs: list[Run], out: Path) -> None:
    """Write the picture: losses above, their distances from the first run's below, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 4.9), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(runs[0].losses) + 1)
    for number, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        width = 1.2 + 2.4 * (len(runs) - 1 - number)  # what was drawn before shows at both sides of what lies on it
        losses.plot(steps, run.losses, color=colour, linewidth=width, solid_capstyle="round", label=run.label)
        if number:
            apart = [max(abs(one - other), EPSILON / 4) for one, other in zip(run.losses, runs[0].losses, strict=True)]
            differences.plot(steps, apart, color=colour, linewidth=1.1, marker=".", markersize=3)
    figure.suptitle(
        f"One training, {len(runs)} layouts: losses differ by at most {largest_difference(runs):.1e}", fontsize=13
    )
    losses.set_ylabel("loss")
    losses.legend(frameon=False, fontsize=9.5)
    differences.set_yscale("log")
    differences.set_ylabel("distance from\n" + runs[0].label.split(",")[0])
    differences.axhline(EPSILON, color="#888888", linewidth=0.8, linestyle="--")
    differences.text(steps[-1], EPSILON, "rounding of a float32 ", color="#666666", fontsize=8, ha="right", va="bottom")
    differences.set_xlabel("step")
    differences.margins(x=0.01)
    for axes in (losses, differences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    figure.savefig(out, dpi=180, pil_kwargs={"optimize": True})


def main(arguments: list[str]) -> None:
    """Draw the runs, and print the largest difference."""
    if len(arguments) < 3:
        raise SystemExit("usage: python -m diffmoe_ep.verify.layouts OUT.png FIRST_RUN RUN...")
    runs = [read(Path(folder)) for folder in arguments[1:]]
    draw(runs, Path(arguments[0]))
    print(f"{len(runs)} layouts, {len(runs[0].losses)} steps: losses differ by at most {largest_difference(runs):.2e}")
    print(f"written to {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
