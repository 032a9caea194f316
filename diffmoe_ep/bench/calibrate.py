"""The planner's rates measured in this process, and its prediction of a training step beside the step itself.

`calibrate(config)` returns the rates of this device on shapes of the config's size, while nothing else runs on it;
`compare(config, cluster, mesh)` calibrates, predicts and measures a step of the config on this one rank.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from diffmoe_ep.bench.timing import device_name, load, seconds_of
from diffmoe_ep.bench.training import TrainingStep
from diffmoe_ep.config import Config, num_tokens
from diffmoe_ep.parallel.allocator import keep_freed_memory
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.planner.cluster import Cluster, Measurement
from diffmoe_ep.planner.cluster_plan import estimate
from diffmoe_ep.planner.layout import Layout
from diffmoe_ep.planner.report import Estimate
from diffmoe_ep.tables import duration, size, table

ROUNDS = 10
FRESH = 1 << 24  # elements that an allocator asks the system for each time
LARGEST = 1 << 33  # FLOPs of a matmul that is timed on a CPU: about a second on a slow core


@dataclass(frozen=True)
class Comparison:
    """A prediction beside a measurement."""

    name: str  # what was measured
    measurement: Measurement  # the rates that the prediction rests on
    estimate: Estimate
    seconds: float  # measured, the fastest
    median: float
    slowest: float
    load: float  # of the machine: processes that wanted to run in the last minute
    losses: tuple[float, ...] = ()  # of the steps in turn, on the same few samples
    peak: int | None = None  # most bytes that the device's allocator held; None on a CPU

    @property
    def error(self) -> float:
        """Predicted over measured, less one: 0.1 is a tenth too slow."""
        return self.estimate.step.seconds / self.seconds - 1

    @property
    def mfu(self) -> float:
        """MFU as measured."""
        return self.estimate.step.mfu * self.estimate.step.seconds / self.seconds

    def lines(self) -> list[str]:
        """The comparison to read."""
        step, planned = self.estimate.step, self.estimate.memory.total
        rates = [f"{key} {value:.4g}" for key, value in asdict(self.measurement).items() if isinstance(value, float)]
        found = [
            self.name,
            f"predicted {duration(step.seconds)}, measured {duration(self.seconds)}, error {self.error:+.1%} "
            f"(median {duration(self.median)}, slowest {duration(self.slowest)}, load {self.load:.2f})",
            f"MFU {self.mfu:.1%} of the device's bf16 peak, predicted {step.mfu:.1%}",
            f"{self.measurement.device}: {', '.join(rates)}",
        ]
        if self.peak is not None:
            found.append(
                f"memory: predicted {size(planned)}, the allocator's peak {size(self.peak)}, "
                f"error {planned / self.peak - 1:+.1%}"
            )
        if self.losses:
            found.append(
                f"loss on the same samples: {self.losses[0]:.4f} at first, {self.losses[-1]:.4f} after "
                f"{len(self.losses)} steps"
            )
        parts = [(name, duration(taken), f"{taken / step.seconds:.0%}") for name, taken in step.parts.items() if taken]
        return [*found, *table([("predicted", "time", "share"), *parts])]

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        step = self.estimate.step
        return {
            "name": self.name, "predicted": step.seconds, "measured": self.seconds, "median": self.median,
            "slowest": self.slowest, "error": self.error, "load": self.load, "parts": step.parts,
            "rates": asdict(self.measurement), "mfu": self.mfu, "mfu_predicted": step.mfu, "losses": self.losses,
            "peak": self.peak, "peak_predicted": self.estimate.memory.total,
        }  # fmt: skip


class Probe:
    """A few operations on shapes like those of a step of the config on one rank: what a device can do.

    Each round times them once; rates follow from the fastest of the rounds, since other work on the machine only ever
    slows.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device, hidden = device, config.model.hidden_size
        self.bf16 = config.train.precision == "bf16"
        tokens = config.train.micro_step_samples * num_tokens(config.model)
        rows = tokens if device.type == "cuda" else max(1, min(tokens, LARGEST // (8 * hidden**2)))
        kind = torch.bfloat16 if self.bf16 else torch.float32
        x = torch.randn(rows, hidden, device=device).to(kind)
        weight = torch.randn(hidden, 4 * hidden, device=device).to(kind)
        self.wide, one = torch.randn(rows, 4 * hidden, device=device).to(kind), torch.ones(1, device=device)
        self.flops = 8.0 * rows * hidden**2
        self.actions: dict[str, Callable[[], object]] = {
            "matmul": lambda: x @ weight,
            "pass": lambda: self.wide * 1.5,
            "gelu": lambda: F.gelu(self.wide, approximate="tanh"),
            "fresh": lambda: torch.empty(FRESH, device=device).fill_(1.0),
            "trivial": lambda: [one * 1.5 for _ in range(100)],
        }
        self.fastest = dict.fromkeys(self.actions, float("inf"))
        self.round()
        self.fastest = dict.fromkeys(self.actions, float("inf"))  # the first round warms up

    def round(self) -> None:
        """Time each once."""
        for name, action in self.actions.items():
            self.fastest[name] = min(self.fastest[name], seconds_of(action, self.device))

    def measurement(self) -> Measurement:
        """The rates so far."""
        rate = self.flops / self.fastest["matmul"] / 1e12
        return Measurement(
            device=device_name(self.device),
            bf16_tflops=rate if self.bf16 else None,
            float32_tflops=None if self.bf16 else rate,
            bandwidth_gbs=2 * self.wide.nbytes / self.fastest["pass"] / 1e9,
            gelu_gelements=self.wide.numel() / self.fastest["gelu"] / 1e9,
            fresh_gbs=None if self.device.type == "cuda" else 4 * FRESH / self.fastest["fresh"] / 1e9,
            launch_us=self.fastest["trivial"] / 100 * 1e6,
        )


def calibrate(config: Config, device: str = "cpu", rounds: int = ROUNDS) -> Measurement:
    """Measure this device's rates on shapes of the config's size, with as many threads as torch has here."""
    probe = Probe(config, torch.device(device))
    for _ in range(rounds):
        probe.round()
    return probe.measurement()


def compare(config: Config, cluster: Cluster, mesh: Mesh, rounds: int = ROUNDS) -> Comparison:
    """Predict and measure a training step of the config on this one rank, at EP 1 and the config's ZeRO stage and
    recomputation.

    Rates and steps are timed in turn, and the fastest of each are compared.
    """
    device, cuda = mesh.device, mesh.device.type == "cuda"
    keep_freed_memory()
    config = replace(config, parallel=replace(config.parallel, expert_parallel=1))
    alone = replace(cluster, kind="cuda" if cuda else "cpu", nodes=1, ranks_per_node=1)
    probe, step, taken = Probe(config, device), TrainingStep(config, mesh), []
    losses = [step(), step()]  # the optimizer's state is made, buffers are there
    for _ in range(rounds):
        probe.round()
        taken.append(seconds_of(lambda: losses.append(step()), device))
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    layout = Layout(1, 1, config.parallel.zero_stage, config.compute.recompute)
    model = config.model
    return Comparison(
        name=f"{model.family}, hidden {model.hidden_size}, {model.num_blocks} blocks, "
        f"{config.train.global_batch} samples",
        measurement=probe.measurement(),
        estimate=estimate(config, layout, alone.measured(probe.measurement())),
        seconds=min(taken),
        median=statistics.median(taken),
        slowest=max(taken),
        load=load(),
        losses=tuple(float(loss) for loss in losses),
        peak=peak,
    )
