"""The picture of one training in several layouts."""

import json
from pathlib import Path

import pytest

from diffmoe_ep.config import ConfigError, dump, from_tree
from diffmoe_ep.verify.layouts import main, read


def run_folder(folder: Path, losses: list[float], ranks: int) -> Path:
    """What the picture needs of a run."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(from_tree({"parallel": {"expert_parallel": ranks, "zero_stage": 1}})))
    (folder / "environment.json").write_text(json.dumps({"ranks": ranks}))
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_largest_difference_is_drawn_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_folder(tmp_path / "one", [2.0, 1.0, 0.5], 1)
    two = run_folder(tmp_path / "two", [2.0, 1.25, 0.5], 2)
    assert read(two).differences(read(one)) == [0.0, 0.25, 0.0]
    assert read(two).label == "2 ranks, EP 2, ZeRO 1"
    main([str(tmp_path / "picture.png"), str(one), str(two)])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "2 layouts, 3 steps: largest difference 2.5e-01, median 0.0e+00" in capsys.readouterr().out


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run whose losses can be drawn"):
        read(tmp_path)
