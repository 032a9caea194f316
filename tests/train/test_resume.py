"""Law 4 for the same shape of run: interrupted and resumed, it continues to the bit; and a checkpoint loads at any
expert parallelism.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep import load_model
from diffmoe_ep.checkpoint import store
from diffmoe_ep.checkpoint.load import config_of, load_sharded
from diffmoe_ep.checkpoint.same_run import check_continues, check_same_data
from diffmoe_ep.config import Config, override
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.parallel.mesh import init_mesh
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.metrics import MACHINE_METRICS
from ranks import RankError, run
from train.runs import config, layout

pytestmark = pytest.mark.slow

SHAPES = [(1, 1, 0, "adamw"), (2, 1, 1, "sgd"), (2, 2, 2, "adamw"), (4, 2, 1, "adamw"), (4, 2, 0, "sgd")]


def until(rank: int, given: Config) -> None:
    """Train until the config's last step, taking up what the folder holds."""
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    training.Trainer(given, mesh, dataset, checkpoint).run()


def heard(rank: int, given: Config) -> str:
    """`until`, and what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        until(rank, given)
    return said.getvalue()


def told(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_METRICS} for line in lines]


def given_for(data: Path, folder: Path, kind: str, expert: int, zero: int) -> Config:
    sgd = ["train.optimizer.momentum=0.9", "train.optimizer.lr=0.01"] if kind == "sgd" else []
    made = config(
        data,
        folder,
        f"train.optimizer.kind={kind}",
        "train.steps=12",
        "checkpoint.every=5",
        "train.grad_accumulation=2",
        *sgd,
    )
    return layout(made, expert, zero)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_resumed_run_is_the_uncut_run(digits: Path, tmp_path: Path, shape: tuple[int, int, int, str]) -> None:
    world, expert, zero, kind = shape
    uncut = given_for(digits / "train", tmp_path / "uncut", kind, expert, zero)
    run(world, until, uncut)
    cut = dataclasses.replace(uncut, folder=str(tmp_path / "cut"))
    # A kill at step 8: the checkpoint of step 5 is the newest, and lines of steps 6 to 8 are already written, the last
    # one torn.
    shutil.copytree(tmp_path / "uncut", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-0000010")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-0000012")
    lines = (tmp_path / "uncut/metrics.jsonl").read_text().splitlines()
    (tmp_path / "cut/metrics.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:40])
    saved = given_for(digits / "train", tmp_path / "five", kind, expert, zero)
    run(world, until, dataclasses.replace(saved, train=dataclasses.replace(saved.train, steps=5)))
    shutil.copytree(
        tmp_path / "five/checkpoints/step-0000005", tmp_path / "cut/checkpoints/step-0000005", dirs_exist_ok=True
    )
    run(world, until, cut)
    assert told(tmp_path / "cut") == told(tmp_path / "uncut")
    assert len(told(tmp_path / "cut")) == 12
    final, other = (store.resolve(tmp_path / name) for name in ("uncut", "cut"))
    names = sorted(store.tensors(final))
    first, second = store.read(final, names), store.read(other, names)
    assert sum(name.startswith("optimizer.") for name in names) == (2 if kind == "adamw" else 1) * sum(
        name.startswith("ema.") for name in names
    )
    for name in names:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on four ranks, EP 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(4, until, given_for(digits / "train", folder, "adamw", 2, 2))
    return folder


def predict(rank: int, folder: Path, expert: int, weights: str) -> torch.Tensor:
    """Load over an expert group and predict in eval mode."""
    mesh = init_mesh(expert, 1, 1.0)
    checkpoint = store.resolve(folder)
    model = load_sharded(checkpoint, weights, config_of(checkpoint), mesh)  # type: ignore[arg-type]
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.linspace(0.1, 0.9, 6), torch.tensor([0, 1, 2, 3, 10, 10])).prediction


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_checkpoint_loads_at_any_expert_parallelism(trained: Path, weights: str) -> None:
    model = load_model(trained, weights=weights)  # type: ignore[arg-type]
    assert not model.training
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        single = model(x, torch.linspace(0.1, 0.9, 6), torch.tensor([0, 1, 2, 3, 10, 10])).prediction
    assert single.abs().max() > 0
    for world, expert in ((2, 2), (4, 4)):
        for prediction in run(world, predict, trained, expert, weights):
            torch.testing.assert_close(prediction, single, rtol=0, atol=1e-5)


def test_loaded_weights_differ_and_share_live_thresholds(trained: Path) -> None:
    ema, live = load_model(trained), load_model(trained / "checkpoints", weights="model")
    assert not torch.equal(ema.blocks[0].attention.qkv.weight, live.blocks[0].attention.qkv.weight)
    for one, other in zip(ema.moe_layers(), live.moe_layers(), strict=True):
        assert torch.equal(one.predictor.threshold, other.predictor.threshold)
        assert one.predictor.updates.item() == 12


def test_a_loaded_model_trains(trained: Path) -> None:
    """`model.train()` selects by pool and has an auxiliary loss, without a process group."""
    model = load_model(trained).train()
    output = model(torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([1, 2, 3, 4]))
    (output.prediction.square().mean() + output.auxiliary).backward()
    assert output.auxiliary.item() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert output.layers[0].processed.tolist() == [8] * 8  # 64 tokens, 8 experts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", "another model: model.hidden_size is 32 there and 64 here"),
        ("model.num_experts=16", "another model: model.num_experts is 8 there and 16 here"),
        ("pool.span=1", "pool.span is all there and 1 here"),
        ("seed=1", "trained with seed 0, this run has 1"),
        ("train.global_batch=48", "trained with train.global_batch 24"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(trained: Path, digits: Path, override: str, message: str) -> None:
    checkpoint = store.resolve(trained)
    other = config(digits / "train", trained, "train.grad_accumulation=2", override)
    with pytest.raises(store.CheckpointError, match=message):
        check_continues(checkpoint, other)


def test_other_data_are_refused(trained: Path, digits: Path) -> None:
    with pytest.raises(store.CheckpointError, match="trained on other data"):
        check_same_data(
            store.resolve(trained),
            config(digits / "heldout", trained, "train.grad_accumulation=2"),
            Dataset.open(digits / "heldout").fingerprint,
        )


def test_more_steps_and_another_rate_are_allowed(trained: Path, digits: Path) -> None:
    other = config(
        digits / "train",
        trained,
        "train.grad_accumulation=2",
        "train.steps=99",
        "train.optimizer.lr=1e-5",
        "parallel.expert_parallel=1",
    )
    check_continues(store.resolve(trained), other)


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 1)])
def test_a_step_that_ruins_the_weights_is_not_saved(digits: Path, tmp_path: Path, world: int, zero: int) -> None:
    """Its loss, of the weights before, is finite. The advised remedy works: the last checkpoint is there."""
    given = layout(config(digits / "train", tmp_path, "train.steps=2", "checkpoint.keep_last=1"), 1, zero)
    run(world, until, given)
    ruinous = override(given, ["train.steps=4", "checkpoint.every=1", "train.optimizer.lr=1e38"])
    with pytest.raises(RankError, match=r"step 3: its update left \S+ with values that are not finite; the run has"):
        run(world, until, ruinous)
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-0000002"]
    run(world, until, override(given, ["train.steps=4"]))
    assert store.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-0000004"


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(digits: Path, tmp_path: Path) -> None:
    uncut = given_for(digits / "train", tmp_path / "uncut", "adamw", 1, 0)
    run(1, until, uncut)
    damaged = dataclasses.replace(uncut, folder=str(shutil.copytree(tmp_path / "uncut", tmp_path / "damaged")))
    part = next((tmp_path / "damaged/checkpoints/step-0000012").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    (said,) = run(1, heard, damaged)
    assert told(tmp_path / "damaged") == told(tmp_path / "uncut")
    assert (tmp_path / "damaged/checkpoints/step-0000012.damaged").is_dir()
    assert "step-0000012 is damaged: its file" in said and "it is kept as step-0000012.damaged" in said
    assert "the run goes on from" in said and "step-0000010, the newest sound one" in said
