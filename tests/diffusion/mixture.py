"""Data whose every answer is known in closed form: elements drawn from a mixture of two normal distributions, each
independent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.diffusion.ddpm import Schedule


@dataclass(frozen=True)
class Mixture:
    """Where the two components lie, how likely they are, and how wide."""

    centres: tuple[float, ...] = (-2.0, 1.5)
    shares: tuple[float, ...] = (0.3, 0.7)
    width: float = 0.4

    def estimates(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """E[x_0 | x] and E[eps | x] where x = alpha x_0 + sigma eps."""
        variance = alpha**2 * self.width**2 + sigma**2
        logits = [-((x - alpha * centre) ** 2) / (2 * variance) + math.log(share) for centre, share in self.parts()]
        weights = torch.softmax(torch.stack(logits), 0)
        data = torch.stack(
            [centre + alpha * self.width**2 * (x - alpha * centre) / variance for centre in self.centres]
        )
        eps = torch.stack([sigma * (x - alpha * centre) / variance for centre in self.centres])
        return (weights * data).sum(0), (weights * eps).sum(0)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """The rectified flow's field."""
        data, eps = self.estimates(x, 1 - t, t)
        return eps - data

    def distribution(self, x: Tensor) -> np.ndarray:
        """The share of the data below x."""
        below = [
            share * (1 + torch.erf((x - centre) / self.width / math.sqrt(2))) / 2 for centre, share in self.parts()
        ]
        return torch.stack(below).sum(0).numpy()

    def parts(self) -> list[tuple[float, float]]:
        """(centre, share) of each component."""
        return list(zip(self.centres, self.shares, strict=True))

    @property
    def mean(self) -> float:
        return sum(share * centre for centre, share in self.parts())

    @property
    def variance(self) -> float:
        return self.width**2 + sum(share * centre**2 for centre, share in self.parts()) - self.mean**2


GAUSSIAN = Mixture((0.7,), (1.0,), 0.5)


def chain_oracle(mixture: Mixture, schedule: Schedule, v: float = -1.0) -> Callable[[Tensor, float], Tensor]:
    """The ideal [eps; v] of a DDPM for the trained chain's numbers; between two of them by the log of noise over
    data.
    """
    ratios = (0.5 * ((1 - schedule.signal) / schedule.signal).log()).numpy()

    def predict(x: Tensor, t: float) -> Tensor:
        ratio = math.exp(np.interp(t, np.arange(len(ratios)), ratios))
        alpha = 1 / math.sqrt(1 + ratio**2)
        eps = mixture.estimates(x, alpha, ratio * alpha)[1]
        return torch.cat([eps, torch.full_like(eps, v)], dim=1)

    return predict


def orders(errors: list[float]) -> np.ndarray:
    """The order of convergence from each error to the next, each with twice the steps."""
    return np.log2(np.array(errors[:-1]) / errors[1:])


def start(count: int = 16) -> Tensor:
    """Some noise (count, 1, 2, 2)."""
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def even_quantiles(count: int) -> Tensor:
    """Normal noise (count, 1, 1, 1) without chance: the quantiles at (i + 1/2) / count."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).view(-1, 1, 1, 1)
