"""Where a run shows itself besides its folder: TensorBoard and Weights & Biases, over samples seen."""

import json
import secrets
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from diffmoe_ep.config import Config, ConfigError, to_tree
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.provenance import redacted

PACKAGES = {"tensorboard": "log", "wandb": "wandb"}  # switch of the section log, package -> the extra that brings it


class Board(Protocol):
    """One of them."""

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Write numbers at a place in the run."""

    def picture(self, name: str, path: Path, samples: int) -> None:
        """Show a PNG."""

    def close(self, finished: bool) -> None:
        """Write what is left; finished: whether the run is at its end, or will go on."""


def check_boards(config: Config) -> None:
    """Raise ConfigError for a board whose package is missing."""
    for package, extra in PACKAGES.items():
        if getattr(config.log, package) and getattr(find_spec(package), "origin", None) is None:  # or a mere folder
            raise ConfigError(
                f"log.{package}=true needs {package}, which is not installed: pip install 'diffmoe_ep[{extra}]', or "
                f"set log.{package}=false"
            )


class Boards:
    """All that are switched on. One that fails while the run trains is told and left out; the run goes on."""

    def __init__(self, config: Config, mesh: Mesh, step: int) -> None:
        """Open them where the run goes on after `step`; ConfigError, on all ranks alike, where that fails;
        collective.
        """
        self.boards: dict[str, Board] = {}
        problem = None
        if mesh.is_first:
            kinds: dict[str, Callable[[Config, int], Board]] = {
                "log.tensorboard": TensorBoard,
                "log.wandb": WeightsAndBiases,
            }
            for switch, kind in kinds.items():
                if getattr(config.log, switch.removeprefix("log.")):
                    try:
                        self.boards[switch] = kind(config, step)
                    except Exception as error:  # of many kinds: no login, no network, no room on the disk
                        told = " ".join(str(error).split())
                        problem = (
                            problem or f"{switch}=true cannot be opened ({told}); mend that, or set {switch}=false"
                        )
        mesh.agree(problem)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write a step's metrics."""
        self._each(lambda board: board.scalars(scalars(metrics), metrics["samples"]))

    def picture(self, name: str, path: Path, samples: int) -> None:
        """Show a picture of the run folder, if it is there."""
        if self.boards and path.is_file():
            self._each(lambda board: board.picture(name, path, samples))

    def close(self, finished: bool) -> None:
        """Write what is left."""
        self._each(lambda board: board.close(finished))

    def _each(self, work: Callable[[Board], None]) -> None:
        for switch, board in list(self.boards.items()):
            try:
                work(board)
            except Exception as error:  # whatever a service may raise costs no training
                del self.boards[switch]
                print(f"{switch} failed ({error}); the run goes on without it", file=sys.stderr, flush=True)


class TensorBoard:
    """Events in RUN/tensorboard; a run that goes on takes back those of the steps that it repeats."""

    def __init__(self, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step * config.train.global_batch + 1
        self.writer = SummaryWriter(str(Path(config.folder) / "tensorboard"), purge_step=purge)

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Write numbers."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, samples)
        self.writer.flush()

    def picture(self, name: str, path: Path, samples: int) -> None:
        """Write a PNG's pixels."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), samples, dataformats="HWC")
        self.writer.flush()

    def close(self, finished: bool) -> None:  # noqa: ARG002
        """Close the file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the folder's name, whose number RUN/wandb.json keeps for when it goes on.

    Steps that are repeated after a resume are sent again: on the same layout the same numbers.
    """

    def __init__(self, config: Config, step: int) -> None:  # noqa: ARG002
        import wandb

        folder = Path(config.folder)
        # no command line, no commit, no code: credentials may stand in the one, and what is sent is for the user to say
        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
        self.run = wandb.init(
            id=_number(folder / "wandb.json"), name=folder.name, resume="allow", dir=folder, settings=quiet,
            config=redacted(to_tree(config)),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="samples")

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Send numbers."""
        self.run.log({**values, "samples": samples})

    def picture(self, name: str, path: Path, samples: int) -> None:
        """Send a PNG."""
        import wandb

        self.run.log({name: wandb.Image(str(path)), "samples": samples})

    def close(self, finished: bool) -> None:
        """Send what is left."""
        if not finished:
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if finished else 1)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the names that boards show them under: train/loss; capacity by layer,
    capacity/layer_00; passes by dataset, epoch/NAME. Those by expert are too many.
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        match value:
            case bool() | str():
                pass
            case int() | float():
                found[f"train/{name}"] = value
            case dict():
                found |= {f"{name}/{part}": number for part, number in value.items()}
            case list() if name == "capacity_per_layer":
                found |= {f"capacity/layer_{layer:02d}": number for layer, number in enumerate(value)}
    return found


def _number(path: Path) -> str:
    """The run's number there, drawn once."""
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    number = secrets.token_hex(4)
    path.write_text(json.dumps({"id": number}) + "\n", encoding="utf-8")
    return number
