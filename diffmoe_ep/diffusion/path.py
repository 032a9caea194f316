"""The straight path between data (t = 0) and noise (t = 1), Eq. 24, its velocity, Eq. 31, and how a velocity and a
noise estimate convert into each other.

On any path x_t = alpha x_0 + sigma eps the two say the same: v = alpha' x_0 + sigma' eps, with x_0 = (x_t - sigma eps)
/ alpha.
"""

import math
from dataclasses import dataclass

from torch import Tensor


def noise(latent: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Walk from the latent towards the noise by t, Eq. 24: x_t = (1 - t) x_0 + t eps.

    latent and eps are (B, C, H, W), t is (B,) in [0, 1]; the result has the shape of latent.
    """
    t = t.view(-1, *[1] * (latent.dim() - 1))  # (B, 1, 1, 1)
    return (1 - t) * latent + t * eps  # (B, C, H, W)


def velocity(latent: Tensor, eps: Tensor) -> Tensor:
    """The path's time derivative, which the model learns, Eq. 31: eps - x_0, the same at every t."""
    return eps - latent  # (B, C, H, W)


@dataclass(frozen=True)
class Point:
    """A point of time on a path x_t = alpha x_0 + sigma eps."""

    alpha: float  # how much of the data is left
    sigma: float  # how much noise there is
    alpha_rate: float  # alpha's time derivative
    sigma_rate: float  # sigma's time derivative


def straight(t: float) -> Point:
    """The straight path at time t, Eq. 24."""
    return Point(1 - t, t, -1.0, 1.0)


def variance_preserving(t: float, first: float = 0.1, last: float = 20.0) -> Point:
    """DDPM's path in continuous time: alpha^2 + sigma^2 = 1, with a noise rate that grows linearly from `first` to
    `last`.

    It is the limit of many steps of betas from first / steps to last / steps; t in [0, 1]; at t = 0 sigma's rate is
    infinite.
    """
    log_alpha = -first * t / 2 - (last - first) * t**2 / 4
    rate = -(first + (last - first) * t) / 2  # of log alpha
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
    return Point(alpha, sigma, alpha * rate, math.inf if sigma == 0 else -rate * alpha**2 / sigma)


def velocity_of(eps: Tensor, x: Tensor, point: Point) -> Tensor:
    """The velocity that a noise estimate implies at x: v = (alpha' / alpha) x + (sigma' - sigma alpha' / alpha) eps.

    Raises ValueError where the path has no data left, since there eps says nothing about them.
    """
    if point.alpha <= 0:
        raise ValueError(f"alpha = {point.alpha:g}: a noise estimate has no velocity where nothing is left of the data")
    ratio = point.alpha_rate / point.alpha
    return ratio * x + (point.sigma_rate - point.sigma * ratio) * eps


def epsilon_of(velocity: Tensor, x: Tensor, point: Point) -> Tensor:
    """The noise estimate that a velocity implies at x, the inverse of `velocity_of`; defined at every time of the
    straight path.
    """
    determinant = point.alpha * point.sigma_rate - point.sigma * point.alpha_rate  # 1 on the straight path
    return (point.alpha * velocity - point.alpha_rate * x) / determinant
