"""What can only be seen on a CUDA device; every test here skips itself without one."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.config import ModelConfig, PoolConfig
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.pool import Pools, topk_per_expert
from ranks import run, take_down
from train.runs import config, trace

pytestmark = pytest.mark.gpu
MODEL = ModelConfig(hidden_size=32, num_heads=2, num_experts=8)


def layer(dtype: torch.dtype) -> MoELayer:
    made = MoELayer(MODEL, PoolConfig())
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    made.predictor.update(torch.linspace(0.3, 0.8, 8))
    return made.to(dtype)


def passed(made: MoELayer, device: str) -> list[torch.Tensor]:
    """Output and all gradients of one forward and backward."""
    made = made.to(device)
    x = (
        torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(5))
        .to(device, made.router.weight.dtype)
        .requires_grad_()
    )
    y, report = made(x)
    loss = y.square().sum() + (report.loss if report.loss is not None else 0.0)
    return [y.detach(), *torch.autograd.grad(loss, [x, *made.parameters()], allow_unused=not made.training)]


def test_selection_is_the_cpus() -> None:
    scores = torch.randint(0, 9, (4096, 16), generator=torch.Generator().manual_seed(0)).float() / 9
    expected, found = (
        topk_per_expert(scores, 256, Pools(), extra=scores),
        topk_per_expert(scores.cuda(), 256, Pools(), extra=scores.cuda()),
    )
    assert torch.equal(found.chosen.cpu(), expected.chosen)
    assert found.kth_value is not None
    assert expected.kth_value is not None
    assert torch.equal(found.kth_value.cpu(), expected.kth_value)


@pytest.mark.parametrize("mode", ["train", "threshold", "count", "topk"])
def test_the_layer_is_the_cpus(mode: Any) -> None:
    made = layer(torch.float64).train(mode == "train")
    made.rule = InferenceRule("count" if mode == "train" else mode)
    expected = passed(made, "cpu")
    for found, wanted in zip(passed(made, "cuda"), expected, strict=True):
        assert found is None if wanted is None else torch.allclose(found.cpu(), wanted, rtol=0, atol=1e-9)


def test_the_same_run_gives_the_same_bits() -> None:
    made = layer(torch.float32).train()
    first, second = passed(made, "cuda"), passed(made, "cuda")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_training_step_tells_its_noise(digits: Path, tmp_path: Path) -> None:
    """Two runs of a few steps in float32: attention's backward may add in no fixed order, all else is fixed."""
    runs = []
    for _ in range(2):
        runs.append(trace(0, config(digits / "train", tmp_path, "train.steps=5", "parallel.zero_stage=0")))
        take_down()
    assert max(abs(one - other) for one, other in zip(runs[0]["loss"], runs[1]["loss"], strict=True)) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_deterministic_run_gives_the_same_bits(digits: Path, precision: str, tmp_path: Path) -> None:
    settings = ("train.steps=5", "compute.deterministic=true", f"train.precision={precision}")
    runs = []
    try:
        for _ in range(2):
            runs.append(trace(0, config(digits / "train", tmp_path, *settings)))
            take_down()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert runs[0]["loss"] == runs[1]["loss"] and runs[0]["grad_norm"] == runs[1]["grad_norm"]
    assert all(torch.equal(runs[0]["ema"][name], tensor) for name, tensor in runs[1]["ema"].items())


def test_one_host_synchronisation_a_layer() -> None:
    made, x = layer(torch.float32).train().cuda(), torch.randn(4, 64, 32, device="cuda")
    made(x)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in seen if "synchroniz" in str(warning.message)]) <= 1


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_follows_the_cpu(digits: Path, precision: str, tmp_path: Path) -> None:
    """The same run as on the CPU: to float32's rounding in float32, closely in bf16."""
    cpu = run(1, trace, config(digits / "train", tmp_path, "train.precision=float32"))[0]
    gpu = trace(0, config(digits / "train", tmp_path, f"train.precision={precision}", "parallel.zero_stage=0"))
    take_down()
    worst = max(abs(one - other) for one, other in zip(gpu["loss"], cpu["loss"], strict=True))
    print(json.dumps({"precision": precision, "largest loss difference": worst}))
    assert worst < (1e-4 if precision == "float32" else 5e-2)
