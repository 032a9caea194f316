"""Samples in canonical chunks: sample i is the same whatever the number of ranks that share the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.condition import CaptionFeatures, Condition, joined
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.diffusion.chain import ddim, ddpm_ancestral
from diffmoe_ep.diffusion.ddpm import halves as noise_and_variance
from diffmoe_ep.diffusion.ddpm import linear_schedule
from diffmoe_ep.diffusion.guidance import Guidance, apart, guided
from diffmoe_ep.diffusion.objective import ObjectiveKind
from diffmoe_ep.diffusion.sampler import Field, SamplerKind, as_flow, dopri5, euler, heun
from diffmoe_ep.model.dit import Output

Model = Callable[[Tensor, Tensor, Condition], Output]  # (x (B, C, H, W), t (B,), B conditions) -> Output
Seed = int | Sequence[int]  # of the samples' noise: one that goes with each sample's number, or one of its own for each
Busy = Callable[
    [int], int
]  # (1 while this rank has work, else 0) -> the sum over all ranks, which wait for each other in it


class Conditions(Protocol):
    """What samples are conditioned on, asked for slice by slice: labels, captions, or prompts that are laid out only
    then.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice, /) -> Condition: ...


@dataclass(frozen=True)
class CapacityRecord:
    """How many tokens the experts processed while sampling, by step, MoE layer and expert; exact counts in float64.

    A step is a solver's step with all its evaluations. For dopri5, whose steps differ between chunks, it is an
    evaluation: number i of every chunk together, as many as the longest chunk has.
    """

    processed: (
        Tensor  # (steps, layers, N) float64: rows that each expert took, conditional and unconditional halves together
    )
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
        if self.processed.shape[1:] != other.processed.shape[1:]:
            raise ValueError(
                f"capacity records of shapes {tuple(self.processed.shape)} and {tuple(other.processed.shape)} do not add up"
            )
        steps = max(len(self.tokens), len(other.tokens))
        return CapacityRecord(
            _lengthen(self.processed, steps) + _lengthen(other.processed, steps),
            _lengthen(self.tokens, steps) + _lengthen(other.tokens, steps),
        )

    def _capacity(self) -> Tensor:
        return self.processed.shape[2] * self.processed / self.tokens[:, :, None]  # (steps, layers, N)


@dataclass(frozen=True)
class Generated:
    """One rank's part of the samples, on the CPU."""

    index: Tensor  # (m,) int64, ascending: which samples these are
    latents: Tensor  # (m, C, H, W) float32 final latents
    capacity: CapacityRecord  # of this rank's chunks alone


def _lengthen(counts: Tensor, steps: int) -> Tensor:
    return torch.cat([counts, counts.new_zeros(steps - len(counts), *counts.shape[1:])])


class _Counter:
    """Adds up the layers' reports on their own device, so that no step waits for the host."""

    def __init__(self) -> None:
        self.step = 0
        self.processed: list[Tensor] = []  # for each step (layers, N) float64
        self.tokens: list[int] = []  # for each step; every layer sees all tokens

    def add(self, output: Output) -> None:
        """Count one forward pass into the present step."""
        if not output.layers:
            return
        processed = torch.stack([layer.processed for layer in output.layers]).double()  # (layers, N)
        while len(self.tokens) <= self.step:
            self.processed.append(torch.zeros_like(processed))
            self.tokens.append(0)
        self.processed[self.step] += processed
        self.tokens[self.step] += output.layers[0].num_tokens

    def record(self) -> CapacityRecord:
        """What was counted, on the CPU."""
        if not self.processed:
            return CapacityRecord.empty(self.step)
        processed = torch.stack(self.processed).cpu()  # (steps, layers, N)
        return CapacityRecord(
            processed, torch.tensor(self.tokens, dtype=torch.float64)[:, None].repeat(1, processed.shape[1])
        )


def start_noise(seed: Seed, samples: range, shape: tuple[int, int, int], part: int = 0) -> Tensor:
    """The first noise of these samples, (B, C, H, W) float32 on the CPU; each depends on (seed, its number) alone, or
    on its own seed.

    Part n > 0 is the noise of the n-th step of a sampler that draws some.
    """
    if not samples:
        return torch.zeros(0, *shape)
    keys = ((seed, number) if isinstance(seed, int) else (seed[number], 0) for number in samples)
    streams = (generator_for(*key, "start", part) for key in keys)
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


