"""What every operation of some steps took: a trace for each rank, for chrome://tracing or ui.perfetto.dev."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.metrics import Clock


class StepTrace:
    """Traces the steps that `log.profile` names and writes RUN/profile/rank-00000.json.gz after the last of them."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, mesh: Mesh, clock: Clock) -> None:
        """steps: the first and the last, inclusive; those before a resume are past."""
        self.first, self.last = steps or (0, -1)
        self.path = folder / "profile" / f"rank-{mesh.rank:05d}.json.gz"
        self.device, self.clock = mesh.device, clock
        self.profiler: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what happens inside if it is one of the steps."""
        if not self.first <= number <= self.last:
            yield
            return
        if self.profiler is None:
            self.clock.pause(self._start)
        with record_function(f"step {number}"):
            yield
        if number == self.last:
            self.clock.pause(self.close)

    def close(self) -> None:
        """Write the steps that were traced, if any; what fails is told, and ends no run in which other ranks wait."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        aside = self.path.with_name(f"partial-{self.path.name}")  # the ending says that it is packed
        try:
            self.path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(aside))
            aside.replace(self.path)
        except (OSError, RuntimeError) as error:
            print(f"the trace {self.path} could not be written ({error}); the run goes on", file=sys.stderr, flush=True)

    def _start(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self.profiler = profile(activities=kinds, record_shapes=True)
        self.profiler.start()
