"""Versions against what the project requires, and providers by what is really there."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from diffmoe_ep.doctor import software
from diffmoe_ep.doctor.finding import Finding


def faults(findings: object) -> dict[str, Finding]:
    assert hasattr(findings, "__iter__")
    return {one.name: one for one in findings if one.state != "ok"}


def test_versions_are_those_that_are_required() -> None:
    assert faults(software.versions(["torch>=2", "numpy", "absent; extra == 'dev'"])) == {}
    found = faults(software.versions(["torch>=99", "no-such-thing>=1", "numpy"]))
    assert {name: one.state for name, one in found.items()} == {"torch": "problem", "no-such-thing": "problem"}
    assert found["torch"].found == f"{software._version('torch')}, and >=99 is wanted"
    assert "pip install 'no-such-thing>=1'" in found["no-such-thing"].remedy


def test_a_project_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "PROJECT", "no-such-project")
    assert faults(software.versions())["no-such-project"].state == "note"


def test_training_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_doctor.py").write_text("raise ImportError('libcudart.so.12: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = faults(software.imports("broken_for_doctor"))["training"]
    assert found.state == "problem"
    assert "libcudart.so.12" in found.found
    assert faults(software.imports("diffmoe_ep.config")) == {}


@pytest.mark.parametrize(
    ("files", "extension", "said"),
    [
        ([], False, "not NVIDIA's"),
        (["optimizers/fused_adam.py"], False, "has no CUDA extensions"),
        (["optimizers/fused_adam.py"], True, None),
    ],
)
def test_apex_is_nvidias_or_is_not_counted(tmp_path: Path, files: list[str], extension: bool, said: str | None) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    known = {"apex": SimpleNamespace(submodule_search_locations=[str(tmp_path)], origin=None)}
    if extension:
        known["amp_C"] = SimpleNamespace()
    with mock.patch.object(software, "find_spec", known.get):
        (found,) = software.apex()
    assert found.state == ("note" if said else "ok")
    assert said is None or said in found.found


def test_without_apex_torch_does_the_work() -> None:
    with mock.patch.object(software, "find_spec", return_value=None):
        (found,) = software.apex()
    assert found.state == "ok"
    assert found.found.startswith("none")


def test_grouped_matmul_is_tried() -> None:
    device = torch.device("cpu")
    assert software.grouped(device).state == "ok"
    with mock.patch.object(software, "grouped_mm", return_value=torch.zeros(48, 16)):
        assert software.grouped(device).state == "problem"
    with mock.patch.object(software, "grouped_mm", side_effect=RuntimeError("not on this device")):
        assert "not on this device" in software.grouped(device).found


def test_no_compiler() -> None:
    with mock.patch.object(software.shutil, "which", return_value=None):
        found = software.compiler(torch.device("cpu"))
    assert found.state == "note"
    assert "g++" in found.remedy


def test_packages_of_a_config() -> None:
    found = faults(software.extras({"torch": "everything", "no-such-thing": "log.tensorboard"}))
    assert list(found) == ["no-such-thing"]
    assert found["no-such-thing"].found == "not installed, but log.tensorboard needs it"
    assert sys.modules.get("no-such-thing") is None
