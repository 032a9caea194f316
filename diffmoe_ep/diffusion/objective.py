"""What a model is trained to predict: noised inputs and the loss of a prediction. Objectives never see the model."""

from dataclasses import dataclass, field
from typing import Literal, Protocol, assert_never

from torch import Tensor

from diffmoe_ep.diffusion import path
from diffmoe_ep.diffusion.ddpm import Schedule, at, halves, linear_schedule, variational_bound

ObjectiveKind = Literal["flow", "ddpm"]


@dataclass(frozen=True)
class Noised:
    """Training inputs on the path from data to noise, and what should be predicted for them."""

    x: Tensor  # (B, C, H, W) float32, the model's input
    t: Tensor  # (B,) float32, the model's timestep
    target: Tensor  # (B, C, H, W) float32
    latent: Tensor  # (B, C, H, W) float32, the data


class Objective(Protocol):
    """The two verbs of training; one class for each kind stands below."""

    def noised(self, latent: Tensor, noise: Tensor, u: Tensor) -> Noised:
        """Turn final latents, standard normal noise (both (B, C, H, W)) and u (B,) in [0, 1) into training inputs."""
        ...

    def losses(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The loss of every sample, (B,) float32."""
        ...

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The mean loss of the batch, a float32 scalar."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Uniform time on the straight path, and the mean squared error of the velocity (Eq. 24, 31)."""

    def noised(self, latent: Tensor, noise: Tensor, u: Tensor) -> Noised:
        """Put every sample at time t = u of its path; computed in float32."""
        latent, noise, t = latent.float(), noise.float(), u.float()
        return Noised(x=path.noise(latent, noise, t), t=t, target=path.velocity(latent, noise), latent=latent)

    def losses(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Squared error of the first C channels, mean over each sample: (B,) float32.

        A prediction may have more channels than the target (learned variance, which flow has no use for).
        """
        velocity = prediction[:, : noised.target.shape[1]].float()  # (B, C, H, W)
        return (velocity - noised.target).square().flatten(1).mean(1)

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error over all elements: a float32 scalar, the mean of the losses of the samples."""
        return self.losses(prediction, noised).mean()


@dataclass(frozen=True)
class Ddpm:
    """Uniform steps of DDPM's chain, the mean squared error of the noise, and a variational bound from which the
    variance is learned.

    A prediction holds [eps; v] (B, 2C, H, W). The bound, in bits per dimension, has weight 1 and moves v alone.
    """

    schedule: Schedule = field(default_factory=linear_schedule)  # the chain that is trained

    def noised(self, latent: Tensor, noise: Tensor, u: Tensor) -> Noised:
        """Put every sample at step t = floor(T u) of its chain; the model gets t as a float."""
        latent, noise = latent.float(), noise.float()
        step = (u.double() * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)  # (B,)
        signal = at(self.schedule.signal, step)  # (B, 1, 1, 1)
        x = signal.sqrt().float() * latent + (1 - signal).sqrt().float() * noise
        return Noised(x=x, t=step.float(), target=noise, latent=latent)

    def losses(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Squared error of the noise, mean over each sample, plus the bound's term for its step: (B,) float32.

        Raises ConfigError when the prediction has no variance channels.
        """
        eps, v = halves(prediction.float(), noised.target.shape[1])
        error = (eps - noised.target).square().flatten(1).mean(1)
        bound = variational_bound(self.schedule, noised.t.long(), noised.latent, noised.x, eps.detach(), v)
        return error + bound.float()

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The mean of the losses of the samples, a float32 scalar."""
        return self.losses(prediction, noised).mean()


def objective_of(kind: ObjectiveKind) -> Objective:
    """The objective of a configured kind; the one place where kinds are matched."""
    match kind:
        case "flow":
            return RectifiedFlow()
        case "ddpm":
            return Ddpm()
        case _:
            assert_never(kind)
