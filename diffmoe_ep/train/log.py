"""What a run tells: its folder, the environment report, metrics.jsonl and the progress bar."""

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from diffmoe_ep.checkpoint.same_run import RecipeChange, shown
from diffmoe_ep.config import Config, ConfigError, dump, has_experts, num_tokens, pool_samples
from diffmoe_ep.model.count import count
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.picture import curves

T = TypeVar("T")
PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes."""

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
            probe = self.path / f".write-{platform.node()}"
            probe.write_text("")
            probe.unlink(missing_ok=True)
        except OSError as error:
            return f"folder {self.path} cannot be written ({error.strerror}); give another with folder=... or change its permissions"
        return None

    @property
    def recipe(self) -> Path:
        """One JSON object a line, one line a key of the recipe that was changed at a resume."""
        return self.path / "recipe.jsonl"

    def describe(
        self,
        config: Config,
        mesh: Mesh,
        ancestry: Sequence[dict[str, Any]] = (),
        recipe: Sequence[RecipeChange] = (),
    ) -> None:
        """Write the resolved config, the environment report, what the weights descend from and how the recipe changed
        (rank 0); every rank takes part.
        """
        where = gather_objects((mesh.host, str(mesh.device)), mesh.world)
        if not mesh.is_first:
            return
        report = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: _version(name) for name in PACKAGES},
            "device": torch.cuda.get_device_name(mesh.device)
            if mesh.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads a rank",
            "ranks": mesh.size,
            "expert_parallel": mesh.expert.size,
            "hosts": sorted({host for host, _ in where}),
            "rank_devices": [device for _, device in where],
        }
        earlier = [f"# until step {change.step} this run had {change.key} {shown(change.was)}\n" for change in recipe]
        _replace(self.path / "config.yaml", "".join(earlier) + dump(config))
        if recipe:
            _replace(self.recipe, "".join(json.dumps(asdict(change)) + "\n" for change in recipe))
        else:  # a run that went back to before its changes
            self.recipe.unlink(missing_ok=True)
        _replace(self.path / "environment.json", json.dumps(report, indent=2) + "\n")
        if ancestry:
            _replace(self.path / "ancestry.json", json.dumps(list(ancestry), indent=2) + "\n")

    def picture(self, name: str, make: Callable[[Path], None]) -> None:
        """Make a picture; a full disk is said, and does not end a run that others wait in."""
        try:
            make(self.path / name)
        except OSError as error:
            print(f"the picture {name} could not be written ({error}); the run goes on", file=sys.stderr, flush=True)

    def draw_curves(self) -> None:
        """Draw loss, capacity, rate and speed so far; a core installation has no plots, and trains without them."""
        if find_spec("matplotlib") is not None:
            self.picture("curves.png", lambda path: curves(self.metrics, path))


class Metrics:
    """metrics.jsonl: one line a logged step, with what a resumed run will do again cut off first."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= step]
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; raises ConfigError when the disk takes no more."""
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}); make room, then run the same command to resume"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Progress:
    """A bar on a terminal, a line now and then in a file: step, samples/s, loss, capacity, time left."""

    def __init__(self, greeting: str, step: int, steps: int) -> None:
        print(greeting, file=sys.stderr, flush=True)
        width = shutil.get_terminal_size((110, 24)).columns  # some terminals say 0, which would draw nothing
        self.bar = tqdm(
            total=steps, initial=step, unit="step", ncols=width, disable=not sys.stderr.isatty(), smoothing=0.1
        )
        self.steps, self.first = steps, step
        self.loss: float | None = None
        self.started = self.spoken = time.monotonic()

    def show(self, step: int, loss: float, capacity: float | None, samples_per_second: float) -> None:
        """Tell where the run stands; the loss shown is a moving average."""
        self.loss = loss if self.loss is None else 0.8 * self.loss + 0.2 * loss
        facts = {"samples/s": f"{samples_per_second:.0f}", "loss": f"{self.loss:.4f}"}
        if capacity is not None:
            facts["capacity"] = f"{capacity:.2f}"
        if not self.bar.disable:
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.spoken >= 10 or step == self.steps:
            self.spoken = now
            left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
            told = "  ".join(f"{name} {value}" for name, value in facts.items())
            print(f"step {step}/{self.steps}  {told}  {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class Clock:
    """Where the time goes between two logged lines."""

    def __init__(self, step: int) -> None:
        self.started = self.mark = time.monotonic()
        self.paused = self.waited = 0.0
        self.step = step

    def wait(self, get: Callable[[], T]) -> T:
        """Call `get` and count its time as waiting for data."""
        begin = time.monotonic()
        value = get()
        self.waited += time.monotonic() - begin
        return value

    def pause(self, work: Callable[[], None]) -> None:
        """Call `work` and leave its time out of the speed."""
        begin = time.monotonic()
        work()
        self.paused += time.monotonic() - begin

    def lap(self, step: int, batch: int) -> dict[str, float]:
        """Speed since the last lap, and start anew."""
        now = time.monotonic()
        spent = max(now - self.mark - self.paused, 1e-9)
        result = {
            "samples_per_second": (step - self.step) * batch / spent,
            "data_wait": self.waited / spent,
            "seconds": now - self.started,
        }
        self.mark, self.paused, self.waited, self.step = now, 0.0, 0.0, step
        return result


class Meter:
    """What training steps move over the groups of selection and dispatch, as seen from this rank."""

    def __init__(self, mesh: Mesh) -> None:
        groups = {"selection": mesh.pool, "dispatch": mesh.expert}
        self.traffic = {name: group.traffic for name, group in groups.items() if group.size > 1}
        self.totals = dict.fromkeys(self.traffic, (0, 0, 0))
        self.steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what happens inside as one step; what happens outside (sampling) is not counted."""
        for traffic in self.traffic.values():
            traffic.reset()
        yield
        for name, traffic in self.traffic.items():
            received, rounds, syncs = self.totals[name]
            self.totals[name] = (received + traffic.received, rounds + traffic.rounds, syncs + traffic.syncs)
        self.steps += 1

    def lap(self) -> dict[str, float]:
        """Bytes received, collectives and host synchronisations per step since the last lap, and start anew; empty on
        one rank.
        """
        found = {
            f"{name}_{what}": count / max(1, self.steps)
            for name, counts in self.totals.items()
            for what, count in zip(("bytes", "rounds", "syncs"), counts, strict=True)
        }
        self.totals, self.steps = dict.fromkeys(self.traffic, (0, 0, 0)), 0
        return found


