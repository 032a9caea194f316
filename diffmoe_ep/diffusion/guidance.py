"""Classifier-free guidance: how much, at which times, on which channels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.sampler import Field

# As a Field, but returns the conditional and the unconditional prediction.
Halves = Callable[[Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Guidance:
    """What guidance does; outside the interval the conditional prediction stands alone."""

    scale: float = 1.0  # 1: none
    # Lowest and highest t, both included, in the field's own clock; None: always.
    interval: tuple[float, float] | None = None
    # The first so many are guided, the rest conditional; None: as many as x has (3: DiT's habit).
    channels: int | None = None

    def active(self, t: float) -> bool:
        """Whether the unconditional half is needed at t."""
        if self.scale == 1:
            return False
        # With a margin, for 1 - 175 / 250 is above 0.3.
        return self.interval is None or self.interval[0] - 1e-6 <= t <= self.interval[1] + 1e-6


def guided(conditional: Field, halves: Halves, guidance: Guidance) -> Field:
    """unconditional + scale (conditional - unconditional) on the guided channels.

    Where guidance is not active the conditional half is evaluated alone. Which it is depends on t alone, so ranks at
    the same t make the same calls. Variance channels, which follow those of x, are always the conditional ones.
    Raises ConfigError when the latent does not have the channels that are to be guided.
    """

    def field(x: Tensor, t: float) -> Tensor:
        if not guidance.active(t):
            return conditional(x, t)
        with_condition, without = halves(x, t)
        channels = x.shape[1] if guidance.channels is None else guidance.channels
        if not 1 <= channels <= x.shape[1]:
            raise ConfigError(
                f"sample.guidance_channels is {channels}, but the latent has 1 to {x.shape[1]} channels to guide",
                everywhere=True,
            )
        mixed = without[:, :channels] + guidance.scale * (with_condition[:, :channels] - without[:, :channels])
        return torch.cat([mixed, with_condition[:, channels:]], dim=1)

    return field


def apart(conditional: Field, unconditional: Field) -> Halves:
    """The halves as two evaluations, the conditional one first on every rank, so that collectives inside agree."""
    return lambda x, t: (conditional(x, t), unconditional(x, t))
