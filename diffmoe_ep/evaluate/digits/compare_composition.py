"""Text-to-image runs side by side: how well each follows its prompts, as `diffmoe evaluate --composition` found and
wrote to RUN/scores.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffmoe_ep.config import ConfigError, load_stored
from diffmoe_ep.config.foreign import parse_json, read_bytes
from diffmoe_ep.evaluate.digits.composition import TASKS
from diffmoe_ep.model.count import count
from diffmoe_ep.tables import table

SCORE = "scores/composition.json"


@dataclass(frozen=True)
class Row:
    """One run."""

    run: str  # its folder's name
    parameters: int  # trainable, in all
    activated: float  # those that work on an average token, at the capacity found
    tasks: dict[str, float]  # share of pictures that are right, by task
    overall: float
    shuffled: float  # overall, prompts dealt to other pictures
    capacity: float


@dataclass(frozen=True)
class Compositions:
    """Runs in the order given."""

    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As a table to read."""
        cells: list[tuple[str, ...]] = [("run", "parameters", "activated", *TASKS, "overall", "shuffled", "C")]
        for row in self.rows:
            shares = (*(row.tasks[task] for task in TASKS), row.overall, row.shuffled, row.capacity)
            cells.append(
                (row.run, f"{row.parameters:,}", f"{row.activated:,.0f}", *(f"{share:.3f}" for share in shares))
            )
        return table(cells, rule=False)


def compare_composition(folders: Sequence[Path]) -> Compositions:
    """Read run folders; ConfigError for one that was not scored."""
    return Compositions(tuple(_row(folder) for folder in folders))


def _row(folder: Path) -> Row:
    for name in ("config.yaml", SCORE):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} has no {name}; train it, then diffmoe evaluate {shlex.quote(str(folder))} --composition "
                f"--out {shlex.quote(f'{folder}/scores')} ..."
            )
    sizes = count(load_stored(folder / "config.yaml").model)
    try:
        found = parse_json(read_bytes(folder / SCORE))
        tasks = {task: float(found["samples"][task]["right"]) for task in TASKS}
        overall, shuffled, capacity = (float(found[key]) for key in ("overall", "overall_shuffled", "capacity"))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{folder / SCORE} holds no scores ({error}); score the run anew") from error
    return Row(folder.name, sizes.total, sizes.activated(capacity), tasks, overall, shuffled, capacity)
