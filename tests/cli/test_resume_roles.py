"""What a changed key means at a resume, from the command line: an identity, a recipe and an execution key."""

import json
from pathlib import Path

import pytest

from cli.test_cli import call, train
from diffmoe_ep.checkpoint.store import read_meta, resolve
from diffmoe_ep.config import load
from ranks import run

pytestmark = pytest.mark.slow


def test_identity_is_refused_recipe_is_told_and_kept_execution_passes(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(1, call, *train(digits, folder, "train.optimizer.lr=1e-3"))[0][0] == 0
    assert not (folder / "recipe.jsonl").exists()

    flip = str(not load("configs/digits.yaml").data.flip).lower()
    code, _, err = run(1, call, *train(digits, folder, "train.steps=3", f"data.flip={flip}"))[0]
    before = "false" if flip == "true" else "true"
    assert code == 2
    assert f"was trained with data.flip {before}, this run has {flip}, so it would not be the same run; set" in err

    code, _, err = run(1, call, *train(digits, folder, "train.steps=3", "train.optimizer.lr=1e-4"))[0]
    assert code == 0
    told = "its recipe changes after step 2: train.steps 2 -> 3, train.optimizer.lr 0.001 -> 0.0001"
    assert told in err
    kept = [json.loads(line) for line in (folder / "recipe.jsonl").read_text().splitlines()]
    assert kept[1] == {"key": "train.optimizer.lr", "step": 2, "was": 0.001, "now": 0.0001}
    assert read_meta(resolve(folder))["meta"]["recipe"] == kept
    assert "# until step 2 this run had train.optimizer.lr 0.001\n" in (folder / "config.yaml").read_text()
    assert load(folder / "config.yaml").train.optimizer.lr == 1e-4
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]

    more = (
        "train.steps=4",
        "train.optimizer.lr=1e-4",
        "parallel.zero_stage=2",
        "data.prefetch=2",
        "compute.kernel=loop",
    )
    code, _, err = run(1, call, *train(digits, folder, *more))[0]
    assert code == 0
    assert "its recipe changes after step 3: train.steps 3 -> 4 (kept" in err
    assert len((folder / "recipe.jsonl").read_text().splitlines()) == 3
