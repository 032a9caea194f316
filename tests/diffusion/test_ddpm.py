import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.ddpm import (
    data_of,
    discretized_log_likelihood,
    halves,
    linear_schedule,
    log_variance,
    normal_divergence,
    posterior_mean,
    variational_bound,
)

SCHEDULE = linear_schedule()


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Betas, signal, and the signal before each step, one by one."""
    beta = np.array([1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)])
    signal, left = [], 1.0
    for value in beta:
        left *= 1 - value
        signal.append(left)
    return beta, np.array(signal), np.array([1.0, *signal[:-1]])


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_chain_has_a_thousand_steps_of_linear_betas_in_float64():
    beta, signal, previous = _tables()
    assert len(SCHEDULE) == 1000
    assert SCHEDULE.signal.dtype == SCHEDULE.beta.dtype == torch.float64
    np.testing.assert_allclose(SCHEDULE.beta.numpy(), beta, rtol=1e-10)
    np.testing.assert_allclose(SCHEDULE.signal.numpy(), signal, rtol=1e-12)
    variance = beta * (1 - previous) / (1 - signal)
    np.testing.assert_allclose(SCHEDULE.posterior_variance.numpy(), variance, rtol=1e-9)
    low, high = SCHEDULE.log_variance_bounds
    np.testing.assert_allclose(low.numpy(), np.log(np.maximum(variance, variance[1])), rtol=1e-9)
    np.testing.assert_allclose(high.numpy(), np.log(beta), rtol=1e-9)
    assert signal[-1] == pytest.approx(4.0e-5, rel=0.02)


def test_the_posterior_is_bayes_rule():
    """p(x_{t-1} | x_t, x_0) from the two normal factors: precisions add, and so do precision-weighted means."""
    beta, _, previous = _tables()
    for step in (1, 10, 500, 999):
        x, latent = 0.7, -0.4
        precision = (1 - beta[step]) / beta[step] + 1 / (1 - previous[step])
        mean = (
            math.sqrt(1 - beta[step]) * x / beta[step] + math.sqrt(previous[step]) * latent / (1 - previous[step])
        ) / precision
        number = torch.tensor([step])
        tensors = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (x, latent))
        assert posterior_mean(SCHEDULE, number, *tensors).item() == pytest.approx(mean, rel=1e-9)
        assert SCHEDULE.posterior_variance[step].item() == pytest.approx(1 / precision, rel=1e-9)


def test_the_data_come_back_from_their_noise():
    latent, eps, step = _draw(0, 4, 1, 2, 2), _draw(1, 4, 1, 2, 2), torch.tensor([0, 3, 500, 999])
    signal = SCHEDULE.signal[step].view(4, 1, 1, 1)
    x = signal.sqrt() * latent + (1 - signal).sqrt() * eps
    torch.testing.assert_close(data_of(SCHEDULE, step, x, eps), latent, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior_mean(SCHEDULE, step[:1], x[:1], latent[:1]), latent[:1])


def test_v_places_the_log_variance_between_posterior_and_beta():
    step = torch.tensor([0, 1, 400, 999])
    low, high = (table[step].view(4, 1, 1, 1) for table in SCHEDULE.log_variance_bounds)
    torch.testing.assert_close(log_variance(SCHEDULE, step, -torch.ones(4, 1, 1, 1)), low)
    torch.testing.assert_close(log_variance(SCHEDULE, step, torch.ones(4, 1, 1, 1)), high)
    torch.testing.assert_close(log_variance(SCHEDULE, step, torch.zeros(4, 1, 1, 1)), (low + high) / 2)


def test_250_of_1000_keep_both_ends_and_are_spread_evenly():
    short = SCHEDULE.respaced(250)
    index = short.index.tolist()
    assert len(index) == len(set(index)) == 250
    assert index[:6] == [0, 4, 8, 12, 16, 20]
    assert index[-2:] == [995, 999]
    assert set(np.diff(index)) == {4, 5}
    assert max(abs(kept - number * 999 / 249) for number, kept in enumerate(index)) <= 0.5
    assert torch.equal(short.signal, SCHEDULE.signal[short.index])
    torch.testing.assert_close((1 - short.beta).cumprod(0), short.signal, rtol=1e-12, atol=0)
    assert SCHEDULE.respaced(1000).index.tolist() == list(range(1000))
    assert SCHEDULE.respaced(2).index.tolist() == [0, 999]
    assert SCHEDULE.respaced(1).index.tolist() == [999]
    assert SCHEDULE.respaced(1).log_variance_bounds[0].isfinite().all()
    assert short.respaced(50).index[[0, -1]].tolist() == [0, 999]  # the model still gets trained numbers


# Of 1000 steps: the count that is kept -> those of an exact stride that the published one replaces, and by which.
HALFWAY = {count: {500: 499} for count in (21, 23, 27, 35, 39, 45, 47, 53, 59, 999)} | {43: {500: 499, 832: 833}}


@pytest.mark.parametrize("count", HALFWAY)
def test_a_stride_is_added_up_in_floating_point_as_published(count):
    """Where a sum should lie halfway between two steps, its rounding decides."""
    exact = [round(Fraction(number * 999, count - 1)) for number in range(count)]
    kept = SCHEDULE.respaced(count).index.tolist()
    assert kept == [HALFWAY[count].get(step, step) for step in exact]
    sums = np.concatenate([[0.0], np.cumsum(np.full(count - 1, 999 / (count - 1)))])
    assert kept == np.rint(sums).astype(int).tolist()


@pytest.mark.slow
def test_283_odd_counts_keep_other_steps_than_an_exact_stride_by_one_at_most():
    others = []
    for count in range(2, 1001):
        exact = [round(Fraction(number * 999, count - 1)) for number in range(count)]
        moved = np.abs(np.subtract(SCHEDULE.respaced(count).index.tolist(), exact)).max()
        assert moved <= 1
        if moved:
            others.append(count)
    assert len(others) == 283
    assert all(count % 2 for count in others)


@pytest.mark.parametrize("count", [10, 25, 50, 100, 200, 250, 500, 1000])
def test_usual_counts_keep_what_an_exact_stride_keeps(count):
    exact = [round(Fraction(number * 999, count - 1)) for number in range(count)]
    assert SCHEDULE.respaced(count).index.tolist() == exact


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_that_the_chain_does_not_have_are_an_error(steps):
    with pytest.raises(ConfigError, match=f"sample.steps is {steps}"):
        SCHEDULE.respaced(steps)


def test_a_prediction_without_variance_channels_is_an_error_that_names_the_key():
    eps, v = halves(torch.arange(8.0).view(1, 8, 1, 1), 4)
    assert eps.flatten().tolist() == [0, 1, 2, 3]
    assert v.flatten().tolist() == [4, 5, 6, 7]
    for channels in (4, 6, 12):
        with pytest.raises(ConfigError, match=f"model.out_channels is {channels}.*model.out_channels=8"):
            halves(torch.zeros(2, channels, 2, 2), 4)


def test_the_divergence_of_gaussians_by_hand_and_by_torch():
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert normal_divergence(zero, zero, zero, zero).item() == 0
    assert normal_divergence(one * 3, zero, zero, zero).item() == 4.5  # N(3, 1) from N(0, 1)
    assert normal_divergence(zero, zero, zero, one * math.log(4)).item() == pytest.approx(
        math.log(2) - 3 / 8
    )  # N(0, 1) from N(0, 4)
    mean, log_var, other_mean, other_log_var = _draw(0, 4, 50)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_var / 2).exp()),
        torch.distributions.Normal(other_mean, (other_log_var / 2).exp()),
    )
    torch.testing.assert_close(normal_divergence(mean, log_var, other_mean, other_log_var), expected)


@settings(deadline=None, max_examples=60)
@given(mean=st.floats(-1.5, 1.5), deviation=st.floats(1e-3, 3))
def test_the_probabilities_of_256_levels_sum_to_one(mean, deviation):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log = discretized_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(deviation))
    )
    assert log.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_probability_of_a_level_is_the_normal_mass_around_it():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, deviation = 0.1, 0.3

    def below(x: float) -> float:
        return (1 + math.erf((x - mean) / deviation / math.sqrt(2))) / 2

    expected = [below(level + 1 / 255) - below(level - 1 / 255) for level in levels.tolist()]
    expected[0], expected[-1] = below(levels[0].item() + 1 / 255), 1 - below(levels[-1].item() - 1 / 255)
    log = discretized_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(deviation))
    )
    np.testing.assert_allclose(log.exp().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_values_beyond_0_999_belong_to_the_outer_levels_and_those_within_to_their_own(sign):
    """Latents are no pixels: their values lie between the levels too, and outside [-1, 1]."""
    values = [0.99, 0.995, 0.996, 1 - 1 / 255, 0.9961, 0.998, 0.9989, 0.999, 0.9991, 1.0, 1.1, 1.5, 4.0]
    deviation = 0.02
    for mean in (0.95, 1.0, 1.2, 3.9):

        def beyond(x: float, mean: float = mean) -> float:  # erfc is accurate in both tails
            return math.erfc((x - mean) / deviation / math.sqrt(2)) / 2

        latent = torch.tensor(values, dtype=torch.float64) * sign
        log_var = torch.full_like(latent, 2 * math.log(deviation)).requires_grad_()
        log = discretized_log_likelihood(latent, torch.full_like(latent, mean * sign), log_var)
        (gradient,) = torch.autograd.grad(log.sum(), log_var)
        for place, value in enumerate(values):
            lower, upper = (value - 1 / 255 - mean) / deviation, (value + 1 / 255 - mean) / deviation
            mass = beyond(value - 1 / 255) - (beyond(value + 1 / 255) if value <= 0.999 else 0.0)
            if mass < 1e-250 or (value <= 0.999 and upper < -5):
                continue  # a difference of two numbers near 1 says nothing
            assert log[place].item() == pytest.approx(math.log(mass), rel=1e-9, abs=1e-9), (value, mean)
            density = [z * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (lower, upper)]
            slope = (density[0] - (density[1] if value <= 0.999 else 0.0)) / mass / 2
            assert gradient[place].item() == pytest.approx(slope, rel=1e-7, abs=1e-9), (value, mean)


def test_the_likelihood_and_its_gradient_stay_finite_far_in_the_tails():
    latent = torch.linspace(-4, 4, 41, dtype=torch.float64)
    log_var = torch.full_like(latent, math.log(5e-5)).requires_grad_()
    log = discretized_log_likelihood(latent, torch.zeros_like(latent), log_var)
    inner = latent[(latent.abs() > 0.2) & (latent.abs() < 0.99)]
    leading = -((inner.abs() - 1 / 255) ** 2) / 1e-4  # the nearer edge's exponent
    np.testing.assert_allclose(
        log[(latent.abs() > 0.2) & (latent.abs() < 0.99)].detach().numpy(), leading.numpy(), rtol=0.02
    )
    log.sum().backward()
    assert log.isfinite().all()
    assert log_var.grad.isfinite().all()
    assert (log_var.grad[latent.abs() > 0.2] > 0).all()  # where data are unlikely, more variance helps


def test_the_bound_agrees_with_a_plain_formula_in_numpy():
    beta, signal, previous = _tables()
    steps = [0, 1, 7, 400, 999, 0]
    step = torch.tensor(steps)
    latent = (_draw(0, 6, 2, 3, 3) / 2).clamp(-1, 1)
    noise, off, v = _draw(1, 6, 2, 3, 3), _draw(2, 6, 2, 3, 3) / 5, _draw(3, 6, 2, 3, 3).clamp(-1, 1)
    root = torch.from_numpy(signal[steps]).view(6, 1, 1, 1)
    x = root.sqrt() * latent + (1 - root).sqrt() * noise
    bound = variational_bound(SCHEDULE, step, latent, x, noise + off, v)
    assert bound.dtype == torch.float64
    for row, t in enumerate(steps):
        data, here, eps, spread = (tensor[row].numpy() for tensor in (latent, x, noise + off, v))
        # the model's mean in the form x_t - beta / sqrt(1 - signal) eps
        mean = (here - beta[t] / math.sqrt(1 - signal[t]) * eps) / math.sqrt(1 - beta[t])
        lowest = beta[max(t, 1)] * (1 - previous[max(t, 1)]) / (1 - signal[max(t, 1)])
        variance = beta[t] ** ((spread + 1) / 2) * lowest ** ((1 - spread) / 2)
        if t:
            true = (math.sqrt(previous[t]) * beta[t] * data + math.sqrt(1 - beta[t]) * (1 - previous[t]) * here) / (
                1 - signal[t]
            )
            nats = 0.5 * (np.log(variance / lowest) + (lowest + (true - mean) ** 2) / variance - 1)
        else:
            erf = np.vectorize(math.erf)
            upper = np.where(data >= 1, np.inf, data + 1 / 255)
            lower = np.where(data <= -1, -np.inf, data - 1 / 255)
            nats = -np.log(
                (erf((upper - mean) / np.sqrt(2 * variance)) - erf((lower - mean) / np.sqrt(2 * variance))) / 2
            )
        assert bound[row].item() == pytest.approx(nats.mean() / math.log(2), rel=1e-6)


def test_the_bound_of_the_true_step_back_is_zero():
    """With the true noise and v = -1 the model's step is the posterior itself, but for the first one, which is the
    data's likelihood.
    """
    latent, noise, step = _draw(0, 3, 1, 2, 2).clamp(-1, 1), _draw(1, 3, 1, 2, 2), torch.tensor([1, 500, 999])
    root = SCHEDULE.signal[step].view(3, 1, 1, 1)
    x = root.sqrt() * latent + (1 - root).sqrt() * noise
    assert variational_bound(SCHEDULE, step, latent, x, noise, -torch.ones_like(latent)).abs().max() < 1e-9
    assert (variational_bound(SCHEDULE, step, latent, x, noise, torch.zeros_like(latent)) > 0).all()
