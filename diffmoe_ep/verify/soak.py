"""Kills a training again and again, and compares it with one that was never cut.

When it is killed is drawn beforehand: at steps, and for a third of the kills between the first write of a checkpoint
and its rename. All ranks get SIGKILL, a drawn one first. Another shape of ranks goes on each time, now and then after
the newest checkpoint was damaged on the disk.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch

from diffmoe_ep.checkpoint.housekeeping import verdict
from diffmoe_ep.checkpoint.sound import DAMAGED
from diffmoe_ep.checkpoint.store import PARTIAL, newest_first
from diffmoe_ep.config import Config, ConfigError, UserError, check_world, override
from diffmoe_ep.parallel.mesh import stand_as
from diffmoe_ep.tables import table
from diffmoe_ep.train.trainer import train

PRELOAD = ["megatron.core.parallel_state", "diffmoe_ep.train.trainer"]  # seconds of imports, once for all ranks
FAULTS = ("flipped", "truncated", "deleted")
POLL_SECONDS = 0.001
PATIENCE_SECONDS = 300.0  # for any progress of a training
LATEST_PLACE = 0.5  # of the time that a save takes: it varies
SPARE_SAVES = 3  # at the end, for kills that come just after the rename they were meant to come before


class SoakError(UserError):
    """A training that did something else than to train until it was killed."""


@dataclass(frozen=True)
class Shape:
    """How a training is laid out."""

    ranks: int
    expert: int
    zero: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, EP {self.expert}, ZeRO {self.zero}"

    def of(self, config: Config) -> Config:
        """The same run in this shape."""
        return override(config, [f"parallel.expert_parallel={self.expert}", f"parallel.zero_stage={self.zero}"])


@dataclass(frozen=True)
class Kill:
    """One kill, as it was drawn."""

    step: int  # that the training has come to
    place: (
        float | None
    )  # in the first save from then on: share of the time between first write and rename; None: at once
    first: float  # which rank dies first, as a share of them
    fault: str | None  # what becomes of the newest checkpoint
    shape: Shape  # that goes on


def shapes(config: Config, ranks: int) -> list[Shape]:
    """All in which a run can be laid out on up to so many ranks; ConfigError if there is none."""
    found = []
    for world in range(1, ranks + 1):
        for expert in (number for number in range(1, world + 1) if world % number == 0):
            for zero in (0, 1, 2):
                shape = Shape(world, expert, zero)
                try:
                    check_world(shape.of(config), world)
                except ConfigError:
                    continue
                found.append(shape)
    if not found:
        raise ConfigError(f"this run does not fit on up to {ranks} ranks; give more with --ranks")
    return found


def draw(kills: int, steps: int, among: Sequence[Shape], seed: int) -> list[Kill]:
    """Kills before step `steps`, in the order of their steps: a third of them in saves, a fifth with a damaged
    checkpoint, each followed by another shape than the one before, where there are several.
    """
    rng = random.Random(seed)
    in_saves = set(rng.sample(range(kills), kills // 3))
    damaged = set(rng.sample(range(kills), max(1, kills // 5)))
    drawn, shape = [], among[0]
    for number, step in enumerate(sorted(rng.sample(range(1, steps), kills))):
        shape = rng.choice([other for other in among if other != shape] or list(among))
        place = rng.uniform(0, LATEST_PLACE) if number in in_saves else None
        drawn.append(Kill(step, place, rng.random(), rng.choice(FAULTS) if number in damaged else None, shape))
    return drawn


@dataclass
class Soaked:
    """What happened, and what it changed."""

    kills: int = 0
    in_saves: int = 0  # between a checkpoint's first write and its rename
    missed: int = 0  # meant to be there, and just after the rename
    first: Counter[int] = field(default_factory=Counter)  # ranks that were killed before the others
    damaged: Counter[str] = field(default_factory=Counter)
    set_aside: int = 0
    shapes: Counter[str] = field(default_factory=Counter)  # that were started
    steps: int = 0
    again: int = 0  # steps that were trained once more
    lost: int = 0  # samples
    repeated: int = 0  # samples
    middle: float = 0.0  # difference of a step's loss, the median
    largest: float = 0.0  # difference of a step's loss
    largest_step: int = 0
    allowed: float = 0.0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the run is the uncut one."""
        same = not self.lost and not self.repeated and self.largest <= self.allowed
        return same and self.set_aside == sum(self.damaged.values())

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def lines(self) -> list[str]:
        """As text."""
        missed = f", {self.missed} just after one" if self.missed else ""
        first = ", ".join(f"rank {rank} {count} times" for rank, count in sorted(self.first.items()))
        faults = ", ".join(f"{count} {fault}" for fault, count in sorted(self.damaged.items()))
        rows = [
            ("kills", f"{self.kills}: {self.in_saves} between a checkpoint's first write and its rename{missed}"),
            ("died first", first),
            ("newest checkpoints damaged", f"{sum(self.damaged.values())}" + f": {faults}" * bool(faults)),
            ("set aside", str(self.set_aside)),
            *(("started on " + shape, f"{count} times") for shape, count in sorted(self.shapes.items())),
            ("steps", f"{self.steps}, and {self.again} of them once more"),
            ("samples lost, repeated", f"{self.lost}, {self.repeated}"),
            (
                "difference of a step's loss",
                f"median {self.middle:.1e}, largest {self.largest:.1e} at step {self.largest_step}, "
                f"{self.allowed:g} allowed",
            ),
            ("seconds", f"{self.seconds:.0f}"),
        ]
        return [*table([("soak", "ok" if self.passed else "FAILED"), *rows], "<<")]


