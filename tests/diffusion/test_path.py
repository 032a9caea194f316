import math

import numpy as np
import pytest
import torch

from diffmoe_ep.diffusion.ddpm import linear_schedule
from diffmoe_ep.diffusion.path import Point, epsilon_of, straight, variance_preserving, velocity, velocity_of
from diffusion.mixture import GAUSSIAN, Mixture, start

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
    torch.testing.assert_close(epsilon_of(moving, x, point), eps, rtol=1e-9, atol=1e-9)
    if path is straight:
        torch.testing.assert_close(velocity_of(eps, x, point), velocity(latent, eps), rtol=1e-9, atol=1e-9)


def test_the_noise_scale_is_not_lost_from_the_conversion():
    """By hand: at alpha 0.8, sigma 0.6, alpha' -0.3, sigma' 0.4: v = -0.375 x + (0.4 + 0.225) eps."""
    point = Point(0.8, 0.6, -0.3, 0.4)
    converted = velocity_of(torch.tensor(2.0), torch.tensor(1.0), point)
    assert converted.item() == pytest.approx(-0.375 + 2 * 0.625)


def test_conversion_at_the_ends():
    assert torch.equal(epsilon_of(start(), start(), straight(1.0)), start())  # there x is the noise
    torch.testing.assert_close(velocity_of(start(), 2 * start(), straight(0.0)), -start())
    with pytest.raises(ValueError, match="alpha = 0"):
        velocity_of(start(), start(), straight(1.0))
    assert variance_preserving(0.0).sigma == 0
    assert math.isinf(variance_preserving(0.0).sigma_rate)


@pytest.mark.parametrize("mixture", [GAUSSIAN, Mixture()])
@TIMES
def test_the_oracles_of_one_distribution_convert_into_each_other(mixture, t):
    point = straight(t)
    eps = mixture.estimates(start(), point.alpha, point.sigma)[1]
    torch.testing.assert_close(velocity_of(eps, start(), point), mixture.velocity(start(), t), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(epsilon_of(mixture.velocity(start(), t), start(), point), eps, rtol=1e-8, atol=1e-8)


def test_the_continuous_path_is_the_limit_of_the_trained_chain():
    signal = linear_schedule().signal.numpy()
    continuous = np.array([variance_preserving((step + 1) / 1000).alpha ** 2 for step in range(1000)])
    np.testing.assert_allclose(np.log(signal), np.log(continuous), rtol=0.02, atol=1e-4)
