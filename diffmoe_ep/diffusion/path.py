"""The straight path between data (t = 0) and noise (t = 1), Eq. 24, and its velocity, Eq. 31."""

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
