"""The runs that laws are stated over start alike on every device."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_ep.config import ModelConfig
from diffmoe_ep.model.dit import DiT
from train.runs import busy


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
