"""The planner's rates measured in this process, and its prediction of a training step beside the step itself.

found = calibrate(config)                          rates of this device on shapes of the config's size, while nothing else is asked of it
comparison = compare(config, cluster)              calibrates, predicts and measures a step of the config on this one rank
print("\\n".join(comparison.lines()))
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import Config, num_tokens
from diffmoe_ep.data.condition import CaptionFeatures, Condition
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
        rates = [(key, f"{value:.4g}") for key, value in asdict(self.measurement).items() if isinstance(value, float)]
        parts = [
            (name, duration(taken), f"{taken / self.estimate.step.seconds:.0%}")
            for name, taken in self.estimate.step.parts.items()
            if taken
        ]
        told = [
            f"{self.name}: predicted {duration(self.estimate.step.seconds)}, measured {duration(self.seconds)}, error {self.error:+.1%} "
            f"(median {duration(self.median)}, slowest {duration(self.slowest)}, load {self.load:.2f})",
            f"MFU {self.mfu:.1%} of the device's bf16 peak, predicted {self.estimate.step.mfu:.1%}",
            "rates of this device: " + ", ".join(f"{key} {value}" for key, value in rates),
        ]
        if self.peak is not None:
            planned = self.estimate.memory.total
            told.append(
                f"memory: predicted {size(planned)}, the allocator's peak {size(self.peak)}, error {planned / self.peak - 1:+.1%}"
            )
        if self.losses:
            told.append(
                f"loss on the same samples: {self.losses[0]:.4f} at first, {self.losses[-1]:.4f} after {len(self.losses)} steps"
            )
        return [*told, *table([("predicted", "time", "share"), *parts])]

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "name": self.name, "predicted": self.estimate.step.seconds, "measured": self.seconds, "median": self.median,
            "slowest": self.slowest, "error": self.error, "load": self.load,
            "parts": self.estimate.step.parts, "rates": asdict(self.measurement), "mfu": self.mfu,
            "mfu_predicted": self.estimate.step.mfu, "losses": self.losses, "peak": self.peak,
            "peak_predicted": self.estimate.memory.total,
        }  # fmt: skip


class Probe:
    """A few operations on shapes like those of a step of the config on one rank: what a device can do.

    Each round times them once; rates follow from the fastest of the rounds, since other work on the machine only ever
    slows.
    """

    def __init__(self, config: Config, device: str = "cpu") -> None:
        self.where, hidden = torch.device(device), config.model.hidden_size
        self.bf16 = config.train.precision == "bf16"
        tokens = config.train.micro_step_samples * num_tokens(config.model)
        rows = tokens if self.where.type == "cuda" else max(1, min(tokens, LARGEST // (8 * hidden**2)))
        kind = torch.bfloat16 if self.bf16 else torch.float32
        x = torch.randn(rows, hidden, device=self.where).to(kind)
        weight = torch.randn(hidden, 4 * hidden, device=self.where).to(kind)
        self.wide, one = torch.randn(rows, 4 * hidden, device=self.where).to(kind), torch.ones(1, device=self.where)
        self.flops = 8.0 * rows * hidden**2
        self.actions: dict[str, Callable[[], Any]] = {
            "matmul": lambda: x @ weight,
            "pass": lambda: self.wide * 1.5,
            "gelu": lambda: F.gelu(self.wide, approximate="tanh"),
            "fresh": lambda: torch.empty(FRESH, device=self.where).fill_(1.0),
            "trivial": lambda: [one * 1.5 for _ in range(100)],
        }
        self.fastest = dict.fromkeys(self.actions, float("inf"))
        self.round()
        self.fastest = dict.fromkeys(self.actions, float("inf"))  # the first round warms up

    def round(self) -> None:
        """Time each once."""
        for name, action in self.actions.items():
            self.fastest[name] = min(self.fastest[name], timed(action, self.where))

    def measurement(self) -> Measurement:
        """The rates so far."""
        cuda = self.where.type == "cuda"
        name = (
            torch.cuda.get_device_name(self.where)
            if cuda
            else f"CPU, {torch.get_num_threads()} threads of this process"
        )
        rate = self.flops / self.fastest["matmul"] / 1e12
        return Measurement(
            device=name,
            bf16_tflops=rate if self.bf16 else None,
            float32_tflops=None if self.bf16 else rate,
            bandwidth_gbs=2 * self.wide.nbytes / self.fastest["pass"] / 1e9,
            gelu_gelements=self.wide.numel() / self.fastest["gelu"] / 1e9,
            fresh_gbs=None if cuda else 4 * FRESH / self.fastest["fresh"] / 1e9,
            launch_us=self.fastest["trivial"] / 100 * 1e6,
        )


def calibrate(config: Config, device: str = "cpu", rounds: int = ROUNDS) -> Measurement:
    """Measure this device's rates on shapes of the config's size, with as many threads as torch has here."""
    probe = Probe(config, device)
    for _ in range(rounds):
        probe.round()
    return probe.measurement()


def compare(config: Config, cluster: Cluster, device: str = "cpu", rounds: int = ROUNDS) -> Comparison:
    """Predict and measure a training step of the config on this one rank, at EP 1 and the config's ZeRO stage and
    recomputation.

    Rates and steps are timed in turn, and the fastest of each are compared.
    """
    config = replace(config, parallel=replace(config.parallel, expert_parallel=1))
    alone = replace(cluster, kind="cuda" if device.startswith("cuda") else "cpu", nodes=1, ranks_per_node=1)
    probe, step, taken = Probe(config, device), training_step(config, device), []
    losses = [step(), step()]  # the optimiser's state is made, buffers are there
    for _ in range(rounds):
        probe.round()
        taken.append(timed(lambda: losses.append(step()), probe.where))
    peak = torch.cuda.max_memory_allocated(probe.where) if probe.where.type == "cuda" else None
    found = probe.measurement()
    predicted = estimate(
        config, Layout(1, 1, config.parallel.zero_stage, config.compute.recompute), alone.measured(found)
    )
    name = f"{config.model.family}, hidden {config.model.hidden_size}, {config.model.num_blocks} blocks, {config.train.global_batch} samples"
    told = tuple(float(loss) for loss in losses)
    return Comparison(
        name, found, predicted, min(taken), statistics.median(taken), max(taken), os.getloadavg()[0], told, peak
    )


def training_step(config: Config, device: str = "cpu") -> Callable[[], Tensor]:
    """A training step of the config on this one rank, which gives its loss: engine and averaged weights as in training.

    The samples are made up and the same at every step: random latents, with random labels or captions.
    """
    from diffmoe_ep.diffusion.objective import objective_of
    from diffmoe_ep.model.initialize import initialize
    from diffmoe_ep.model.parallelize import build_sharded
    from diffmoe_ep.parallel.mesh import init_mesh
    from diffmoe_ep.train.ema import Ema
    from diffmoe_ep.train.engine import Engine  # seconds to import

    mesh = init_mesh(1, 1, config.parallel.timeout_minutes, device)
    model = initialize(
        build_sharded(config, mesh, config.model.in_channels if config.train.objective == "flow" else None), config.seed
    )
    engine, ema = Engine(model, config, mesh), Ema(model, config.train.ema)
    objective, shape = (
        objective_of(config.train.objective),
        (config.model.in_channels, config.model.input_size, config.model.input_size),
    )
    micro = config.train.micro_step_samples
    latent, noise = (torch.randn(micro, *shape, device=mesh.device) for _ in range(2))
    u = torch.rand(micro, device=mesh.device)
    condition: Condition = torch.arange(micro, device=mesh.device) % config.model.num_classes
    if config.model.condition == "text":
        features = torch.randn(micro, config.model.text_length, config.model.text_width, device=mesh.device)
        condition = CaptionFeatures(features, 1 + torch.arange(micro, device=mesh.device) % config.model.text_length)

    def step() -> Tensor:
        loss = torch.zeros((), device=mesh.device)
        for _ in range(config.train.grad_accumulation):
            noised = objective.noised(latent, noise, u)
            output = engine.forward(noised.x, noised.t, condition)
            diffusion = objective.loss(output.prediction, noised)
            engine.backward(diffusion + output.auxiliary)
            engine.step(config.train.optimizer.lr)
            loss += diffusion.detach() / config.train.grad_accumulation
        ema.update(1)
        return loss

    return step


def timed(action: Callable[[], Any], where: torch.device) -> float:
    """Seconds that an action takes, the device's work included."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    start = time.perf_counter()
    action()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - start
