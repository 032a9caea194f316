"""What a run shows at its start."""

import pytest
import torch

from diffmoe_ep.config import Config, TrainConfig
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.progress import banner


@pytest.mark.parametrize(
    ("capability", "precision", "told"),
    [((9, 0), "bf16", ""), ((8, 0), "bf16", "waits"), ((10, 0), "bf16", "wrong gradients"), ((10, 0), "float32", "")],
)
def test_a_kernel_that_auto_leaves_out_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    lines = banner(Config(train=TrainConfig(precision=precision)), Mesh(device=torch.device("cuda", 0)), 0).splitlines()
    assert len(lines) == 2 + bool(told)
    assert told in lines[-1]
    assert len(banner(Config(), Mesh(), 0).splitlines()) == 2
