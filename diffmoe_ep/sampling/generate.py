"""Samples in canonical chunks: sample i is the same whatever the number of ranks that share the work.

Legend: B samples of a chunk, (C, H, W) shape of a latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError, SampleConfig
from diffmoe_ep.data.condition import CaptionFeatures, Condition, joined
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.diffusion.chain import ddim, ddpm_ancestral
from diffmoe_ep.diffusion.ddpm import halves as noise_and_variance
from diffmoe_ep.diffusion.ddpm import linear_schedule
from diffmoe_ep.diffusion.guidance import Guidance, apart, guided
from diffmoe_ep.diffusion.objective import ObjectiveKind
from diffmoe_ep.diffusion.sampler import Field, SamplerKind, as_flow, dopri5, euler, heun
from diffmoe_ep.model.dit import Output
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.capacity_record import CapacityCounter, CapacityRecord

Model = Callable[[Tensor, Tensor, Condition], Output]  # (x (B, C, H, W), t (B,), B conditions) -> Output
Seed = int | Sequence[int]  # of the samples' noise: one that goes with each sample's number, or one of its own for each
# (1 while this rank has work, else 0) -> the sum over the ranks whose forward passes wait for each other; collective
CountActive = Callable[[int], int]
Progress = Callable[[int, int], None]  # (steps done, steps in all)


class Conditions(Protocol):
    """What samples are conditioned on, sliced chunk by chunk: labels, captions, or prompts, padded only then."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice, /) -> Condition: ...


@dataclass(frozen=True)
class SampleTask:
    """What is sampled; how it is sampled is SampleConfig's."""

    seed: Seed  # of the noise
    objective: ObjectiveKind  # what the model was trained to predict
    shape: tuple[int, int, int]  # (C, H, W) of a sample
    null: Condition  # one condition, from which guidance leads away: the null class or caption, or a negative prompt


@dataclass(frozen=True)
class Generated:
    """One rank's part of the samples, on the CPU."""

    index: Tensor  # (m,) int64, ascending: which samples these are
    latents: Tensor  # (m, C, H, W) float32 final latents
    capacity: CapacityRecord  # of this rank's chunks alone


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


@torch.no_grad()
def generate(
    model: Model,
    conditions: Conditions,
    config: SampleConfig,
    task: SampleTask,
    mesh: Mesh,
    *,
    progress: Progress | None = None,
    count_active: CountActive | None = None,
) -> Generated:
    """Generate this rank's part of the samples 0..n-1, one for each of the n conditions; collective.

    The model must be in eval mode. Samples are cut into chunks of `config.chunk` (the last may be smaller); rank c mod
    W computes chunk c whole, so the shapes of all computations and the pools of an inference rule do not depend on W.
    All ranks take part in every round, with zero samples where no chunk is left, so that collectives between experts
    agree. Under flow the two halves of guidance are two forward passes: two pools; under ddpm they are one pass over
    twice the samples, the conditional ones first: one pool.
    Samplers euler, heun and dopri5 sample from both objectives, ddpm and ddim from ddpm alone (`config.steps` of its
    trained ones). guidance_interval is in t in [0, 1], 1 being pure noise; a ddpm step counts as the fraction of the
    chain up to it, (t + 1) / 1000.
    count_active: needed by dopri5 where forward passes of ranks wait for each other (parallel experts). Chunks differ
    in their number of passes; it is called before each, and a rank that has finished passes zero samples along until
    all have. progress(done, total) is called after every solver step, or with dopri5 per hundredth of a round.
    Raises ValueError when n or the chunk is not positive, ConfigError for a sampler that does not fit.
    """
    num_samples, chunk = len(conditions), config.chunk
    if num_samples < 1 or chunk < 1:
        raise ValueError(
            f"{num_samples} samples in chunks of {chunk}: sampling needs at least 1 sample and chunks of at least 1"
        )
    check_sampler(task.objective, config.sampler)
    rounds = -(-num_samples // (chunk * mesh.size))
    counter = CapacityCounter()
    adaptive = config.sampler == "dopri5"
    length = 100 if adaptive else config.steps  # of a round, as progress counts
    index, latents = [], []

    def forward(x: Tensor, t: float, condition: Condition) -> Tensor:
        if adaptive and count_active is not None:
            count_active(1)
        output = model(x, torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device), condition)
        counter.add(output)
        return output.prediction.float()  # (B, out_channels, H, W)

    for turn in range(rounds):
        first = min((turn * mesh.size + mesh.rank) * chunk, num_samples)
        samples = range(first, min(first + chunk, num_samples))  # empty where no chunk is left
        condition = conditions[first : samples.stop].to(mesh.device)
        null = _repeated(task.null.to(mesh.device), len(samples))
        field = _field(forward, condition, null, config, task)
        counter.step = 0

        def after_step(done: int, turn: int = turn) -> None:
            if not adaptive:
                counter.step = done
            if progress is not None:
                progress(turn * length + done, rounds * length)

        def noise(step: int, samples: range = samples) -> Tensor:
            return start_noise(task.seed, samples, task.shape, part=step + 1)

        x = start_noise(task.seed, samples, task.shape).to(mesh.device)
        x = _solve(field, x, noise, counter, after_step, config, task.objective)  # (B, C, H, W)
        while adaptive and count_active is not None and count_active(0):
            idle = x[:0]
            model(idle, idle.new_zeros(0), condition[:0])
        index.append(torch.arange(samples.start, samples.stop))
        latents.append(x.cpu())
    return Generated(torch.cat(index), torch.cat(latents), counter.record())


