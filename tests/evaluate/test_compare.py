"""Runs side by side: seeds of one setting are one row, named by what differs; means and spreads are those of the logged
numbers.
"""

import json
from pathlib import Path

import pytest

from cli.test_cli import call
from diffmoe_ep.config import ConfigError, dump, from_tree
from diffmoe_ep.evaluate.compare import compare

MODEL = {"hidden_size": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "input_size": 4, "num_classes": 3}


def run_of(folder: Path, losses: list[float], scores: dict[str, float] | None = None, **tree: object) -> Path:
    """A run's folder as training and evaluation leave it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(from_tree({"model": MODEL, "folder": str(folder)} | tree)))
    lines = [json.dumps({"step": 5 * number, "diffusion_loss": loss}) for number, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "diff')  # torn by a kill
    if scores:
        (folder / "scores").mkdir()
        (folder / "scores/scores.json").write_text(json.dumps(scores))
    return folder


def test_seeds_are_one_row_and_settings_are_named(tmp_path: Path) -> None:
    falling = [9.0] * 18
    one = run_of(
        tmp_path / "a",
        [*falling, 2.0, 4.0],
        {"accuracy": 0.5, "frechet": 10.0, "capacity": 0.5, "nearest": 1.0},
        seed=0,
    )
    two = run_of(
        tmp_path / "b",
        [*falling, 5.0, 7.0],
        {"accuracy": 0.9, "frechet": 20.0, "capacity": 0.7},
        seed=1,
        parallel={"expert_parallel": 2},
    )
    dense = run_of(tmp_path / "c", [1.0], model=MODEL | {"family": "dense"}, seed=7)
    diffmoe, other = compare([one, two, dense]).settings
    assert (diffmoe.name, diffmoe.seeds, diffmoe.steps) == ("model.family=diffmoe", (0, 1), (100, 100))
    assert (other.name, other.seeds, other.values["accuracy"]) == ("model.family=dense", (7,), ())
    assert diffmoe.values["loss"] == (3.0, 6.0)
    assert diffmoe.shown("loss", 2) == "4.50 ±1.50"
    assert (other.shown("loss", 1), other.shown("capacity", 1)) == ("1.0", "-")
    expert = 16 * 64 + 64 + 64 * 16 + 16
    assert diffmoe.parameters - diffmoe.activated == pytest.approx((4 - 0.6) * expert)  # of four experts C = 0.6 work
    assert other.activated == other.parameters
    code, out, _ = call(0, "compare", str(one), str(dense), "--json", str(tmp_path / "table.json"))
    assert code == 0
    assert "model.family=dense" in out and "0.500" in out
    assert json.loads((tmp_path / "table.json").read_text())["settings"][0]["values"]["frechet"] == [10.0]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.yaml, so it is no run"):
        compare([tmp_path])
    run_of(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match="has logged no step yet"):
        compare([tmp_path / "empty"])
