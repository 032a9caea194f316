"""No GPU is no problem; a GPU that torch does not see is one, and so are adapters that are down or not there."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from diffmoe_ep.doctor import devices

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"


def test_a_machine_without_gpus_is_well(tmp_path: Path) -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        found = [*devices.gpus(driver=tmp_path / "none"), *devices.nccl({}, []), *devices.infiniband(tmp_path / "none")]
    assert {one.state for one in found} == {"ok"}
    assert all(one.found.startswith("none") for one in found)


@pytest.mark.parametrize(("cuda", "state"), [(None, "note"), ("13.0", "problem")])
def test_a_gpu_that_torch_does_not_see(tmp_path: Path, cuda: str | None, state: str) -> None:
    (tmp_path / "version").write_text(DRIVER)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        mock.patch.object(torch.version, "cuda", cuda),
    ):
        (found,) = devices.gpus(driver=tmp_path / "version")
    assert found.state == state
    assert "470.57.02" in found.found
    assert cuda is None or cuda in found.remedy


def test_adapters_and_ports(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    up, down = devices.infiniband(tmp_path)
    assert (up.state, up.found) == ("ok", "mlx5_0:1 400 Gb/sec (4X NDR)")
    assert (down.state, down.found) == ("note", "not active: mlx5_1:1 (1: DOWN)")
    assert down.remedy.endswith("NCCL_IB_HCA=mlx5_0:1")


def test_settings_of_nccl() -> None:
    said = {"NCCL_IB_HCA": "bnxt", "NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"}
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda.nccl, "version", return_value=(2, 27, 5)),
    ):
        found = {one.name: one for one in devices.nccl(said, ["mlx5_0"])}
    assert {name: one.state for name, one in found.items()} == {
        "NCCL": "ok", "NCCL_P2P_DISABLE": "note", "NCCL_IB_HCA": "problem"
    }  # fmt: skip
    assert found["NCCL"].found == "2.27.5"
