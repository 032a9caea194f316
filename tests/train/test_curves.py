"""The curves of a run: four panels, whatever was logged."""

import json
import sys

import numpy as np
import pytest

from diffmoe_ep.config import ConfigError
from diffmoe_ep.train.curves import curves

Image = pytest.importorskip("PIL.Image")


def _read(path):
    return np.asarray(Image.open(path))


def _log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _record(step: int) -> dict[str, object]:
    return {
        "step": step,
        "samples": step * 128,
        "loss": 3 / step + 1,
        "diffusion_loss": 1 / step,
        "predictor_loss": 1 / step + 1,
        "grad_norm": 1.0,
        "lr": 1e-3 * (1 - step / 40),
        "capacity": 1 + 2 / step,
        "capacity_per_layer": [1 + 2 / step, 0.5 + 1 / step],
        "samples_per_second": 500.0 + step % 7,
        "threshold": 0.3,
    }


def _ink(path) -> list[float]:
    """How much of each quarter of the figure is colored (not white, grey or black)."""
    picture = _read(path)[:, :, :3].astype(int)
    colored = np.ptp(picture, axis=2) > 60
    height, width = colored.shape[0] // 2, colored.shape[1] // 2
    return [colored[top : top + height, left : left + width].mean() for top in (0, height) for left in (0, width)]


@pytest.mark.slow
def test_curves_fill_four_panels(tmp_path):
    pytest.importorskip("matplotlib")
    curves(_log(tmp_path / "metrics.jsonl", map(_record, range(1, 41))), tmp_path / "curves.png")
    assert _read(tmp_path / "curves.png").shape[:2] == (825, 1320)
    assert min(_ink(tmp_path / "curves.png")) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{"loss"}, {"loss", "lr"}, set()])
def test_curves_of_a_dense_run_leave_panels_empty(tmp_path, kept):
    pytest.importorskip("matplotlib")
    records = [
        {key: value for key, value in _record(step).items() if key in {"step", "samples", *kept}}
        for step in range(1, 41)
    ]
    curves(_log(tmp_path / "metrics.jsonl", records), tmp_path / "curves.png")
    loss, capacity, lr, speed = _ink(tmp_path / "curves.png")
    assert capacity == speed == 0
    assert (loss > 0.001) == ("loss" in kept)
    assert (lr > 0.001) == ("lr" in kept)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2, 11])
def test_curves_can_be_drawn_early(tmp_path, count):
    pytest.importorskip("matplotlib")
    curves(_log(tmp_path / "metrics.jsonl", map(_record, range(1, count + 1))), tmp_path / "curves.png")
    assert (min(_ink(tmp_path / "curves.png")[:2]) > 0) == (count > 0)


@pytest.mark.slow
def test_steps_logged_again_after_a_resume_replace_the_first_and_torn_lines_do_not_count(tmp_path):
    pytest.importorskip("matplotlib")
    steps = [_record(step) for step in range(1, 21)]
    curves(_log(tmp_path / "clean.jsonl", steps), tmp_path / "clean.png")
    torn = _log(tmp_path / "torn.jsonl", [*steps[:9], {**_record(10), "lr": 1.0}, {**_record(11), "lr": 1.0}])
    torn.write_text(
        torn.read_text() + '{"step": 12, "sam\n' + "".join(json.dumps(record) + "\n" for record in steps[9:])
    )
    curves(torn, tmp_path / "torn.png")
    assert (_read(tmp_path / "clean.png") == _read(tmp_path / "torn.png")).all()


def test_a_missing_library_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"matplotlib.*pip install 'diffmoe_ep\[log\]'"):
        curves(_log(tmp_path / "metrics.jsonl", []), tmp_path / "curves.png")
