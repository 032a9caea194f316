"""A whole training step of a model with experts beside that of its dense twin."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from diffmoe_ep.bench.timing import Timing, conditions, device_name, interleaved, load
from diffmoe_ep.bench.training import PARTS, TrainingStep
from diffmoe_ep.config import Config
from diffmoe_ep.parallel.allocator import keep_freed_memory
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.planner.plan import plan
from diffmoe_ep.tables import table


@dataclass(frozen=True)
class StepBench:
    """Both models' steps."""

    device: str
    precision: str
    batch: int  # samples of a step
    turns: int
    load: tuple[float, float]
    timings: dict[str, Timing]  # dense, experts
    parts: dict[str, dict[str, float]]  # of each model the median seconds of each part
    flops: dict[str, float]  # of each model's step, by its plan
    peak: float  # FLOPs a second of a large matmul, the best of all turns

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As a table."""
        dense, ours = self.timings["dense"], self.timings["experts"]
        times = [(part, self.parts["dense"][part], self.parts["experts"][part]) for part in PARTS]
        times += [
            ("whole step, median", dense.median, ours.median),
            ("whole step, minimum", dense.minimum, ours.minimum),
        ]
        rows = [("", "dense ms", "experts ms", "ratio")]
        rows += [(name, f"{1e3 * one:.1f}", f"{1e3 * two:.1f}", f"{two / one:.2f}") for name, one, two in times]
        one, two = (self.flops[name] / timing.median for name, timing in self.timings.items())
        rows += [
            ("TFLOP/s", f"{one / 1e12:.3g}", f"{two / 1e12:.3g}", f"{two / one:.2f}"),
            ("MFU, of the matmul peak", f"{one / self.peak:.2f}", f"{two / self.peak:.2f}", ""),
            ("spread", f"{dense.spread:.0%}", f"{ours.spread:.0%}", ""),
        ]
        return [
            f"one training step of {self.batch} samples, dense and with experts; {self.precision}",
            self.device,
            *table(rows),
            f"matmul peak {self.peak / 1e12:.3g} TFLOP/s; {conditions(self.turns, *self.load)}",
        ]


def bench_step(config: Config, mesh: Mesh, turns: int = 20) -> StepBench:
    """Measure a training step of a config with experts beside that of its dense twin (the same, family dense)."""
    before = load()
    keep_freed_memory()
    configs = {"dense": replace(config, model=replace(config.model, family="dense")), "experts": config}
    steps = {name: TrainingStep(one, mesh, by_part=True) for name, one in configs.items()}
    kind = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    side = 8192 if mesh.device.type == "cuda" else 1024
    square = torch.randn(side, side, device=mesh.device).to(kind)
    found = interleaved({**steps, "matmul": lambda: square @ square}, turns, mesh.device)
    return StepBench(
        device=device_name(mesh.device),
        precision=config.train.precision,
        batch=config.train.global_batch,
        turns=turns,
        load=(before, load()),
        peak=2 * side**3 / found.pop("matmul").minimum,
        timings=found,
        # without the step that warmed up
        parts={
            name: {part: Timing(tuple(step.seconds[part][1:])).median for part in PARTS} for name, step in steps.items()
        },
        flops={name: config.train.global_batch * plan(one).training for name, one in configs.items()},
    )