def check_sampler(objective: ObjectiveKind, sampler: SamplerKind) -> None:
    """Raise ConfigError for a sampler that cannot sample from a model of this objective."""
    if objective == "flow" and sampler in ("ddpm", "ddim"):
        raise ConfigError(
            f"sample.sampler is {sampler}, which walks the chain of train.objective ddpm, but the model is trained as "
            "flow; choose sample.sampler=euler, heun or dopri5",
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
    config: SampleConfig,
    task: SampleTask,
) -> Field:
    """The guided prediction of a chunk: a velocity (B, C, H, W), or [eps; v] (B, 2C, H, W) under ddpm."""
    channels = task.shape[0]
    guidance = Guidance(config.guidance, config.guidance_interval, config.guidance_channels)

    def velocity(condition: Condition) -> Field:
        return lambda x, t: forward(x, t, condition)[:, :channels]

    def conditional(x: Tensor, t: float) -> Tensor:
        prediction = forward(x, t, condition)
        noise_and_variance(prediction, channels)  # raises where there is no variance
        return prediction

    def together(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        both = forward(torch.cat([x, x]), t, joined([condition, null]))
        noise_and_variance(both, channels)
        return both[: x.shape[0]], both[x.shape[0] :]

    if task.objective == "flow":
        return guided(velocity(condition), apart(velocity(condition), velocity(null)), guidance)
    interval = guidance.interval
    trained = len(linear_schedule())
    numbers = None if interval is None else (interval[0] * trained - 1, interval[1] * trained - 1)
    return guided(conditional, together, replace(guidance, interval=numbers))


def _solve(
    field: Field,
    x: Tensor,
    noise: Callable[[int], Tensor],
    counter: CapacityCounter,
    after_step: Callable[[int], None],
    config: SampleConfig,
    objective: ObjectiveKind,
) -> Tensor:
    """Walk a chunk from noise x (B, C, H, W) to latents."""
    trained = linear_schedule()
    velocity = as_flow(field, trained) if objective == "ddpm" else field
    match config.sampler:
        case "euler":
            return euler(velocity, x, config.steps, after_step)
        case "heun":
            return heun(velocity, x, config.steps, after_step)
        case "dopri5":
            nearest = 1.0  # to the data so far; trials that were rejected went further

            def counted(x: Tensor, t: float) -> Tensor:
                nonlocal nearest
                predicted = velocity(x, t)
                counter.step += 1
                nearest = min(nearest, t)
                after_step(min(99, int(100 * (1 - nearest))))
                return predicted

            x, _ = dopri5(counted, x, config.rtol, config.atol)
            after_step(100)
            return x
        case "ddpm":
            return ddpm_ancestral(field, x, trained.respaced(config.steps), noise, after_step)
        case "ddim":
            return ddim(field, x, trained.respaced(config.steps), noise, config.eta, after_step)
        case _:
            assert_never(config.sampler)


def join(parts: Sequence[Generated]) -> tuple[Tensor, CapacityRecord]:
    """Join the parts of all ranks: latents (n, C, H, W) in the order of the samples, and the capacity over all."""
    index = torch.cat([part.index for part in parts])  # (n,)
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(index.shape[0])):
        raise ValueError(f"the {len(parts)} parts do not hold every sample once: is a rank's part missing?")
    capacity = CapacityRecord.empty()
    for part in parts:
        capacity = capacity.merge(part.capacity)
    return torch.cat([part.latents for part in parts])[order], capacity
