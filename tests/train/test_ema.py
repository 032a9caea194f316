"""The averaged weights: the recursion, the ramp, live thresholds, and a forward that leaves the weights alone."""

import numpy as np
import pytest
import torch

from diffmoe_ep.config import EmaConfig, ModelConfig
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.train.ema import Ema
from train.runs import busy

SMALL = ModelConfig(
    input_size=4, in_channels=1, out_channels=1, hidden_size=8, num_heads=2, num_blocks=2, num_classes=3, num_experts=4
)


@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_is_the_recursion(ramp: bool) -> None:
    model = initialize(DiT(SMALL), 0)
    ema = Ema(model, EmaConfig(decay=0.8, ramp=ramp))
    expected, weight = (
        model.blocks[0].attention.qkv.weight.detach().double().numpy().copy(),
        model.blocks[0].attention.qkv.weight,
    )
    for step in range(1, 30):
        weight.data += 0.1 * step
        ema.update(step)
        decay = min(0.8, (1 + step) / (10 + step)) if ramp else 0.8
        expected = decay * expected + (1 - decay) * weight.detach().double().numpy()
        np.testing.assert_allclose(ema.tensors["blocks.0.attention.qkv.weight"].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("thresholds", ["live", "averaged"])
def test_which_thresholds_it_carries(thresholds: str) -> None:
    model = initialize(DiT(SMALL), 0).eval()
    ema = Ema(model, EmaConfig(decay=0.9, thresholds=thresholds))  # type: ignore[arg-type]
    predictor = model.moe_layers()[0].predictor
    for step in range(1, 4):
        predictor.update(torch.full((4,), 0.5))
        ema.update(step)
    carried = ema.tensors.get("blocks.1.ffn.predictor.threshold", predictor.threshold)
    if thresholds == "live":
        assert torch.equal(carried, predictor.threshold)
    else:
        assert (carried < predictor.threshold / 2).all()  # an average of an average: far too low early on


def test_the_forward_uses_the_average_and_leaves_the_weights() -> None:
    """Every averaged tensor takes part: the forward is that of a model that holds them all."""
    model = busy(0.3)(DiT(SMALL), 0).eval()
    ema = Ema(model, EmaConfig(decay=0.9))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ema.update(1)
    other = DiT(SMALL).eval()
    other.load_state_dict(model.state_dict() | ema.tensors)
    x, t, y = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(ema(x, t, y).prediction, other(x, t, y).prediction)
    assert not torch.allclose(ema(x, t, y).prediction, model(x, t, y).prediction, atol=1e-3)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
