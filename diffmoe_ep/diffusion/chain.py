"""Samplers of DDPM's chain: from the last step's noise to data, one step of a (respaced) schedule after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.ddpm import Schedule, at, data_of, halves, log_variance, posterior_mean
from diffmoe_ep.diffusion.sampler import Field, OnStep

Noise = Callable[[int], Tensor]  # (number of the step, 0 for the first that is taken) -> standard normal (B, C, H, W)


def ddpm_ancestral(
    predict: Field, x: Tensor, schedule: Schedule, noise: Noise, on_step: OnStep | None = None
) -> Tensor:
    """Draw x_{t-1} given x_t from the learned normal distribution, for every step of the schedule; the last adds no
    noise.

    predict(x, t) returns [eps; v] (B, 2C, H, W) for x (B, C, H, W), B may be 0, at the trained chain's number t. The
    noise of each step comes from outside, so that it can follow the samples. x keeps its dtype; a step's own arithmetic
    is float64.
    """
    for number, place in enumerate(reversed(range(len(schedule)))):
        eps, v = halves(predict(x, float(schedule.index[place])).double(), x.shape[1])
        step = torch.full((x.shape[0],), place, device=x.device)  # (B,)
        wide = x.double()
        mean = posterior_mean(schedule, step, wide, data_of(schedule, step, wide, eps))
        if place > 0:
            mean = mean + (log_variance(schedule, step, v) / 2).exp() * noise(number).to(x.device)
        x = mean.to(x.dtype)
        if on_step is not None:
            on_step(number + 1)
    return x


def ddim(
    predict: Field,
    x: Tensor,
    schedule: Schedule,
    noise: Noise | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Walk the schedule by DDIM: deterministic at eta 0, with the posterior's noise at eta 1.

    predict(x, t) returns eps in its first C channels; the others are not used. noise is needed when eta is above 0.
    Raises ConfigError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ConfigError(
            f"sample.eta is {eta:g}; DDIM's share of noise lies between 0 (deterministic) and 1 (as DDPM)",
            everywhere=True,
        )
    if eta > 0 and noise is None:
        raise ValueError(f"eta = {eta:g} draws noise at every step: give `noise`")
    for number, place in enumerate(reversed(range(len(schedule)))):
        step = torch.full((x.shape[0],), place, device=x.device)  # (B,)
        wide = x.double()
        eps = predict(x, float(schedule.index[place]))[:, : x.shape[1]].double()
        previous = at(schedule.previous, step)
        variance = eta**2 * at(schedule.posterior_variance, step)
        wide = (
            previous.sqrt() * data_of(schedule, step, wide, eps) + (1 - previous - variance).clamp(min=0).sqrt() * eps
        )
        if noise is not None and eta > 0 and place > 0:
            wide = wide + variance.sqrt() * noise(number).to(x.device)
        x = wide.to(x.dtype)
        if on_step is not None:
            on_step(number + 1)
    return x
