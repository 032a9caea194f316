"""Solvers that walk from noise (t = 1) to data (t = 0) along a velocity, which they get as a closure."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, H, W), t (B,) float32) -> dx/dt (B, C, H, W)
OnStep = Callable[[int], None]  # (steps done)


def euler(velocity: Velocity, x: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to t = 0 in equal steps, one evaluation each, first order.

    x (B, C, H, W) is the noise, B may be 0; x keeps its dtype, whatever the velocity's (float32 in generation).
    Raises ValueError when steps is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: sampling needs at least 1 step")
    for step in range(steps):
        t = torch.full((x.shape[0],), 1 - step / steps, dtype=torch.float32, device=x.device)  # (B,)
        x = x - velocity(x, t).to(x.dtype) / steps
        if on_step is not None:
            on_step(step + 1)
    return x


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional).

    Both halves are evaluated at every point, the conditional one first on every rank, so that collectives inside agree;
    at scale 1 the result is the conditional velocity itself and the other half is not computed.
    """
    if scale == 1:
        return conditional

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        towards = conditional(x, t)
        away = unconditional(x, t)
        return away + scale * (towards - away)

    return velocity
