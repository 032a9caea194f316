"""DDPM's chain of noising steps, its posterior, and the variational bound that teaches the variance.

Legend: index t = 0 .. T - 1, t = 0 is the least noise; beta the variance that a step adds, signal the product of all
(1 - beta) up to t, so x_t = sqrt(signal) x_0 + sqrt(1 - signal) eps. A model predicts [eps; v]: the noise, and v in
[-1, 1], which places the log variance of the step back between the posterior's (v = -1) and beta's (v = 1). Tables and
what is computed from them are float64.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError


@dataclass(frozen=True, eq=False)
class Schedule:
    """A chain of noising steps, the trained one or a subset of it."""

    index: Tensor  # (T,) int64, the trained chain's number of each step: the timestep that the model gets
    signal: Tensor  # (T,) float64, share of the data's variance that is left after each step (alpha-bar)

    def __len__(self) -> int:
        return len(self.signal)

    @cached_property
    def previous(self) -> Tensor:
        """The signal before each step, (T,); 1 before the first."""
        return torch.cat([self.signal.new_ones(1), self.signal[:-1]])

    @cached_property
    def beta(self) -> Tensor:
        """The variance that each step adds, (T,)."""
        return 1 - self.signal / self.previous

    @cached_property
    def posterior_variance(self) -> Tensor:
        """The variance of x_{t-1} given x_t and x_0, (T,); 0 at the first step, which leads to the data."""
        return self.beta * (1 - self.previous) / (1 - self.signal)

    @cached_property
    def log_variance_bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest (posterior) and highest (beta) log variance of each step back, (T,) each.

        At the first step the posterior has none, so the second step's stands in.
        """
        posterior = self.posterior_variance
        low = torch.cat([posterior[1:2] if len(self) > 1 else self.beta, posterior[1:]])
        return low.log(), self.beta.log()

    def respaced(self, steps: int) -> "Schedule":
        """Keep `steps` of the T steps, spread evenly from the first to the last, both included (250 of 1000: 0, 4, 8,
        12, 16, 20, ..., 995, 999).

        The signal at the kept steps stays, betas and posteriors follow from it, and the model is called with the
        original numbers. One step: the last alone. Raises ConfigError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= len(self):
            raise ConfigError(
                f"sample.steps is {steps}, but a chain of {len(self)} steps has 1 to {len(self)} to choose from",
                everywhere=True,
            )
        kept = torch.tensor(_evenly_spaced(len(self), steps) if steps > 1 else [len(self) - 1])
        return Schedule(self.index[kept], self.signal[kept])


def _evenly_spaced(total: int, count: int) -> list[int]:
    """`count` (2 or more) of the numbers 0 .. total - 1, as published models are respaced: the stride is added up in
    floating point and each sum rounded, half to even.

    The sums' own rounding is part of it: of 1000 it decides at many odd counts (21, 23, 27, 35, ..., 999), where a sum
    should lie halfway between two numbers.
    """
    stride, place, kept = (total - 1) / (count - 1), 0.0, []
    for _ in range(count):
        kept.append(round(place))
        place += stride
    return kept


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """The trained chain: betas that grow linearly from `first` to `last`."""
    beta = torch.linspace(first, last, steps, dtype=torch.float64)
    return Schedule(torch.arange(steps), (1 - beta).cumprod(0))


def at(table: Tensor, step: Tensor) -> Tensor:
    """The entries of a table (T,) for steps (B,), as (B, 1, 1, 1) on their device."""
    return table.to(step.device)[step].view(-1, 1, 1, 1)


def halves(prediction: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Split a prediction (B, 2C, H, W) into eps and v; raises ConfigError when it has no variance channels."""
    if prediction.shape[1] != 2 * channels:
        raise ConfigError(
            f"model.out_channels is {prediction.shape[1]}, but ddpm predicts noise and variance: "
            f"2 * model.in_channels = {2 * channels} channels; set model.out_channels={2 * channels} or "
            "train.objective=flow",
            everywhere=True,
        )
    return prediction[:, :channels], prediction[:, channels:]


def data_of(schedule: Schedule, step: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """The data that a noise estimate implies: x_0 = (x_t - sqrt(1 - signal) eps) / sqrt(signal)."""
    signal = at(schedule.signal, step)
    return (x - (1 - signal).sqrt() * eps) / signal.sqrt()


def posterior_mean(schedule: Schedule, step: Tensor, x: Tensor, latent: Tensor) -> Tensor:
    """The mean of x_{t-1} given x_t and x_0; at the first step x_0 itself."""
    signal, previous, beta = at(schedule.signal, step), at(schedule.previous, step), at(schedule.beta, step)
    return (previous.sqrt() * beta * latent + (1 - beta).sqrt() * (1 - previous) * x) / (1 - signal)


def log_variance(schedule: Schedule, step: Tensor, v: Tensor) -> Tensor:
    """The learned log variance of the step back: linear in v between the bounds."""
    low, high = (at(table, step) for table in schedule.log_variance_bounds)
    share = (v + 1) / 2
    return share * high + (1 - share) * low


def variational_bound(schedule: Schedule, step: Tensor, latent: Tensor, x: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """One term of the bound on -log p(x_0), in bits per dimension: (B,) float64.

    The divergence of the model's step back from the posterior's; at the first step the negative log-likelihood of data
    in 256 levels. latent, x, eps, v are (B, C, H, W): x_0, x_t and the prediction; step (B,) int64. Callers detach eps
    where only v is to learn.
    """
    latent, x, eps, v = latent.double(), x.double(), eps.double(), v.double()
    first = (step == 0).view(-1, 1, 1, 1)
    mean = posterior_mean(schedule, step, x, data_of(schedule, step, x, eps))
    log_var = log_variance(schedule, step, v)
    divergence = normal_divergence(
        posterior_mean(schedule, step, x, latent), at(schedule.log_variance_bounds[0], step), mean, log_var
    )  # (B, C, H, W)
    # Rows of other steps get a harmless stand-in, so that no infinity of theirs can reach a gradient as 0 * inf.
    likelihood = discretized_log_likelihood(latent, torch.where(first, mean, latent), torch.where(first, log_var, 0.0))
    return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def normal_divergence(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the second normal distribution from the first, elementwise, in nats."""
    ratio = log_var - other_log_var
    return (ratio.exp() - 1 - ratio + (mean - other_mean).square() * (-other_log_var).exp()) / 2


def discretized_log_likelihood(latent: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Log probability of data in 256 levels evenly from -1 to 1, elementwise, in nats.

    A value has the normal distribution's mass within half a spacing (1/255) of it; those beyond 0.999, the outer two
    levels and whatever latents have outside [-1, 1], reach to infinity, so the levels' masses sum to 1. Exact in the
    tails, where the mass itself would underflow.
    """
    half, outermost = 1 / 255, 0.999
    scale = (-log_var / 2).exp()
    upper, lower = (latent + half - mean) * scale, (latent - half - mean) * scale
    mirrored = upper + lower > 0  # the lower tail is the accurate one
    left = torch.where(mirrored, -upper, lower)
    right = torch.where(mirrored, -lower, upper)
    inside = _log_difference(torch.special.log_ndtr(right), torch.special.log_ndtr(left))
    below, above = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(latent < -outermost, below, torch.where(latent > outermost, above, inside))


def _log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """log(exp(larger) - exp(smaller))."""
    return larger + (-torch.expm1(smaller - larger)).clamp(min=torch.finfo(larger.dtype).tiny).log()