def soak(
    config: Config,
    out: Path,
    kills: int,
    among: Sequence[Shape],
    seed: int,
    allowed: float,
    say: Callable[[str], None],
) -> Soaked:
    """Train out/uncut in one go, in the first shape, and out/soaked with kills, and compare them.

    allowed: the largest difference of a loss. say: is told of every kill.
    """
    config = override(config, ["log.every=1", "sample.grid_every=0", "resume=auto", "checkpoint.keep_last=3"])
    steps = config.train.steps
    if (last := steps - SPARE_SAVES * config.checkpoint.every) < 2:
        every = max(1, steps // 10)
        raise ConfigError(
            f"a checkpoint every {config.checkpoint.every} of {steps} steps: set checkpoint.every={every}"
        )
    if not 0 < kills < last:
        raise ConfigError(f"--kills is {kills}; it must be at least 1 and less than {last}, or set train.steps higher")
    if (out / "soaked").exists():
        raise ConfigError(f"{out / 'soaked'} is there already; give another folder with --out")
    started, result = time.monotonic(), Soaked(steps=steps, allowed=allowed)
    uncut, soaked = (override(config, [f"folder={json.dumps(str(out / name))}"]) for name in ("uncut", "soaked"))
    out.mkdir(parents=True, exist_ok=True)
    say(f"{out / 'uncut'}: {among[0]}, in one go")
    with _Training(uncut, among[0], out / "uncut.log") as training:
        window = statistics.median(training.saves() or [0.0])
    shape, rng = among[0], random.Random(f"{seed} faults")
    for number, kill in enumerate(draw(kills, last, among, seed), 1):
        hit, delay = False, (kill.place or 0.0) * window
        while not hit:
            hit = _start_and_kill(soaked, shape, kill, delay, out / f"soaked-{result.kills:03d}.log", result)
            if not hit:  # the rename was quicker
                say(f"kill {number} of {kills} at step {_last_step(soaked)}, just after a save; it is made again")
                result.missed, delay = result.missed + 1, delay / 2
        fault = _damage(Path(soaked.folder) / "checkpoints", kill.fault, rng)
        if kill.fault and fault:
            result.damaged[kill.fault] += 1
        where = "in training" if kill.place is None else "in a save"
        say(f"kill {number} of {kills} at step {_last_step(soaked)}, {where}{fault}; goes on with {kill.shape}")
        shape = kill.shape
    with _Training(soaked, shape, out / "soaked-end.log") as training:
        result.shapes[str(shape)] += 1
        training.end()
    result.set_aside = len(list((Path(soaked.folder) / "checkpoints").glob(f"step-*{DAMAGED}*")))
    _compare(uncut, soaked, result)
    result.seconds = time.monotonic() - started
    return result


def _start_and_kill(config: Config, shape: Shape, kill: Kill, delay: float, log: Path, result: Soaked) -> bool:
    """One life of the training; returns False if it should have ended between a checkpoint's first write and its
    rename, and ended after it.

    Raises SoakError unless it goes on from the newest sound checkpoint.
    """
    before, root = _last_step(config), Path(config.folder) / "checkpoints"
    sound = next((folder for folder in newest_first(root) if not verdict(folder).problems), None)
    expected = 0 if sound is None else int(sound.name.removeprefix("step-"))
    with _Training(config, shape, log) as training:
        training.wait(lambda: _last_step(config) >= kill.step, "the steps to the next kill")
        if kill.place is not None:
            training.wait(training.writes, "a save")
            time.sleep(delay)
        first = int(kill.first * shape.ranks)
        training.kill(first)
        in_save = training.writes()
    text = log.read_text(errors="replace")
    told = int(match[1]) if (match := re.search(r"continues at step (\d+)", text)) else 0
    if told != expected:
        raise SoakError(
            f"{config.folder} went on at step {told}, and its newest sound checkpoint is that of {expected}"
        )
    result.kills += 1
    result.first[first] += 1
    result.shapes[str(shape)] += 1
    result.again += max(0, before - expected)
    result.in_saves += in_save
    return in_save or kill.place is None


class _Training:
    """Ranks that train, each a process; killed at the end of the block where they are not through."""

    def __init__(self, config: Config, shape: Shape, log: Path) -> None:
        self.config, self.shape, self.log = config, shape, log
        self.metrics = Path(config.folder) / "metrics.jsonl"
        self.before = _inode(self.metrics)  # a training that goes on replaces the file before its first step
        self.started = time.time()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, shape.ranks, port, shape.of(config), log))
            for rank in range(shape.ranks)
        ]

    def __enter__(self) -> Self:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(0)

    def kill(self, first: int) -> None:
        """SIGKILL to all ranks, to one of them first."""
        for process in [self.processes[first], *self.processes]:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what a training that has taken its first step comes to."""
        for _ in self._alive():
            if _inode(self.metrics) != self.before and condition():
                return
        raise SoakError(f"{self.config.folder} on {self.shape} was finished before it did {what}; see {self.log}")

    def end(self) -> None:
        """Wait until it is finished."""
        for _ in self._alive():
            pass

    def saves(self) -> list[float]:
        """Wait until it is finished; the seconds from the first write to the rename of each checkpoint."""
        since, seconds = None, list[float]()
        for now in self._alive():
            writes = self.writes()
            if writes and since is None:
                since = now
            if not writes and since is not None:
                seconds.append(now - since)
                since = None
        return seconds

    def writes(self) -> bool:
        """Whether a checkpoint has a file of this training, and not yet its name."""
        try:
            folders = (Path(self.config.folder) / "checkpoints").glob(f"step-???????{PARTIAL}")
            return any(file.stat().st_mtime > self.started for folder in folders for file in folder.iterdir())
        except FileNotFoundError:  # renamed meanwhile
            return False

    def _alive(self) -> Iterator[float]:
        """Times at which it still trains; raises SoakError if it fails, or does nothing for long."""
        step, moved = -1, time.monotonic()
        while any(process.exitcode is None for process in self.processes):
            now = time.monotonic()
            if (found := _last_step(self.config)) != step:
                step, moved = found, now
            failed = any(process.exitcode for process in self.processes)
            if failed or now - moved > PATIENCE_SECONDS:
                break
            yield now
            time.sleep(POLL_SECONDS)
        codes = [process.exitcode for process in self.processes]
        if any(codes) or None in codes:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            how = "does not go on" if None in codes and not any(codes) else f"ended with exit codes {codes}"
            raise SoakError(f"{self.config.folder} on {self.shape} {how}: {lines[-1]}; see {self.log}")


def _rank(rank: int, world: int, port: int, config: Config, log: Path) -> None:
    """The life of one rank: as a launcher would start it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stand_as(rank, world, port)
    torch.set_num_threads(1)
    train(config)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _last_step(config: Config) -> int:
    """The newest whole line of metrics.jsonl; 0 where there is none."""
    lines = _tail(Path(config.folder) / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def _tail(path: Path, most: int = 1 << 16) -> list[dict[str, Any]]:
    """The whole lines at the end of a file that is being written."""
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - most)
            file.seek(begin)
            text = file.read()
    except FileNotFoundError:
        return []
    whole = text.rpartition(b"\n")[0].split(b"\n")
    return [json.loads(line) for line in whole[1 if begin else 0 :] if line]


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _damage(root: Path, fault: str | None, rng: random.Random) -> str:
    """Damage a file of the newest checkpoint where an older one is sound; says what was done."""
    folders = newest_first(root)
    if fault is None or len(folders) < 2 or any(verdict(folder).problems for folder in folders[:2]):
        return ""
    path = rng.choice(sorted(path for path in folders[0].iterdir() if path.stat().st_size))
    content = bytearray(path.read_bytes())
    if fault == "deleted":
        path.unlink()
    elif fault == "truncated":
        os.truncate(path, rng.randrange(len(content)))
    else:
        at = rng.choice([place for place in range(len(content)) if content[place] != ord("\n")])
        content[at] ^= 1
        path.write_bytes(content)
    return f", {folders[0].name}/{path.name} {fault}"


def _compare(uncut: Config, soaked: Config, result: Soaked) -> None:
    """Count samples, and compare losses step by step."""
    first, second = (
        [json.loads(line) for line in (Path(config.folder) / "metrics.jsonl").read_text().splitlines()]
        for config in (uncut, soaked)
    )
    seen = Counter(line["step"] for line in second)
    batch = uncut.train.global_batch
    result.lost = batch * sum(line["step"] not in seen for line in first)
    result.repeated = batch * sum(count - 1 for count in seen.values())
    losses = {line["step"]: line["loss"] for line in first}
    apart = {line["step"]: abs(line["loss"] - losses[line["step"]]) for line in second}
    result.largest_step = max(apart, key=lambda step: apart[step])
    result.largest, result.middle = apart[result.largest_step], statistics.median(apart.values())
