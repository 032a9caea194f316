"""The folder of a run: its config, the environment report, metrics.jsonl, pictures."""

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffmoe_ep.checkpoint.same_run import RecipeChange, shown
from diffmoe_ep.config import Config, ConfigError, dump
from diffmoe_ep.config.foreign import parse_json_lines, read_bytes
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.curves import curves
from diffmoe_ep.train.provenance import environment


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of sample grids."""
        return self.path / "samples"

    def problem(self) -> str | None:
        """Why this process cannot write here, or None."""
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            if self.metrics.exists() and not self.metrics.is_file():
                return f"{self.metrics} is not a file; move it away, or give another folder with folder=..."
            probe = self.path / f".write-{platform.node()}"
            probe.write_text("")
            probe.unlink(missing_ok=True)
        except OSError as error:
            return (
                f"folder {self.path} cannot be written ({error.strerror}); give another with folder=... "
                "or change its permissions"
            )
        return None

    @property
    def recipe(self) -> Path:
        """One JSON object a line, one line per key of the recipe that was changed at a resume."""
        return self.path / "recipe.jsonl"

    def describe(
        self,
        config: Config,
        mesh: Mesh,
        ancestry: Sequence[dict[str, Any]] = (),
        recipe: Sequence[RecipeChange] = (),
    ) -> None:
        """Write the resolved config, the environment report, the weights' ancestry and the changes of the recipe, on
        rank 0; collective.
        """
        machines = gather_objects((mesh.host, str(mesh.device)), mesh.world)
        if not mesh.is_first:
            return
        earlier = [f"# until step {change.step} this run had {change.key} {shown(change.was)}\n" for change in recipe]
        _replace(self.path / "config.yaml", "".join(earlier) + dump(config))
        if recipe:
            _replace(self.recipe, "".join(json.dumps(asdict(change)) + "\n" for change in recipe))
        else:  # a run that went back to before its changes
            self.recipe.unlink(missing_ok=True)
        _replace(self.path / "environment.json", json.dumps(environment(mesh, machines), indent=2) + "\n")
        if ancestry:
            _replace(self.path / "ancestry.json", json.dumps(list(ancestry), indent=2) + "\n")

    def grid(self, step: int) -> Path:
        """The sample grid of a step."""
        return self.samples / f"step-{step:07d}.png"

    def picture(self, path: Path, make: Callable[[Path], None]) -> None:
        """Write a picture; a full disk is reported, and does not end a run in which other ranks wait."""
        try:
            make(path)
        except OSError as error:
            print(f"the picture {path} could not be written ({error}); the run goes on", file=sys.stderr, flush=True)

    def draw_curves(self) -> None:
        """Draw loss, capacity, learning rate and speed so far; without matplotlib there are no curves."""
        if find_spec("matplotlib") is not None:
            self.picture(self.path / "curves.png", lambda path: curves(self.metrics, path))


class MetricsFile:
    """metrics.jsonl: one line per logged step. A resumed run first cuts off the steps that it will repeat, and a line
    that a kill cut short; a file with anything else in it is kept as it was under another name.
    """

    def __init__(self, path: Path, step: int) -> None:
        content = read_bytes(path) if path.exists() else b""
        lines, strange = parse_json_lines(content, "step")
        if strange:
            aside = path.with_name(f"{path.name}.damaged-{hashlib.sha256(content).hexdigest()[:8]}")
            aside.write_bytes(content)
            what = f"{path}: {strange} lines are no logged steps and go; it is kept as {aside.name}"
            print(what, file=sys.stderr, flush=True)
        kept = [line for line in lines if line["step"] <= step]
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; raises ConfigError when the disk is full."""
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}); make room, then run the same command to resume"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
