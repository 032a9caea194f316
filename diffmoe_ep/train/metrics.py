"""What a run measures of itself: speed, time left, utilization, memory, traffic."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch

from diffmoe_ep.config import Config, TrainConfig
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.planner.plan import plan

T = TypeVar("T")

# Metrics of the machine, not of the run: in these alone two runs of one config may differ.
MACHINE_METRICS = (
    "time", "samples_per_second", "data_wait", "save_stall_ms", "seconds", "eta_seconds", "mfu", "peak_memory_gb",
)  # fmt: skip

# Makers' peaks of dense bf16 matmuls in TFLOP/s, by part of the device's name; the first that matches counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
}


class Clock:
    """Where the time goes between two logged lines."""

    def __init__(self, step: int) -> None:
        self.started = self.mark = time.monotonic()
        self.paused = self.waited = self.stalled = 0.0
        self.first = self.step = step

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

    def stall(self, save: Callable[[], None]) -> float:
        """`pause` for a save; returns the seconds that it kept training."""
        before = self.paused
        self.pause(save)
        self.stalled += self.paused - before
        return self.paused - before

    def lap(self, step: int, train: TrainConfig) -> dict[str, Any]:
        """Speed since the last lap, and start anew; time left by the run's pace since it (re)started, pauses included.

        time: now, in UTC (ISO 8601); samples_per_second over all ranks; data_wait: share of the time; save_stall_ms:
        what saves kept training, if there were any; seconds since the start, eta_seconds to the end.
        """
        now = time.monotonic()
        spent = max(now - self.mark - self.paused, 1e-9)
        pace = (now - self.started) / max(1, step - self.first)  # seconds per step
        result = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "samples_per_second": (step - self.step) * train.global_batch / spent,
            "data_wait": self.waited / spent,
            "seconds": now - self.started,
            "eta_seconds": pace * (train.steps - step),
        }
        if self.stalled:
            result["save_stall_ms"] = 1000 * self.stalled
        self.mark, self.paused, self.waited, self.stalled, self.step = now, 0.0, 0.0, 0.0, step
        return result


class Utilization:
    """Model FLOPs utilization (MFU): the model's FLOPs as a share of what the ranks' devices could do at most.

    FLOPs are the planner's, at training's capacity; what is recomputed does not count. The peak is that of bf16
    matmuls, whatever train.precision is.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.flops = plan(config).training  # of one sample's training step
        self.peak = mesh.size * 1e12 * peak_tflops(mesh.device)

    def of(self, samples_per_second: float) -> dict[str, float]:
        """The metric `mfu` at a speed; nothing on devices whose peak is not known, CPUs among them."""
        return {"mfu": self.flops * samples_per_second / self.peak} if self.peak else {}


def peak_tflops(device: torch.device) -> float:
    """The bf16 peak of a device by its name; 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for known, peak in PEAK_TFLOPS.items() if known in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on a GPU took at once so far; on a CPU, the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts it in KiB


class TrafficMeter:
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
        """Bytes received, collectives and host synchronizations per step since the last lap, and start anew.

        Empty on one rank.
        """
        metrics = {
            f"{name}_{what}": count / max(1, self.steps)
            for name, counts in self.totals.items()
            for what, count in zip(("bytes", "rounds", "syncs"), counts, strict=True)
        }
        self.totals, self.steps = dict.fromkeys(self.traffic, (0, 0, 0)), 0
        return metrics
