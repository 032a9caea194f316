import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.chain import ddim, ddpm_ancestral
from diffmoe_ep.diffusion.ddpm import Schedule, linear_schedule
from diffmoe_ep.diffusion.path import straight
from diffmoe_ep.diffusion.sampler import heun
from diffusion.mixture import GAUSSIAN, Mixture, chain_oracle, even_quantiles, orders, start

SCHEDULE = linear_schedule()


def _noises(x: Tensor, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(x.shape, generator=generator, dtype=torch.float64)


def _never(step: int) -> Tensor:
    raise AssertionError("no noise is needed")


def test_ancestral_steps_are_the_published_ones():
    """x_{t-1} = (x_t - beta / sqrt(1 - signal) eps) / sqrt(1 - beta) + deviation z, on all 1000 steps, against plain
    NumPy.
    """
    noises = np.random.default_rng(0).standard_normal((1000, 2, 1, 2, 2))
    beta = np.linspace(1e-4, 0.02, 1000)
    signal = np.cumprod(1 - beta)
    x = start(2).numpy().copy()
    for number, t in enumerate(reversed(range(1000))):
        eps, v = 0.9 * x + 0.1, np.sin(x)
        low = beta[t] * (1 - signal[t - 1]) / (1 - signal[t]) if t else 1.0
        mean = (x - beta[t] / np.sqrt(1 - signal[t]) * eps) / np.sqrt(1 - beta[t])
        x = mean + (t > 0) * beta[t] ** ((v + 1) / 4) * low ** ((1 - v) / 4) * noises[number]

    def predict(x: Tensor, t: float) -> Tensor:
        return torch.cat([0.9 * x + 0.1, torch.sin(x)], 1)

    drawn = ddpm_ancestral(predict, start(2), SCHEDULE, lambda step: torch.from_numpy(noises[step]))
    np.testing.assert_allclose(drawn.numpy(), x, rtol=1e-6, atol=1e-9)


def test_the_model_gets_the_trained_numbers_and_the_last_step_adds_no_noise():
    for sampler in (ddpm_ancestral, lambda *args: ddim(*args, eta=1.0)):
        times: list[float] = []
        drawn: list[int] = []

        def predict(x: Tensor, t: float, times: list[float] = times) -> Tensor:
            times.append(t)
            return torch.cat([x, x], 1)

        def noise(step: int, drawn: list[int] = drawn) -> Tensor:
            drawn.append(step)
            return torch.zeros(3, 1, 2, 2)

        sampler(predict, torch.zeros(3, 1, 2, 2), SCHEDULE.respaced(250), noise)
        assert times == sorted(SCHEDULE.respaced(250).index.tolist(), reverse=True)
        assert times[:2] == [999.0, 995.0]
        assert times[-2:] == [4.0, 0.0]
        assert drawn == list(range(249))


def test_steps_are_reported_latents_keep_their_type_and_no_samples_are_taken():
    def predict(x: Tensor, t: float) -> Tensor:
        return torch.cat([x, x], 1).float()

    for sampler in (ddpm_ancestral, ddim):
        done: list[int] = []
        for count in (2, 0):
            x = start(count).float()
            drawn = sampler(
                predict, x, SCHEDULE.respaced(3), lambda step, x=x: torch.zeros(x.shape), on_step=done.append
            )
            assert drawn.dtype == torch.float32
            assert drawn.shape == x.shape
        assert done == [1, 2, 3, 1, 2, 3]


def test_ancestral_sampling_needs_the_variance_channels():
    with pytest.raises(ConfigError, match="model.out_channels is 1"):
        ddpm_ancestral(lambda x, t: x, start(), SCHEDULE, _never)


@pytest.mark.slow
@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_ancestral_samples_of_a_gaussian_have_the_moments_that_its_linear_chain_has(v):
    """For one Gaussian every step is linear, so mean and variance of the samples follow from two plain recursions."""
    schedule, count = SCHEDULE.respaced(250), 40_000
    signal, index = schedule.signal.numpy(), schedule.index.tolist()
    mean, variance = 0.0, 1.0
    for place in reversed(range(250)):
        here, before = signal[place], signal[place - 1] if place else 1.0
        beta = 1 - here / before
        slope = math.sqrt(1 - here) / (here * 0.25 + 1 - here)  # eps = slope (x - sqrt(signal) 0.7)
        share = beta / math.sqrt(1 - here)
        mean = (mean - share * slope * (mean - math.sqrt(here) * 0.7)) / math.sqrt(1 - beta)
        variance *= (1 - share * slope) ** 2 / (1 - beta)
        if place:
            low = beta * (1 - before) / (1 - here)
            variance += beta ** ((v + 1) / 2) * low ** ((1 - v) / 2)
    x = _noises(torch.zeros(count, 1, 1, 1), 1)(0)
    drawn = ddpm_ancestral(chain_oracle(GAUSSIAN, SCHEDULE, v), x, schedule, _noises(x))
    assert index[-1] == 999
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert drawn.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
    assert mean == pytest.approx(0.7, abs=0.01)
    assert variance == pytest.approx(0.25, rel=0.08)  # the posterior's variance alone is known to be too little


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "bias"), [(1000, 0.005), (250, 0.015)])
def test_ancestral_samples_of_a_mixture_have_its_moments_and_its_distribution(steps, bias):
    mixture, count = Mixture(), 20_000
    x = _noises(torch.zeros(count, 1, 1, 1), 1)(0)
    drawn = ddpm_ancestral(chain_oracle(mixture, SCHEDULE), x, SCHEDULE.respaced(steps), _noises(x)).flatten()
    assert drawn.mean().item() == pytest.approx(mixture.mean, abs=bias + 4 * math.sqrt(mixture.variance / count))
    fourth = sum(
        share * ((c - mixture.mean) ** 4 + 6 * (c - mixture.mean) ** 2 * 0.16 + 3 * 0.16**2)
        for c, share in mixture.parts()
    )
    error = math.sqrt((fourth - mixture.variance**2) / count)
    assert drawn.var().item() == pytest.approx(mixture.variance, abs=4 * error + bias * mixture.variance)
    assert (drawn < 0).double().mean().item() == pytest.approx(0.3, abs=bias + 4 * math.sqrt(0.21 / count))
    quantiles = mixture.distribution(drawn.sort().values)
    assert (
        np.abs(quantiles - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count) + bias
    )  # Kolmogorov's bound at 0.1 %


