"""Draws the losses of one training in several layouts: `python -m diffmoe_ep.verify.layouts OUT.png FIRST_RUN RUN...`.

The first run is the one that the others are compared with; `launch/same_run.sh` trains them.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffmoe_ep.config import Config, ConfigError, load
from diffmoe_ep.config.foreign import is_number, parse_json, parse_json_lines, read_bytes

COLOURS = ("#f2b134", "#ed553b", "#c05a9d", "#6a4c93", "#2a7ab9", "#14213d")
EQUAL = 2e-8  # where equal losses are drawn on the logarithmic axis


@dataclass(frozen=True)
class Run:
    """The losses of a run, step by step, and how it was laid out."""

    label: str
    losses: tuple[float, ...]

    def differences(self, first: "Run") -> list[float]:
        """Distance of each loss from that of the first run at the same step."""
        return [abs(one - other) for one, other in zip(self.losses, first.losses, strict=True)]


def read(folder: Path) -> Run:
    """The losses and the layout that a run folder holds; ConfigError names a folder without them."""
    try:
        lines, _ = parse_json_lines(read_bytes(folder / "metrics.jsonl"), "step")
        config = load(folder / "config.yaml")
        ranks = int(parse_json(read_bytes(folder / "environment.json"))["ranks"])
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder} is no run whose losses can be drawn ({error}); train it first") from error
    losses = {line["step"]: line["loss"] for line in lines if is_number(line.get("loss"))}
    return Run(_label(config, ranks), tuple(losses[step] for step in sorted(losses)))


def _label(config: Config, ranks: int) -> str:
    layout = config.parallel
    return f"{ranks} rank{'s' * (ranks > 1)}, EP {layout.expert_parallel}, ZeRO {layout.zero_stage}"


def summary(runs: list[Run]) -> str:
    """How far losses are from the first run's."""
    differences = [difference for run in runs[1:] for difference in run.differences(runs[0])]
    return f"largest difference {max(differences):.1e}, median {statistics.median(differences):.1e}"


def draw(runs: list[Run], out: Path) -> None:
    """Write the picture: losses above, their distances from the first run's below, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9.2, 5.0), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(runs[0].losses) + 1)
    for number, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        width = 1.2 + 2.4 * (len(runs) - 1 - number)  # what was drawn before shows at both sides of what lies on it
        losses.plot(steps, run.losses, color=colour, linewidth=width, solid_capstyle="round", label=run.label)
        if number:
            apart = [max(difference, EQUAL) for difference in run.differences(runs[0])]
            beside = [step + 0.12 * (number - 3) for step in steps]  # or all but the last would be hidden
            differences.plot(beside, apart, ".", color=colour, markersize=4.5, markeredgewidth=0)
    figure.suptitle(f"One training in {len(runs)} layouts", fontsize=14)
    losses.set_ylabel("loss")
    losses.legend(frameon=False, fontsize=9.5, labelspacing=0.7)
    differences.set_title(summary(runs), fontsize=10.5, loc="left")
    differences.set_ylabel("distance from\n" + runs[0].label.split(",")[0])
    differences.set_yscale("log")
    differences.set_ylim(EQUAL / 1.6, 1e-3)
    differences.set_yticks([EQUAL, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3], ["equal", *(f"1e-{n}" for n in (7, 6, 5, 4, 3))])
    differences.minorticks_off()
    unit = float(np.spacing(np.float32(statistics.median(runs[0].losses))))
    differences.axhline(unit, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
    differences.text(1, 5 * unit, "the last bit of a float32 loss", color="#666666", fontsize=8.5, va="bottom")
    differences.set_xlabel("step")
    differences.margins(x=0.01)
    for axes in (losses, differences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    figure.savefig(out, dpi=150)
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)  # a quarter of the bytes


def main(arguments: list[str]) -> None:
    """Draw the runs, and print the largest difference."""
    if len(arguments) < 3:
        raise SystemExit("usage: python -m diffmoe_ep.verify.layouts OUT.png FIRST_RUN RUN...")
    runs = [read(Path(folder)) for folder in arguments[1:]]
    draw(runs, Path(arguments[0]))
    print(f"{len(runs)} layouts, {len(runs[0].losses)} steps: {summary(runs)}")
    print(f"written to {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
