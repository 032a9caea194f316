import math

import numpy as np
import pytest
import torch

from diffmoe_ep.diffusion.ddpm import linear_schedule
from diffmoe_ep.diffusion.path import Point, straight, velocity, velocity_of
from diffusion.mixture import GAUSSIAN, Mixture, start


def variance_preserving(t: float, first: float = 0.1, last: float = 20.0) -> Point:
    """DDPM's path in continuous time, t > 0: alpha^2 + sigma^2 = 1, with a noise rate that grows linearly; the limit of
    many steps of betas from first / steps to last / steps.
    """
    log_alpha = -first * t / 2 - (last - first) * t**2 / 4
    rate = -(first + (last - first) * t) / 2  # of log alpha
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
    return Point(alpha, sigma, alpha * rate, -rate * alpha**2 / sigma)


PATHS = pytest.mark.parametrize("path", [straight, variance_preserving])
TIMES = pytest.mark.parametrize("t", [0.01, 0.2, 0.5, 0.9, 0.99])


@PATHS
@TIMES
def test_rates_are_the_derivatives_of_a_path(path, t):
    h = 1e-6
    before, point, after = path(t - h), path(t), path(t + h)
    assert point.alpha_rate == pytest.approx((after.alpha - before.alpha) / (2 * h), rel=1e-5)
    assert point.sigma_rate == pytest.approx((after.sigma - before.sigma) / (2 * h), rel=1e-5)


@PATHS
@TIMES
def test_a_noise_estimate_becomes_the_derivative_of_the_point_that_it_stands_for(path, t):
    """With the true eps, x_t = alpha x_0 + sigma eps moves at alpha' x_0 + sigma' eps."""
    point, latent, eps = path(t), start(), start(32)[16:]
    x = point.alpha * latent + point.sigma * eps
    moving = point.alpha_rate * latent + point.sigma_rate * eps
    torch.testing.assert_close(velocity_of(eps, x, point), moving, rtol=1e-9, atol=1e-9)
    if path is straight:
        torch.testing.assert_close(velocity_of(eps, x, point), velocity(latent, eps), rtol=1e-9, atol=1e-9)


def test_the_noise_scale_is_not_lost_from_the_conversion():
    """By hand: at alpha 0.8, sigma 0.6, alpha' -0.3, sigma' 0.4: v = -0.375 x + (0.4 + 0.225) eps."""
    point = Point(0.8, 0.6, -0.3, 0.4)
    converted = velocity_of(torch.tensor(2.0), torch.tensor(1.0), point)
    assert converted.item() == pytest.approx(-0.375 + 2 * 0.625)


def test_conversion_at_the_ends():
    torch.testing.assert_close(velocity_of(start(), 2 * start(), straight(0.0)), -start())
    with pytest.raises(ValueError, match="alpha = 0"):
        velocity_of(start(), start(), straight(1.0))


@pytest.mark.parametrize("mixture", [GAUSSIAN, Mixture()])
@TIMES
def test_one_oracle_of_a_distribution_becomes_the_other(mixture, t):
    point = straight(t)
    eps = mixture.estimates(start(), point.alpha, point.sigma)[1]
    torch.testing.assert_close(velocity_of(eps, start(), point), mixture.velocity(start(), t), rtol=1e-8, atol=1e-8)


def test_the_continuous_path_is_the_limit_of_the_trained_chain():
    signal = linear_schedule().signal.numpy()
    continuous = np.array([variance_preserving((step + 1) / 1000).alpha ** 2 for step in range(1000)])
    np.testing.assert_allclose(np.log(signal), np.log(continuous), rtol=0.02, atol=1e-4)
