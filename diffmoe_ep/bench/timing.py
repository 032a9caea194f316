"""Timings that can be compared: contenders take turns in one process, so that what else the machine does meets all of
them alike.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


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
    actions: Mapping[str, Callable[[], object]], turns: int, device: torch.device, meet: Callable[[], object]
) -> dict[str, Timing]:
    """Let each action run once to warm up and then `turns` times in turn, every second turn in the opposite order.

    meet: called before each action, outside the clock, for ranks to wait for each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(-1, turns):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            meet()
            settle(device)
            begin = time.perf_counter()
            actions[name]()
            settle(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def keep_memory() -> None:
    """Let memory that is freed stay with this process, where its C library can (glibc): a CPU's page faults are none of
    a contender's work.

    A contender alone in a process frees all it took and has it faulted in again at its next turn, a fifth of a small
    layer's time; a training run, which holds more, does not.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            library.mallopt(parameter, value)


def settle(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load() -> float:
    """The machine's average load of the last minute."""
    return os.getloadavg()[0]


def device_name(device: torch.device) -> str:
    """What is measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