def greeting(config: Config, mesh: Mesh, step: int, begun: str = "", recipe: Sequence[RecipeChange] = ()) -> str:
    """Two lines on what is about to happen: what is trained, and how it is laid out; between them, if given, what it
    began with and what of its recipe changes at this step.
    """
    sizes, span = count(config.model), pool_samples(config)
    what = (
        f"{config.folder} {f'continues at step {step}' if step else 'starts'}: {config.train.steps} steps of {config.train.global_batch} samples, "
        f"{config.model.family}, {sizes.total / 1e6:.2f}M parameters, {sizes.activated() / 1e6:.2f}M activated"
    )
    layout = f"{_ranks(mesh.size)} on {mesh.device.type}, {config.train.precision}, ZeRO-{config.parallel.zero_stage}"
    if has_experts(config.model):
        tokens = span * num_tokens(config.model)
        layout += f", {config.model.num_experts} experts over {_ranks(mesh.expert.size)}"
        layout += f", pools of {span} samples ({tokens} tokens) over {_ranks(mesh.pool.size)}"
    now = ", ".join(str(change) for change in recipe if change.step == step)
    changed = f"its recipe changes after step {step}: {now} (kept in recipe.jsonl)" if now else ""
    return "\n".join(filter(None, (what, begun, changed, layout)))


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line cut short by a kill is dropped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