def _fine(steps: int) -> Schedule:
    """A chain of more or fewer steps to the same noise."""
    return linear_schedule(steps, 0.1 / steps, 20 / steps)


def _exact_end(mixture: Mixture, x: Tensor, schedule: Schedule) -> Tensor:
    """Where the ODE of DDIM leads from the chain's end: the flow's own field from the time with the same noise-to-data
    ratio.
    """
    alpha, sigma = schedule.signal[-1].sqrt().item(), (1 - schedule.signal[-1]).sqrt().item()
    begin = sigma / (alpha + sigma)
    return heun(lambda x, s: begin * mixture.velocity(x, begin * s), x * (straight(begin).sigma / sigma), 4000)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", [GAUSSIAN, Mixture()], ids=["gaussian", "mixture"])
def test_ddim_converges_to_its_ode_at_first_order(mixture):
    """And so DDPM's oracle and the flow's field lead the same noise to the same points."""
    errors = []
    for steps in (100, 200, 400, 800):
        schedule = _fine(steps)
        drawn = ddim(chain_oracle(mixture, schedule), even_quantiles(40), schedule)
        errors.append((drawn - _exact_end(mixture, even_quantiles(40), schedule)).abs().mean().item())
    np.testing.assert_allclose(orders(errors), 1, atol=0.2)
    assert errors[-1] < 0.01


@pytest.mark.slow
def test_ddim_of_a_gaussian_ends_where_its_closed_form_says():
    alpha, sigma = SCHEDULE.signal[-1].sqrt().item(), (1 - SCHEDULE.signal[-1]).sqrt().item()
    exact = 0.7 + 0.5 * (start() - alpha * 0.7) / math.sqrt(alpha**2 * 0.25 + sigma**2)
    torch.testing.assert_close(_exact_end(GAUSSIAN, start(), SCHEDULE), exact, rtol=0, atol=1e-4)
    errors = [
        (ddim(chain_oracle(GAUSSIAN, SCHEDULE), start(), SCHEDULE.respaced(steps), _never) - exact).abs().max().item()
        for steps in (50, 100, 200)
    ]
    np.testing.assert_allclose(orders(errors), 1, atol=0.2)


def test_ddim_with_all_its_noise_is_the_chain_with_the_posteriors_variance():
    def predict(x: Tensor, t: float) -> Tensor:
        return torch.cat([0.9 * x + 0.1, -torch.ones_like(x)], 1)

    schedule = SCHEDULE.respaced(100)
    expected = ddpm_ancestral(predict, start(), schedule, _noises(start()))
    torch.testing.assert_close(ddim(predict, start(), schedule, _noises(start()), 1.0), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_ddim_with_some_noise_samples_the_same_mixture(eta):
    mixture, count = Mixture(), 10_000
    x = _noises(torch.zeros(count, 1, 1, 1), 1)(0)
    drawn = ddim(chain_oracle(mixture, SCHEDULE), x, SCHEDULE.respaced(250), _noises(x), eta).flatten()
    quantiles = mixture.distribution(drawn.sort().values)
    assert np.abs(quantiles - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count) + 0.015


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_ddim_refuses_an_eta_outside_its_range(eta):
    with pytest.raises(ConfigError, match="sample.eta"):
        ddim(chain_oracle(GAUSSIAN, SCHEDULE), start(), SCHEDULE, _never, eta)


def test_ddim_with_noise_needs_to_be_given_some():
    with pytest.raises(ValueError, match="give `noise`"):
        ddim(chain_oracle(GAUSSIAN, SCHEDULE), start(), SCHEDULE, eta=0.5)
