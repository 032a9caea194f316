"""Compiled blocks compute what they compute without: forward, gradients, recomputation, and averaged weights in place
of their own.
"""

import shutil

import pytest
import torch
from torch.func import functional_call

from diffmoe_ep.config import ModelConfig
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import apply_compile, apply_recompute

MODEL = ModelConfig(
    input_size=4, in_channels=2, out_channels=2, hidden_size=16, num_blocks=2, num_heads=2, num_classes=3, num_experts=2
)


def busy(model: DiT) -> DiT:
    generator = torch.Generator().manual_seed(0)
    for parameter in initialize(model, 0).parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_blocks_are_the_same(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = busy(DiT(MODEL)), apply_recompute(busy(DiT(MODEL)), "block")
    apply_compile(compiled)
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(3, 2, 4, 4, generator=generator), torch.rand(3, generator=generator), torch.tensor([0, 1, 3])
    gradients = []
    for model in (plain, compiled):
        output = model(x, t, y)
        (output.prediction.square().mean() + output.auxiliary).backward()
        gradients.append([output.prediction.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    halved = {
        name: 0.5 * parameter.detach() for name, parameter in plain.named_parameters()
    }  # as averaged weights are drawn from
    with torch.no_grad():
        one, two = (functional_call(model.eval(), halved, (x, t, y)).prediction for model in (plain, compiled))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert (one - gradients[0][0]).abs().max() > 1e-3