@dataclass(frozen=True)
class _Protocol:
    """What the samples of a run have in common; the arguments of `generate`."""

    objective: ObjectiveKind
    sampler: SamplerKind
    steps: int
    guidance: Guidance
    eta: float
    rtol: float
    atol: float


@torch.no_grad()
def generate(
    model: Model,
    conditions: Conditions,
    *,
    seed: Seed,
    steps: int,
    guidance: float,
    chunk: int,
    null: Condition,
    shape: tuple[int, int, int],
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    objective: ObjectiveKind = "flow",
    sampler: SamplerKind = "euler",
    guidance_interval: tuple[float, float] | None = None,
    guidance_channels: int | None = None,
    eta: float = 0.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    busy: Busy | None = None,
) -> Generated:
    """Draw this rank's part of the samples 0..n-1, by guided steps of a sampler.

    conditions are the n classes or captions asked for, null is the one that guidance leads away from (the null class or
    caption, or a negative prompt); seed may be one for each sample. The model must be in eval mode. Samples are cut
    into chunks of `chunk` (the last may be smaller); rank c mod world computes chunk c whole, so the shapes of all
    computations and the pools of an inference rule do not depend on the world. All ranks take part in every round, with
    zero samples where no chunk is left, so that collectives between experts agree. Under flow the two halves of
    guidance are two forward passes: two pools; under ddpm they are one pass over twice the samples, the conditional
    ones first: one pool.
    objective: what the model predicts. sampler: euler, heun and dopri5 sample from both objectives, ddpm and ddim from
    ddpm alone (`steps` of its trained ones; dopri5 has no use for `steps`, rtol and atol are its; eta is ddim's).
    guidance_interval: lowest and highest t in [0, 1] at which there is guidance, 1 being pure noise; a ddpm step counts
    as the share of the chain up to it, (t + 1) / 1000. guidance_channels: guide only the first so many channels of the
    latent.
    busy: needed by dopri5 where forward passes of ranks wait for each other (parallel experts). Chunks differ in their
    number of passes; it is asked before each, and a rank that has finished passes zero samples along until all have.
    progress(done, total) is called after every solver step, or with dopri5 hundredths of a round.
    Raises ValueError when n or chunk is not positive, ConfigError for a sampler that does not fit.
    """
    num_samples = len(conditions)
    if num_samples < 1 or chunk < 1:
        raise ValueError(
            f"{num_samples} samples in chunks of {chunk}: sampling needs at least 1 sample and chunks of at least 1"
        )
    protocol = _Protocol(
        objective, sampler, steps, Guidance(guidance, guidance_interval, guidance_channels), eta, rtol, atol
    )
    check_sampler(objective, sampler)
    num_chunks = -(-num_samples // chunk)
    rounds = -(-num_chunks // world)
    counter = _Counter()
    adaptive = sampler == "dopri5"
    length = 100 if adaptive else steps  # of a round, as progress counts
    index, latents = [], []

    def forward(x: Tensor, t: float, condition: Condition) -> Tensor:
        if adaptive and busy is not None:
            busy(1)
        output = model(x, torch.full((len(x),), t, dtype=torch.float32, device=x.device), condition)
        counter.add(output)
        return output.prediction.float()  # (B, out_channels, H, W)

    for turn in range(rounds):
        first = min((turn * world + rank) * chunk, num_samples)
        samples = range(first, min(first + chunk, num_samples))  # empty where no chunk is left
        condition = conditions[first : samples.stop].to(device)
        field = _field(forward, condition, _repeated(null.to(device), len(samples)), shape[0], protocol)
        counter.step = 0

        def after_step(done: int, turn: int = turn) -> None:
            if not adaptive:
                counter.step = done
            if progress is not None:
                progress(turn * length + done, rounds * length)

        def noise(step: int, samples: range = samples) -> Tensor:
            return start_noise(seed, samples, shape, part=step + 1)

        x = _solve(
            field, start_noise(seed, samples, shape).to(device), noise, counter, after_step, protocol
        )  # (B, C, H, W)
        while adaptive and busy is not None and busy(0):
            idle = x[:0]
            model(idle, idle.new_zeros(0), condition[:0])
        index.append(torch.arange(samples.start, samples.stop))
        latents.append(x.cpu())
    return Generated(torch.cat(index), torch.cat(latents), counter.record())


def check_sampler(objective: ObjectiveKind, sampler: SamplerKind) -> None:
    """Raise ConfigError for a sampler that cannot draw from a model of this objective."""
    if objective == "flow" and sampler in ("ddpm", "ddim"):
        raise ConfigError(
            f"sample.sampler is {sampler}, which walks the chain of train.objective ddpm, but the model is trained as flow; "
            "choose sample.sampler=euler, heun or dopri5",
            everywhere=True,
        )


def _repeated(one: Condition, count: int) -> Condition:
    """A single condition, so many times."""
    if isinstance(one, CaptionFeatures):
        return CaptionFeatures(one.features.expand(count, -1, -1), one.lengths.expand(count))
    return one.expand(count)


def _field(
    forward: Callable[[Tensor, float, Condition], Tensor],
    condition: Condition,
    null: Condition,
    channels: int,
    protocol: _Protocol,
) -> Field:
    """The guided prediction of a chunk: a velocity (B, C, H, W), or [eps; v] (B, 2C, H, W) under ddpm."""

    def towards(condition: Condition) -> Field:
        return lambda x, t: forward(x, t, condition)[:, :channels]

    def chain(x: Tensor, t: float) -> Tensor:
        prediction = forward(x, t, condition)
        noise_and_variance(prediction, channels)  # or an error that says so
        return prediction

    def together(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        both = forward(torch.cat([x, x]), t, joined([condition, null]))
        noise_and_variance(both, channels)
        return both[: len(x)], both[len(x) :]

    if protocol.objective == "flow":
        return guided(towards(condition), apart(towards(condition), towards(null)), protocol.guidance)
    interval = protocol.guidance.interval
    trained = len(linear_schedule())
    numbers = None if interval is None else (interval[0] * trained - 1, interval[1] * trained - 1)
    return guided(chain, together, replace(protocol.guidance, interval=numbers))


def _solve(
    field: Field,
    x: Tensor,
    noise: Callable[[int], Tensor],
    counter: _Counter,
    after_step: Callable[[int], None],
    protocol: _Protocol,
) -> Tensor:
    """Walk a chunk from noise x (B, C, H, W) to latents."""
    trained = linear_schedule()
    velocity = as_flow(field, trained) if protocol.objective == "ddpm" else field
    match protocol.sampler:
        case "euler":
            return euler(velocity, x, protocol.steps, after_step)
        case "heun":
            return heun(velocity, x, protocol.steps, after_step)
        case "dopri5":
            nearest = 1.0  # to the data so far; trials that were rejected went further

            def counted(x: Tensor, t: float) -> Tensor:
                nonlocal nearest
                predicted = velocity(x, t)
                counter.step += 1
                nearest = min(nearest, t)
                after_step(min(99, int(100 * (1 - nearest))))
                return predicted

            x, _ = dopri5(counted, x, protocol.rtol, protocol.atol)
            after_step(100)
            return x
        case "ddpm":
            return ddpm_ancestral(field, x, trained.respaced(protocol.steps), noise, after_step)
        case "ddim":
            return ddim(field, x, trained.respaced(protocol.steps), noise, protocol.eta, after_step)
        case _:
            assert_never(protocol.sampler)


def join(parts: Sequence[Generated]) -> tuple[Tensor, CapacityRecord]:
    """Put the parts of all ranks together: latents (n, C, H, W) in the order of the samples, and the capacity over
    all.
    """
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

    highest is the largest stored value; without it, the one that the data's scaling puts at 1 (pixels trained in [-1,
    1]: 16 for the digits, 255 for photographs).
    """
    top = round((1 - shift) / scale) if highest is None else highest
    if not 1 <= top <= 255:
        raise ValueError(
            f"scale {scale} and shift {shift} put stored value {top} at 1: give the largest stored value, from 1 to 255"
        )
    return ((latents.double() - shift) / scale).round().clamp(0, top).to(torch.uint8)
