"""Compiled blocks compute what they compute without: forward, gradients, recomputation, and averaged weights in place
of their own.
"""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.func import functional_call

from diffmoe_ep.config import ComputeConfig, Config, ModelConfig, TrainConfig
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.trainer import build_model

MODEL = ModelConfig(
    input_size=4, in_channels=2, out_channels=2, hidden_size=16, num_blocks=4, num_heads=2, num_classes=3, num_experts=2
)


def busy(model: DiT) -> DiT:
    generator = torch.Generator().manual_seed(0)
    for parameter in initialize(model, 0).parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_blocks_are_the_same(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked = Config(
        model=MODEL, train=TrainConfig(precision="float32"), compute=ComputeConfig(compile=True, recompute="block")
    )
    plain, compiled = busy(DiT(MODEL)), busy(build_model(asked, Mesh()))
    compiled.channels = plain.channels
    torch._dynamo.reset()
    frames = counters["frames"]
    compiled_before, seen_before = frames["ok"], frames["total"]
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(3, 2, 4, 4, generator=generator), torch.rand(3, generator=generator), torch.tensor([0, 1, 3])
    gradients = []
    for model in (plain, compiled):
        output = model(x, t, y)
        (output.prediction.square().mean() + output.auxiliary).backward()
        gradients.append([output.prediction.detach(), *(parameter.grad for parameter in model.parameters())])
    kinds = 3  # attention halves, dense feed-forward networks and predictors, each compiled once for all blocks
    assert frames["ok"] - compiled_before == frames["total"] - seen_before == kinds
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    halved = {
        name: 0.5 * parameter.detach() for name, parameter in plain.named_parameters()
    }  # as averaged weights are drawn from
    with torch.no_grad():
        one, two = (functional_call(model.eval(), halved, (x, t, y)).prediction for model in (plain, compiled))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert (one - gradients[0][0]).abs().max() > 1e-3
