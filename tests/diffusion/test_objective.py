import numpy as np
import pytest
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion import path
from diffmoe_ep.diffusion.ddpm import variational_bound
from diffmoe_ep.diffusion.objective import Ddpm, RectifiedFlow, objective_of


def _draws(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latent, eps = torch.randn(2, batch, 2, 4, 5, generator=generator)
    return latent, eps, torch.rand(batch, generator=generator)


def test_the_path_runs_from_data_to_noise_at_constant_velocity():
    latent, eps, t = _draws()
    assert torch.equal(path.noise(latent, eps, torch.zeros(3)), latent)
    assert torch.equal(path.noise(latent, eps, torch.ones(3)), eps)
    step = torch.full((3,), 0.25)
    moved = (path.noise(latent, eps, t + step) - path.noise(latent, eps, t)) / 0.25
    torch.testing.assert_close(moved, path.velocity(latent, eps), rtol=1e-4, atol=1e-5)


def test_noised_samples_and_targets_agree_with_numpy():
    latent, eps, u = _draws()
    noised = RectifiedFlow().noised(latent, eps, u)
    for i, t in enumerate(u.tolist()):
        expected = (1 - t) * latent[i].numpy().astype(np.float64) + t * eps[i].numpy()
        np.testing.assert_allclose(noised.x[i].numpy(), expected, atol=1e-6)
        assert noised.t[i] == u[i]
        np.testing.assert_array_equal(noised.target[i].numpy(), eps[i].numpy() - latent[i].numpy())


def test_the_loss_is_the_mean_squared_error_of_the_first_channels():
    latent, eps, u = _draws()
    flow = RectifiedFlow()
    noised = flow.noised(latent, eps, u)
    prediction = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1))  # twice the channels
    errors = (prediction.numpy()[:, :2].astype(np.float64) - noised.target.numpy()) ** 2
    np.testing.assert_allclose(flow.losses(prediction, noised).numpy(), errors.mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(flow.loss(prediction, noised).item(), errors.mean(), rtol=1e-6)
    assert flow.loss(noised.target, noised) == 0


def test_the_loss_of_a_low_precision_prediction_is_computed_in_float32():
    latent, eps, u = _draws()
    flow = RectifiedFlow()
    noised = flow.noised(latent, eps, u)
    prediction = noised.target.bfloat16().requires_grad_()
    loss = flow.loss(prediction, noised)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (prediction.float() - noised.target).square().mean())
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("objective", [RectifiedFlow(), Ddpm()])
def test_noised_inputs_are_float32_whatever_is_stored(objective):
    latent, eps, u = _draws()
    noised = objective.noised(latent.bfloat16(), eps.double(), u.double())
    assert {noised.x.dtype, noised.t.dtype, noised.target.dtype, noised.latent.dtype} == {torch.float32}


def test_ddpm_maps_u_to_whole_steps_each_equally_often():
    latent = torch.zeros(6, 1, 1, 1)
    u = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 0.9989999, 1 - 2**-24])
    assert Ddpm().noised(latent, latent, u).t.tolist() == [0, 0, 1, 500, 998, 999]
    middles = (torch.arange(3000) + 0.5) / 3000
    latent = torch.zeros(3000, 1, 1, 1)
    assert Ddpm().noised(latent, latent, middles).t.long().bincount().tolist() == [3] * 1000


def test_ddpm_noises_by_its_chain_and_aims_at_the_noise():
    latent, eps, _ = _draws()
    noised = Ddpm().noised(latent, eps, torch.tensor([0.0, 0.4567, 0.9999]))
    beta = np.linspace(1e-4, 0.02, 1000)
    for i, t in enumerate((0, 456, 999)):
        left = np.prod(1 - beta[: t + 1])
        expected = np.sqrt(left) * latent[i].numpy().astype(np.float64) + np.sqrt(1 - left) * eps[i].numpy()
        np.testing.assert_allclose(noised.x[i].numpy(), expected, atol=1e-6)
        assert noised.t[i] == t
    assert torch.equal(noised.target, eps)
    assert torch.equal(noised.latent, latent)


def test_the_ddpm_loss_is_the_error_of_the_noise_plus_the_bound():
    latent, eps, u = _draws()
    u[0] = 0.0005  # the first step, whose bound is the likelihood
    objective = Ddpm()
    noised = objective.noised(latent, eps, u)
    prediction = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1)) / 3 + torch.cat(
        [eps, torch.zeros_like(eps)], 1
    )
    predicted, v = prediction.double().chunk(2, 1)
    error = ((predicted - eps) ** 2).mean((1, 2, 3))
    bound = variational_bound(objective.schedule, noised.t.long(), latent, noised.x, predicted, v)
    losses = objective.losses(prediction, noised)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), (error + bound).numpy(), rtol=1e-5)
    np.testing.assert_allclose(objective.loss(prediction, noised).item(), losses.mean().item(), rtol=1e-6)


def test_the_bound_moves_the_variance_alone_and_the_error_the_noise_alone():
    latent, eps, u = _draws()
    u[0] = 0.0005
    objective = Ddpm()
    noised = objective.noised(latent, eps, u)
    prediction = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    objective.loss(prediction, noised).backward()
    gradient = prediction.grad
    assert gradient is not None
    error = 2 * (prediction.detach()[:, :2] - eps) / eps.numel()  # of the mean squared error, and nothing else
    torch.testing.assert_close(gradient[:, :2], error, rtol=1e-5, atol=1e-8)
    assert (gradient[:, 2:].flatten(1).abs().amax(1) > 0).all()
    assert gradient.isfinite().all()
    v = prediction.detach()[:, 2:].double().requires_grad_()
    variational_bound(
        objective.schedule, noised.t.long(), latent, noised.x, prediction.detach()[:, :2], v
    ).mean().backward()
    torch.testing.assert_close(gradient[:, 2:], v.grad.float(), rtol=1e-4, atol=1e-8)


def test_the_ddpm_gradient_of_a_wild_low_precision_prediction_is_finite():
    latent, eps, u = _draws()
    u[:] = torch.tensor([0.0005, 0.5, 0.9999])
    noised = Ddpm().noised(latent, eps, u)
    prediction = (100 * torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1))).bfloat16()
    prediction[:, 2:] /= 50
    prediction.requires_grad_()
    loss = Ddpm().loss(prediction, noised)
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_ddpm_needs_variance_channels():
    latent, eps, u = _draws()
    noised = Ddpm().noised(latent, eps, u)
    with pytest.raises(ConfigError, match="model.out_channels is 2"):
        Ddpm().loss(torch.zeros(3, 2, 4, 5), noised)


def test_the_kind_of_the_config_names_the_objective():
    assert objective_of("flow") == RectifiedFlow()
    assert isinstance(objective_of("ddpm"), Ddpm)
