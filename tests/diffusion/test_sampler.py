import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.ddpm import linear_schedule
from diffmoe_ep.diffusion.sampler import as_flow, dopri5, euler, heun
from diffusion.mixture import GAUSSIAN, Mixture, chain_oracle, even_quantiles, orders, start

needs_torchdiffeq = pytest.mark.skipif(
    importlib.util.find_spec("torchdiffeq") is None, reason="torchdiffeq is not installed (extra: sample)"
)
SOLVERS = pytest.mark.parametrize("solver", [euler, heun])


def _reference(mixture: Mixture, x: Tensor) -> Tensor:
    """The flow's map from noise to data, by classical fourth-order Runge-Kutta steps in NumPy's manner."""
    steps = 1000
    for step in range(steps):
        t, h = 1 - step / steps, -1 / steps
        a = mixture.velocity(x, t)
        b = mixture.velocity(x + h / 2 * a, t + h / 2)
        c = mixture.velocity(x + h / 2 * b, t + h / 2)
        d = mixture.velocity(x + h * c, t + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def test_the_flow_of_a_gaussian_is_linear_and_the_reference_solves_it():
    torch.testing.assert_close(_reference(GAUSSIAN, start()), 0.7 + 0.5 * start(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_a_solver_converges_to_the_exact_flow_at_its_order(solver, order):
    exact = 0.7 + 0.5 * start()
    errors = [(solver(GAUSSIAN.velocity, start(), steps) - exact).abs().max().item() for steps in (32, 64, 128, 256)]
    np.testing.assert_allclose(orders(errors), order, atol=0.1)
    assert errors[-1] < {1: 0.01, 2: 1e-4}[order]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_a_solver_converges_at_its_order_on_a_mixture_too(solver, order):
    mixture = Mixture()
    exact = _reference(mixture, even_quantiles(40))
    errors = [
        (solver(mixture.velocity, even_quantiles(40), steps) - exact).abs().mean().item() for steps in (250, 500, 1000)
    ]
    np.testing.assert_allclose(orders(errors), order, atol=0.2)


@SOLVERS
def test_samples_follow_the_mixture_that_the_velocity_belongs_to(solver):
    mixture = Mixture()
    samples = solver(mixture.velocity, even_quantiles(400), 256).flatten().sort().values
    assert np.abs(mixture.distribution(samples) - (np.arange(400) + 0.5) / 400).max() < 0.01


@SOLVERS
@pytest.mark.parametrize("steps", [1, 2, 7, 250])
def test_a_solver_is_exact_where_paths_are_straight(solver, steps):
    """With a single data point the field is linear in x and every path a straight line; at t = 0 it has no velocity, so
    there is no call.
    """
    target = 3.0

    def velocity(x: Tensor, t: float) -> Tensor:
        return (x - target) / t if t > 1e-9 else start() - target

    torch.testing.assert_close(solver(velocity, start(), steps), torch.full_like(start(), target), rtol=0, atol=1e-5)
    torch.testing.assert_close(solver(lambda x, t: torch.full_like(x, 2.0), start(), steps), start() - 2)


def test_euler_shows_uniform_times_from_noise_to_data_and_heun_both_ends_of_each_step():
    for solver, expected in ((euler, [1.0, 0.75, 0.5, 0.25]), (heun, [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0])):
        times: list[float] = []
        done: list[int] = []

        def velocity(x: Tensor, t: float, times: list[float] = times) -> Tensor:
            times.append(t)
            return torch.ones_like(x)

        result = solver(velocity, torch.zeros(5, 1, 2, 2), 4, done.append)
        assert times == expected
        assert done == [1, 2, 3, 4]
        assert torch.equal(result, -torch.ones(5, 1, 2, 2))
        assert result.dtype == torch.float32


@SOLVERS
def test_a_solver_keeps_float32_latents_under_a_low_precision_velocity_and_takes_no_samples(solver):
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert solver(lambda x, t: torch.ones_like(x).bfloat16(), x, 3).dtype == torch.float32
    assert solver(lambda x, t: x, torch.zeros(0, 1, 2, 2), 3).shape == (0, 1, 2, 2)


@SOLVERS
def test_a_solver_refuses_to_take_no_steps(solver):
    with pytest.raises(ConfigError, match="steps = 0"):
        solver(lambda x, t: x, start(), 0)


@pytest.mark.slow
@needs_torchdiffeq
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_dopri5_meets_its_tolerance(tolerance):
    exact = 0.7 + 0.5 * start()
    solved, evaluations = dopri5(GAUSSIAN.velocity, start(), tolerance, tolerance)
    assert (solved - exact).abs().max() < 20 * tolerance
    mixture = Mixture()
    solved, more = dopri5(mixture.velocity, even_quantiles(40), tolerance, tolerance)
    assert (solved - _reference(mixture, even_quantiles(40))).abs().mean() < 20 * tolerance
    assert more > evaluations > 7


@needs_torchdiffeq
def test_dopri5_counts_its_evaluations_stays_within_the_path_and_needs_more_for_less_error():
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return Mixture().velocity(x, t)

    counts = [dopri5(velocity, start().float(), tolerance, tolerance)[1] for tolerance in (1e-2, 1e-5)]
    assert sum(counts) == len(times)
    assert counts[0] < counts[1] < 250
    assert max(times) == 1
    assert 0 <= min(times) < 1e-6
    solved, none = dopri5(velocity, torch.zeros(0, 1, 2, 2))
    assert solved.shape == (0, 1, 2, 2)
    assert none == 0
    assert dopri5(velocity, start().float())[0].dtype == torch.float32


@needs_torchdiffeq
def test_dopri5_chooses_its_steps_for_the_batch_that_it_is_given():
    mixture = Mixture()
    together = dopri5(mixture.velocity, start(), 1e-3, 1e-3)[0]
    assert torch.equal(together, dopri5(mixture.velocity, start(), 1e-3, 1e-3)[0])
    assert not torch.equal(together[:2], dopri5(mixture.velocity, start()[:2], 1e-3, 1e-3)[0])


def test_dopri5_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ConfigError, match=r"diffmoe_ep\[sample\]"):
        dopri5(GAUSSIAN.velocity, start())


def test_a_noise_estimate_as_a_flow_is_the_flows_own_velocity():
    """DDPM's oracle, asked at the step with the same noise-to-data ratio, gives the same field at every time that the
    chain reaches.
    """
    mixture, schedule = Mixture(), linear_schedule()
    field = as_flow(chain_oracle(mixture, schedule), schedule)
    for t in np.linspace(0.0101, 0.993, 60).tolist():
        torch.testing.assert_close(field(start(), t), mixture.velocity(start(), t), rtol=1e-9, atol=1e-9)
    # Beyond the chain's ends, which are a hundredth of the time, it is close.
    for t, apart in ((0.0, 0.1), (0.005, 0.05), (0.997, 0.04), (1.0, 0.08)):
        torch.testing.assert_close(field(start(), t), mixture.velocity(start(), t), rtol=0, atol=apart)


def test_a_noise_estimate_as_a_flow_asks_the_trained_numbers_of_a_respaced_chain_in_order():
    schedule = linear_schedule().respaced(250)
    times: list[float] = []

    def epsilon(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.cat([x, x], 1)

    euler(as_flow(epsilon, schedule), start(), 50)
    assert times[0] == 999
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0
    at_step_four = torch.sigmoid(((1 - linear_schedule().signal[4]) / linear_schedule().signal[4]).log() / 2).item()
    as_flow(epsilon, schedule)(start(), at_step_four)
    assert times[-1] == pytest.approx(4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_flow_and_ddpm_lead_the_same_noise_to_the_same_points(solver, order):
    """The same mixture through DDPM's oracle and through the flow's own field: nearly the same samples from the same
    noise.
    """
    mixture, schedule = Mixture(), linear_schedule()
    converted = as_flow(chain_oracle(mixture, schedule), schedule)
    exact = _reference(mixture, even_quantiles(40))
    for steps in (125, 250, 500):
        own = solver(mixture.velocity, even_quantiles(40), steps)
        others = solver(converted, even_quantiles(40), steps)
        assert (own - others).abs().max() < 0.02  # what the chain's last step, not quite pure noise, makes of it
        assert (others - exact).abs().mean() < 0.01 + 3 * (own - exact).abs().mean()
    samples = others.flatten().sort().values
    assert np.abs(mixture.distribution(samples) - (np.arange(40) + 0.5) / 40).max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_ddpm_as_a_flow_converges_at_the_solvers_order_within_the_chain(solver, order):
    """From the chain's last step to its first, where the two fields are one and the same."""
    mixture, schedule = Mixture(), linear_schedule()
    converted = as_flow(chain_oracle(mixture, schedule), schedule)
    high, low = 0.99, 0.02

    def part(velocity):
        return lambda x, s: (high - low) * velocity(x, low + (high - low) * s)

    exact = heun(part(mixture.velocity), even_quantiles(40), 8000)
    errors = [
        (solver(part(converted), even_quantiles(40), steps) - exact).abs().mean().item() for steps in (250, 500, 1000)
    ]
    np.testing.assert_allclose(orders(errors), order, atol=0.2)


def test_beyond_the_chains_last_step_a_noise_estimate_is_evaluated_there():
    schedule = linear_schedule()
    field = as_flow(chain_oracle(Mixture(), schedule), schedule)
    last = 1 / (1 + (schedule.signal[-1] / (1 - schedule.signal[-1])).sqrt().item())
    assert last == pytest.approx(0.9937, abs=1e-4)
    torch.testing.assert_close(field(start(), 1.0), field(start() * last, last))
