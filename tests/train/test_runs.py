"""The runs that laws are stated over start alike on every device, and add in one order where that is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_ep.config import Config, ModelConfig
from diffmoe_ep.model.dit import DiT
from ranks import run
from train.runs import busy, config, trace


class Draws(TorchDispatchMode):
    """Fails where a tensor is drawn by another device's generator, as CUDA does (tensors without data take any)."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if generator is not None:
            self.count += 1
            assert generator.device.type == out.device.type, f"{function} draws on {out.device}"
        return out


def small(device: str) -> DiT:
    with torch.device(device):
        return DiT(ModelConfig(hidden_size=32, num_heads=2, num_blocks=2, num_experts=2))


def test_a_start_can_be_drawn_on_any_device() -> None:
    with Draws() as draws:
        busy(0.1)(small("meta"), 0)
    assert draws.count > 4
    with pytest.raises(AssertionError, match="draws on meta"), Draws():
        torch.empty(3, device="meta").normal_(generator=torch.Generator())


def deterministic(rank: int, given: Config) -> tuple[list[float], bool]:
    """A run's losses, and whether it computed deterministically; what it set is set back."""
    try:
        return trace(rank, given)["loss"], torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.slow
@pytest.mark.parametrize("topk", ["gather", "radix"])
def test_a_deterministic_run_is_the_same_run(digits: Path, topk: str) -> None:
    given = [
        config(digits / "train", Path("unused"), "train.steps=3", f"compute.topk={topk}", "compute.deterministic=" + on)
        for on in ("false", "true")
    ]
    (plain, off), (losses, on) = (run(2, deterministic, one)[0] for one in given)
    assert (off, on) == (False, True)
    assert losses == plain  # a CPU adds in one order anyhow
