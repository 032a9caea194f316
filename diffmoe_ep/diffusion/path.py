"""The straight path between data (t = 0) and noise (t = 1), Eq. 24, its velocity, Eq. 31, and how a noise estimate
becomes a velocity.

On any path x_t = alpha x_0 + sigma eps the two say the same: v = alpha' x_0 + sigma' eps, with
x_0 = (x_t - sigma eps) / alpha.
"""

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


def velocity_of(eps: Tensor, x: Tensor, point: Point) -> Tensor:
    """The velocity that a noise estimate implies at x: v = (alpha' / alpha) x + (sigma' - sigma alpha' / alpha) eps.

    Raises ValueError where the path has no data left, since there eps says nothing about them.
    """
    if point.alpha <= 0:
        raise ValueError(f"alpha = {point.alpha:g}: a noise estimate has no velocity where nothing is left of the data")
    ratio = point.alpha_rate / point.alpha
    return ratio * x + (point.sigma_rate - point.sigma * ratio) * eps
