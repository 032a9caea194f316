import numpy as np
import torch

from diffmoe_ep.diffusion import path
from diffmoe_ep.diffusion.objective import RectifiedFlow, objective_of


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


def test_noised_inputs_are_float32_whatever_is_stored():
    latent, eps, u = _draws()
    noised = RectifiedFlow().noised(latent.bfloat16(), eps.double(), u.double())
    assert {noised.x.dtype, noised.t.dtype, noised.target.dtype} == {torch.float32}


def test_the_kind_of_the_config_names_the_objective():
    assert objective_of("flow") == RectifiedFlow()
