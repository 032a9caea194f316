import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ep.diffusion.sampler import euler, guided

CENTRES, WIDTH = (-2.0, 1.5), 0.4  # of a mixture of two equally likely normal distributions


def _gaussian_velocity(x: Tensor, t: Tensor, centre: float = 0.7, width: float = 0.5) -> Tensor:
    """E[eps - x_0 | x_t = x] for data N(centre, width^2); the flow carries eps to centre + width * eps exactly."""
    t = t.view(-1, 1, 1, 1).to(x.dtype)
    offset = (x - (1 - t) * centre) / ((1 - t) ** 2 * width**2 + t**2)
    return t * offset - (centre + (1 - t) * width**2 * offset)


def _mixture_velocity(x: Tensor, t: Tensor) -> Tensor:
    time = t.view(-1, 1, 1, 1).to(x.dtype)
    variance = (1 - time) ** 2 * WIDTH**2 + time**2
    weights = torch.softmax(torch.stack([-((x - (1 - time) * centre) ** 2) / (2 * variance) for centre in CENTRES]), 0)
    velocities = torch.stack([_gaussian_velocity(x, t, centre, WIDTH) for centre in CENTRES])
    return (weights * velocities).sum(0)


def _noise() -> Tensor:
    return torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_euler_converges_to_the_exact_flow_at_first_order():
    exact = 0.7 + 0.5 * _noise()
    errors = [(euler(_gaussian_velocity, _noise(), steps) - exact).abs().max().item() for steps in (32, 64, 128, 256)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1, atol=0.1)
    assert errors[-1] < 0.01


def test_euler_converges_to_the_mixture_that_the_velocity_belongs_to():
    grid = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).view(-1, 1, 1, 1)
    samples = euler(_mixture_velocity, grid, 256).flatten().sort().values

    def distribution(x: float) -> float:
        return sum(0.5 * (1 + math.erf((x - centre) / WIDTH / math.sqrt(2))) for centre in CENTRES) / 2

    quantiles = np.array([distribution(x) for x in samples.tolist()])
    assert np.abs(quantiles - (np.arange(400) + 0.5) / 400).max() < 0.01


@pytest.mark.parametrize("steps", [1, 2, 7, 250])
def test_euler_is_exact_where_paths_are_straight(steps):
    """With a single data point the field is linear in x and every path a straight line."""
    target = 3.0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - target) / t.view(-1, 1, 1, 1).double()

    torch.testing.assert_close(euler(velocity, _noise(), steps), torch.full_like(_noise(), target), rtol=0, atol=1e-5)
    torch.testing.assert_close(euler(lambda x, t: torch.full_like(x, 2.0), _noise(), steps), _noise() - 2)


def test_euler_shows_uniform_times_from_noise_to_data():
    times, done = [], []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (5,)
        assert t.dtype == torch.float32
        times.append(t[0].item())
        return torch.ones_like(x)

    result = euler(velocity, torch.zeros(5, 1, 2, 2), 4, done.append)
    assert times == [1.0, 0.75, 0.5, 0.25]
    assert done == [1, 2, 3, 4]
    assert torch.equal(result, -torch.ones(5, 1, 2, 2))
    assert result.dtype == torch.float32


def test_euler_keeps_float32_latents_under_a_low_precision_velocity_and_takes_no_samples():
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert euler(lambda x, t: torch.ones_like(x).bfloat16(), x, 3).dtype == torch.float32
    assert euler(lambda x, t: x, torch.zeros(0, 1, 2, 2), 3).shape == (0, 1, 2, 2)


def test_euler_refuses_to_take_no_steps():
    with pytest.raises(ValueError, match="steps = 0"):
        euler(lambda x, t: x, _noise(), 0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_moves_away_from_the_unconditional_half(scale):
    x, t = _noise(), torch.full((16,), 0.5)
    velocity = guided(lambda x, t: 2 * x, lambda x, t: x + 1, scale)
    np.testing.assert_allclose(velocity(x, t).numpy(), (x + 1 + scale * (2 * x - (x + 1))).numpy())


def test_guidance_at_scale_one_computes_the_conditional_half_alone():
    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the unconditional half is not needed")

    velocity = guided(lambda x, t: 2 * x, unconditional, 1.0)
    assert torch.equal(velocity(_noise(), torch.ones(16)), 2 * _noise())


def test_the_conditional_half_comes_first():
    calls = []
    velocity = guided(lambda x, t: calls.append("conditional") or x, lambda x, t: calls.append("unconditional") or x, 2.0)
    velocity(_noise(), torch.ones(16))
    assert calls == ["conditional", "unconditional"]
