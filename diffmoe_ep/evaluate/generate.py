"""Samples in canonical chunks: sample i is the same whatever the number of ranks that share the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.data.keyed import keyed
from diffmoe_ep.diffusion.sampler import Velocity, euler, guided
from diffmoe_ep.model.dit import Output

Model = Callable[[Tensor, Tensor, Tensor], Output]  # (x (B, C, H, W), t (B,), condition (B,) int64) -> Output


@dataclass(frozen=True)
class CapacityRecord:
    """How many tokens the experts processed while sampling, by step, MoE layer and expert; exact counts in float64."""

    processed: Tensor  # (steps, layers, N) float64: rows that each expert took, conditional and unconditional halves together
    tokens: Tensor  # (steps, layers) float64: tokens that were offered to each layer

    @classmethod
    def empty(cls, steps: int = 0) -> "CapacityRecord":
        """The record of a dense model, or of no work at all."""
        return cls(torch.zeros(steps, 0, 0, dtype=torch.float64), torch.zeros(steps, 0, dtype=torch.float64))

    @property
    def is_empty(self) -> bool:
        """Whether there is no MoE layer in it, as for a dense model."""
        return self.processed.numel() == 0

    def per_step(self) -> Tensor:
        """C of every sampling step, (steps,): mean over layers and experts of N * processed / tokens (Eq. 8, 9)."""
        return self._capacity().mean((1, 2))

    def per_layer_expert(self) -> Tensor:
        """C of every expert, (layers, N), mean over sampling steps."""
        return self._capacity().mean(0)

    def average(self) -> float:
        """C_infer^avg (Eq. 15): the mean of per_step; 1.0 for a dense model, whose compute is the unit."""
        return 1.0 if self.is_empty else float(self.per_step().mean())

    def merge(self, other: "CapacityRecord") -> "CapacityRecord":
        """The record of both works together; counts are whole numbers, so the order of merging changes no bit."""
        if self.is_empty or other.is_empty:
            return other if self.is_empty else self
        if self.processed.shape != other.processed.shape:
            raise ValueError(f"capacity records of shapes {tuple(self.processed.shape)} and {tuple(other.processed.shape)} do not add up")
        return CapacityRecord(self.processed + other.processed, self.tokens + other.tokens)

    def _capacity(self) -> Tensor:
        return self.processed.shape[2] * self.processed / self.tokens[:, :, None]  # (steps, layers, N)


@dataclass(frozen=True)
class Generated:
    """One rank's part of the samples, on the CPU."""

    index: Tensor  # (m,) int64, ascending: which samples these are
    latents: Tensor  # (m, C, H, W) float32 final latents
    capacity: CapacityRecord  # of this rank's chunks alone


class _Counter:
    """Adds up the layers' reports on their own device, so that no step waits for the host."""

    def __init__(self, steps: int):
        self.steps = steps
        self.step = 0
        self.processed: Tensor | None = None  # (steps, layers, N) float64
        self.tokens = torch.zeros(steps, dtype=torch.float64)  # (steps,); every layer sees all tokens

    def add(self, output: Output) -> None:
        """Count one forward pass into the present step."""
        if not output.layers:
            return
        processed = torch.stack([layer.processed for layer in output.layers]).double()  # (layers, N)
        if self.processed is None:
            self.processed = processed.new_zeros(self.steps, *processed.shape)
        self.processed[self.step] += processed
        self.tokens[self.step] += output.layers[0].num_tokens

    def record(self) -> CapacityRecord:
        """What was counted, on the CPU."""
        if self.processed is None:
            return CapacityRecord.empty(self.steps)
        layers = self.processed.shape[1]
        return CapacityRecord(self.processed.cpu(), self.tokens[:, None].repeat(1, layers))


def start_noise(seed: int, samples: range, shape: tuple[int, int, int]) -> Tensor:
    """The first noise of these samples, (B, C, H, W) float32 on the CPU; each depends on (seed, its number) alone."""
    if not samples:
        return torch.zeros(0, *shape)
    return torch.from_numpy(np.stack([keyed(seed, number, "start").standard_normal(shape, dtype=np.float32) for number in samples]))


@torch.no_grad()
def generate(
    model: Model,
    conditions: Tensor,
    *,
    seed: int,
    steps: int,
    guidance: float,
    chunk: int,
    null_condition: int,
    shape: tuple[int, int, int],
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Draw this rank's part of the samples 0..n-1, by guided Euler steps of the rectified flow.

    conditions (n,) int64 are the classes asked for; the model must be in eval mode. Samples are cut into chunks of `chunk`
    (the last may be smaller); rank c mod world computes chunk c whole, so the shapes of all computations and the pools of
    an inference rule do not depend on the world. All ranks take part in every round, with zero samples where no chunk is
    left, so that collectives between experts agree. The two halves of guidance are two forward passes: two pools.
    progress(done, total) is called after every solver step. Raises ValueError when n, steps or chunk is not positive.
    """
    num_samples = len(conditions)
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"{num_samples} samples in chunks of {chunk}: sampling needs at least 1 sample and chunks of at least 1")
    num_chunks = -(-num_samples // chunk)
    rounds = -(-num_chunks // world)
    counter = _Counter(steps)
    index, latents = [], []

    def velocity(condition: Tensor) -> Velocity:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            output = model(x, t, condition)
            counter.add(output)
            return output.prediction[:, : shape[0]].float()  # (B, C, H, W)

        return evaluate

    for turn in range(rounds):
        first = min((turn * world + rank) * chunk, num_samples)
        samples = range(first, min(first + chunk, num_samples))  # empty where no chunk is left
        condition = conditions[first : samples.stop].to(device)  # (B,)
        flow = guided(velocity(condition), velocity(torch.full_like(condition, null_condition)), guidance)

        def after_step(done: int, turn: int = turn) -> None:
            counter.step = done % steps
            if progress is not None:
                progress(turn * steps + done, rounds * steps)

        x = euler(flow, start_noise(seed, samples, shape).to(device), steps, after_step)  # (B, C, H, W)
        index.append(torch.arange(samples.start, samples.stop))
        latents.append(x.cpu())
    return Generated(torch.cat(index), torch.cat(latents), counter.record())


def join(parts: Sequence[Generated]) -> tuple[Tensor, CapacityRecord]:
    """Put the parts of all ranks together: latents (n, C, H, W) in the order of the samples, and the capacity over all."""
    index = torch.cat([part.index for part in parts])  # (n,)
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(len(index))):
        raise ValueError(f"the {len(parts)} parts do not hold every sample once: is a rank's part missing?")
    capacity = CapacityRecord.empty()
    for part in parts:
        capacity = capacity.merge(part.capacity)
    return torch.cat([part.latents for part in parts])[order], capacity


def to_pixels(latents: Tensor, scale: float, shift: float, highest: int | None = None) -> Tensor:
    """Undo `final = stored * scale + shift` for data of kind pixels: uint8 (n, C, H, W) in 0..highest.

    highest is the largest stored value; without it, the one that the data's scaling puts at 1 (pixels trained in [-1, 1]:
    16 for the digits, 255 for photographs).
    """
    top = round((1 - shift) / scale) if highest is None else highest
    if not 1 <= top <= 255:
        raise ValueError(f"scale {scale} and shift {shift} put stored value {top} at 1: give the largest stored value, from 1 to 255")
    return ((latents.double() - shift) / scale).round().clamp(0, top).to(torch.uint8)
