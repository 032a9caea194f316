"""The predictor's loss, the thresholds' dynamics and the rules of inference."""

import numpy as np
import pytest
import torch

from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule


def test_loss_is_the_cross_entropy_of_the_choice() -> None:
    predictor = CapacityPredictor(8, 3, 0.95)
    logits, chosen = torch.randn(20, 3, dtype=torch.float64), torch.rand(20, 3) < 0.4
    p, o = 1 / (1 + np.exp(-logits.numpy())), chosen.numpy()
    expected = -(o * np.log(p) + (1 - o) * np.log(1 - p)).sum() / (20 * 3)
    assert predictor.loss(logits, chosen).item() == pytest.approx(expected, rel=1e-12)


def test_the_loss_does_not_reach_the_tokens() -> None:
    predictor = CapacityPredictor(8, 3, 0.95)
    tokens = torch.randn(5, 8, requires_grad=True)
    predictor.loss(predictor(tokens), torch.ones(5, 3, dtype=torch.bool)).backward()
    assert tokens.grad is None
    assert all(parameter.grad is not None for parameter in predictor.parameters())


def test_thresholds_follow_the_simulation() -> None:
    predictor, quantiles = CapacityPredictor(4, 6, 0.95), np.random.default_rng(0).random((100, 6)).astype(np.float32)
    tau = np.zeros(6)
    for step, quantile in enumerate(quantiles, start=1):
        predictor.update(torch.from_numpy(quantile))
        tau = 0.95 * tau + 0.05 * quantile
        np.testing.assert_allclose(predictor.threshold.numpy(), tau, rtol=1e-5)
        np.testing.assert_allclose(predictor.threshold_for(InferenceRule()).numpy(), tau / (1 - 0.95**step), rtol=1e-5)
    assert predictor.updates.item() == 100


def test_the_first_update_is_unbiased() -> None:
    predictor = CapacityPredictor(4, 2, 0.95)
    predictor.update(torch.tensor([0.3, 0.8]))
    torch.testing.assert_close(predictor.threshold_for(InferenceRule()), torch.tensor([0.3, 0.8]))
    torch.testing.assert_close(predictor.threshold_for(InferenceRule(threshold="raw")), torch.tensor([0.015, 0.04]))


def test_a_token_at_the_threshold_is_not_taken() -> None:
    predictor = CapacityPredictor(4, 1, 0.95)
    logits = torch.tensor([[0.0], [1e-3], [-1e-3]])  # sigmoid(0) is exactly one half
    assert predictor.over_threshold(logits, InferenceRule(threshold=0.5))[:, 0].tolist() == [False, True, False]
