"""One training step as training makes it, engine and averaged weights included, on samples that are made up."""

import time

import torch
from torch import Tensor

from diffmoe_ep.bench.timing import settle
from diffmoe_ep.config import Config
from diffmoe_ep.data.condition import CaptionFeatures, Condition
from diffmoe_ep.diffusion.objective import objective_of
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.ema import Ema
from diffmoe_ep.train.engine import Engine
from diffmoe_ep.train.trainer import build_model

PARTS = ("forward and backward", "optimizer", "averaged weights")


class TrainingStep:
    """A training step of a config on one rank, at EP 1: random latents with random labels or captions, the same at
    every step, so that the loss must fall.
    """

    def __init__(self, config: Config, mesh: Mesh, by_part: bool = False) -> None:
        """by_part: wait for the device after each of PARTS and keep its seconds in `seconds`."""
        self.config, self.device, self.by_part = config, mesh.device, by_part
        self.objective = objective_of(config.train.objective)
        model = build_model(config, mesh)
        self.engine, self.ema = Engine(model, config, mesh), Ema(model, config.train.ema)
        samples, model_config = config.train.micro_step_samples, config.model
        size = (samples, model_config.in_channels, model_config.input_size, model_config.input_size)
        self.latent, self.noise = (torch.randn(size, device=mesh.device) for _ in range(2))
        self.u, self.condition = torch.rand(samples, device=mesh.device), _condition(config, samples, mesh.device)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}  # one for each step, where by_part

    def __call__(self) -> Tensor:
        """Make a step; returns its loss before it."""
        train, loss = self.config.train, torch.zeros((), device=self.device)
        taken = dict.fromkeys(PARTS, 0.0)
        mark = time.perf_counter()
        for _ in range(train.grad_accumulation):
            noised = self.objective.noised(self.latent, self.noise, self.u)
            output = self.engine.forward(noised.x, noised.t, self.condition)
            diffusion = self.objective.loss(output.prediction, noised)
            self.engine.backward(diffusion + output.auxiliary)
            mark = self._add(taken, "forward and backward", mark)
            self.engine.step(train.optimizer.lr)
            mark = self._add(taken, "optimizer", mark)
            loss += diffusion.detach() / train.grad_accumulation
        self.ema.update(1)
        self._add(taken, "averaged weights", mark)
        for part, seconds in taken.items():
            self.seconds[part].append(seconds)
        return loss

    def _add(self, taken: dict[str, float], part: str, mark: float) -> float:
        """Add the seconds since `mark` to a part, if parts are timed; returns the next mark."""
        if self.by_part:
            settle(self.device)
        now = time.perf_counter()
        taken[part] += now - mark
        return now


def _condition(config: Config, samples: int, device: torch.device) -> Condition:
    number = torch.arange(samples, device=device)
    if config.model.condition == "class":
        return number % config.model.num_classes
    length = config.model.text_length
    features = torch.randn(samples, length, config.model.text_width, device=device)
    return CaptionFeatures(features, 1 + number % length)
