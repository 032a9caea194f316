"""Timings that can be compared: contenders take turns in one process, so that what else the machine does meets all of
them alike.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """How long one contender took, turn by turn."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The quickest turn, in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle turn, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median: what to doubt a ratio by."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: "Timing") -> tuple[float, float]:
        """(ratio of the medians, ratio of the minima) to another contender of the same turns."""
        return self.median / other.median, self.minimum / other.minimum


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    turns: int,
    device: torch.device,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Let each action run once to warm up and then `turns` times in turn, every second turn in the opposite order.

    meet: called before each action, outside the clock, for ranks to wait for each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(-1, turns):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            meet()
            taken = seconds_of(actions[name], device)
            if turn >= 0:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes, the device's work included."""
    settle(device)
    start = time.perf_counter()
    action()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load() -> float:
    """The machine's average load of the last minute."""
    return os.getloadavg()[0]


def conditions(turns: int, before: float, after: float) -> str:
    """How timings came about, in words: turns, and the machine's load before and after."""
    return f"{turns} interleaved turns, medians; load {before:.1f} to {after:.1f}"


def device_name(device: torch.device) -> str:
    """What is measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
