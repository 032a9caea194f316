"""Runs side by side: seeds of one setting are one row, named by what differs; means and spreads are those of the logged
numbers.
"""

import json
import os
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


def test_what_amounts_to_the_same_is_one_setting(tmp_path: Path) -> None:
    """Spellings, and keys without effect, are no difference; the number of steps is one."""
    large = {key: value for key, value in MODEL.items() if key not in ("hidden_size", "num_blocks", "num_heads")}
    runs = [
        run_of(tmp_path / "a", [1.0], model=large | {"size": "S"}, pool={"span": "all"}),
        run_of(tmp_path / "b", [2.0], model=large | {"num_blocks": 12, "top_k": 2}, pool={"span": 256}),
        run_of(tmp_path / "c", [3.0], model=large | {"size": "S"}, train={"optimizer": {"momentum": 0.9}}),
    ]
    (setting,) = compare(runs).settings
    assert (setting.name, setting.values["loss"]) == ("all runs", (1.0, 2.0, 3.0))
    longer = run_of(tmp_path / "d", [1.0], model=large | {"size": "S"}, train={"steps": 7})
    assert [setting.name for setting in compare([*runs, longer]).settings] == ["train.steps=100000", "train.steps=7"]


def test_every_setting_is_named_by_what_any_of_them_has(tmp_path: Path) -> None:
    plain = run_of(tmp_path / "plain", [1.0])
    changed = run_of(tmp_path / "changed", [1.0])
    (changed / "recipe.jsonl").write_text('{"key": "train.optimizer.lr", "step": 4, "was": 0.5, "now": 0.0001}\n')
    slow, fast = (
        run_of(tmp_path / f"sgd{m}", [1.0], train={"optimizer": {"kind": "sgd", "momentum": m}}) for m in (0.0, 0.9)
    )
    until = "train.optimizer.lr until step 4"
    assert [setting.name for setting in compare([plain, changed]).settings] == [f"{until}=-", f"{until}=0.5"]
    assert [setting.name for setting in compare([plain, slow, fast]).settings] == [
        "train.optimizer.kind=adamw",
        "train.optimizer.kind=sgd train.optimizer.momentum=0.0",
        "train.optimizer.kind=sgd train.optimizer.momentum=0.9",
    ]


def test_a_run_of_before_is_read_and_what_is_wrong_names_its_file(tmp_path: Path) -> None:
    old, new = run_of(tmp_path / "old", [1.0]), run_of(tmp_path / "new", [2.0])
    text = (old / "config.yaml").read_text()
    for before, now in (("batch", "global_batch"), ("blocks", "num_blocks"), ("rate", "lr"), ("hidden", "hidden_size")):
        text = text.replace(f" {now}:", f" {before}:")
    (old / "config.yaml").write_text(text)
    assert compare([old, new]).settings[0].values["loss"] == (1.0, 2.0)
    (old / "config.yaml").write_text(text + "strange: 3\n")
    with pytest.raises(ConfigError, match=r"old/config.yaml: unknown key strange; "):
        compare([old])
    (old / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"old/config.yaml is not YAML"):
        compare([old])


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.yaml, so it is no run"):
        compare([tmp_path])
    run_of(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match="has logged no step yet"):
        compare([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b"\xff\xfe\n", "holds lines that are no logged steps with a diffusion_loss"),
        ("metrics.jsonl", b'{"diffusion_loss": 1.0}\n', "holds lines that are no logged steps"),
        ("metrics.jsonl", b'{"step": 5}\n', "holds lines that are no logged steps"),
        ("metrics.jsonl", b'{"step": 5, "diffusion_loss": "x"}\n', "holds lines that are no logged steps"),
        ("metrics.jsonl", b"17\n", "holds lines that are no logged steps"),
        ("scores/scores.json", b"[" * 5000, "is no JSON .it is nested too deeply.; score the run anew"),
        ("scores/scores.json", b"7", "holds a int, not scores by name"),
        ("scores/scores.json", b'{"accuracy": "high"}', "accuracy is high, not a number"),
        ("recipe.jsonl", b'{"key": "seed"}\n', "holds lines that are no changes of a recipe"),
        ("recipe.jsonl", b'{"key": 5, "step": 1, "was": 1}\n', "holds lines that are no changes of a recipe"),
    ],
)
def test_a_run_with_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = run_of(tmp_path / "a", [1.0, 2.0], {"accuracy": 0.5})
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{folder / name}:? {message}"):
        compare([folder])


def test_a_pipe_in_place_of_a_run_s_file_is_named(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "a", [1.0, 2.0])
    os.mkfifo(folder / "recipe.jsonl")
    with pytest.raises(ConfigError, match=r"recipe\.jsonl cannot be read \(it is a named pipe, not a file\)"):
        compare([folder])
