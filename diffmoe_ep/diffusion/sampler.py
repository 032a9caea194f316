"""Solvers that walk from noise (t = 1) to data (t = 0) along a velocity, which they are given as a closure.

`chain` has the samplers of DDPM's chain. A closure gets one time for the whole batch as a number, so that what depends
on it (an interval of guidance) costs no look at the device and is the same on ranks without samples.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.ddpm import Schedule
from diffmoe_ep.diffusion.path import straight, velocity_of

SamplerKind = Literal["euler", "heun", "dopri5", "ddpm", "ddim"]
Field = Callable[[Tensor, float], Tensor]  # (x (B, C, H, W), t) -> what is predicted there, (B, C or more, H, W)
OnStep = Callable[[int], None]  # (steps done)


def euler(velocity: Field, x: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to t = 0 in equal steps, one evaluation each, first order.

    x (B, C, H, W) is the noise, B may be 0; x keeps its dtype, whatever the velocity's (float32 in generation).
    Raises ConfigError when steps is not positive.
    """
    _check(steps)
    for step in range(steps):
        x = x - velocity(x, 1 - step / steps).to(x.dtype) / steps
        if on_step is not None:
            on_step(step + 1)
    return x


def heun(velocity: Field, x: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """As `euler`, at second order: each step goes along the mean of the velocities at its two ends, two evaluations.

    The far end is where an Euler step would lead; that of the last step lies at t = 0. So 125 steps cost 250
    evaluations.
    """
    _check(steps)
    for step in range(steps):
        near = velocity(x, 1 - step / steps).to(x.dtype)
        far = velocity(x - near / steps, 1 - (step + 1) / steps).to(x.dtype)
        x = x - (near + far) / (2 * steps)
        if on_step is not None:
            on_step(step + 1)
    return x


def dopri5(velocity: Field, x: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> tuple[Tensor, int]:
    """As `euler`, with torchdiffeq's adaptive Dormand-Prince steps of fifth order; returns (x, evaluations).

    The steps follow one error norm over the whole batch, so a sample depends on what shares it: call it with a
    canonical chunk. The last step ends at t = 0; velocity gets no time outside [0, 1]. Without samples nothing is
    evaluated.
    Raises ConfigError when torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ConfigError(
            "sample.sampler is dopri5, which needs torchdiffeq: pip install 'diffmoe_ep[sample]', or choose "
            "sample.sampler=heun or euler"
        ) from error
    if x.shape[0] == 0:
        return x, 0
    evaluations = 0

    def slope(t: Tensor, state: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return velocity(state, min(max(t.item(), 0.0), 1.0)).to(x.dtype)

    times = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    # Without a step that must end at 0 it would walk beyond, ask the model there, and interpolate back.
    solved = odeint(slope, x, times, rtol=rtol, atol=atol, method="dopri5", options={"step_t": times[1:]})
    return solved[-1], evaluations


def as_flow(epsilon: Field, schedule: Schedule) -> Field:
    """The velocity on the straight path that belongs to a DDPM's noise estimate, so that the solvers above can sample
    from it.

    epsilon is called with the chain's step of the same ratio of noise to data, a number between two steps where none
    fits (log ratio interpolated), and with x scaled to the chain's. The chain's last step still has a little data in
    it, the flow at t = 1 none: beyond that step x is scaled back to it. Near t = 1 an error of the noise estimate
    weighs up to 160 times in the velocity, so a model that is not well trained is better sampled along its own chain.
    """
    ratio = ((1 - schedule.signal) / schedule.signal).sqrt().log()  # (T,) log of sigma / alpha, ascending
    last = torch.sigmoid(ratio[-1]).item()  # the flow's time of the chain's last step

    def velocity(x: Tensor, t: float) -> Tensor:
        held = min(t, last)
        if t > held:
            x = x * (held / t)
        point = straight(held)
        eps = epsilon(x / (point.alpha**2 + point.sigma**2) ** 0.5, _number(schedule, ratio, held))[:, : x.shape[1]]
        return velocity_of(eps, x, point)

    return velocity


def _number(schedule: Schedule, ratio: Tensor, t: float) -> float:
    """The chain's (fractional) step number with the noise-to-data ratio of the straight path at t, kept within the
    chain.
    """
    target = torch.logit(torch.tensor(t, dtype=torch.float64))
    place = int(torch.searchsorted(ratio, target).clamp(1, len(ratio) - 1))
    low, high = ratio[place - 1], ratio[place]
    share = ((target - low) / (high - low)).clamp(0, 1).item()
    return float(schedule.index[place - 1]) + share * float(schedule.index[place] - schedule.index[place - 1])


def _check(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"sample.steps = {steps}: sampling needs at least 1 step", everywhere=True)
