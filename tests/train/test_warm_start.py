"""Starting from another run's weights: at any layout the same bits, once only, thresholds carried, and a chain that can
be read.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep import load_model
from diffmoe_ep.checkpoint import store
from diffmoe_ep.checkpoint.exported import save_exported
from diffmoe_ep.checkpoint.load import config_of, data_info_of
from diffmoe_ep.config import Config, ConfigError, override
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.diffusion.objective import objective_of
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.metrics import MACHINE_METRICS
from diffmoe_ep.train.warm_start import match
from ranks import RankError, run
from train.runs import config, layout

pytestmark = pytest.mark.slow

STEPS = 3


def until(rank: int, given: Config) -> None:
    """Train until the config's last step, taking up what the folder holds."""
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    training.Trainer(given, mesh, dataset, checkpoint).run()


def begun(rank: int, given: Config, steps: int) -> dict[str, Any]:
    """Start a run, go `steps` steps, and tell what this rank holds then."""
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    trainer = training.Trainer(given, mesh, dataset, checkpoint)
    losses = [trainer.measure(trainer.train_step(training.Clock(0)))["loss"] for _ in range(steps)]
    trainer.stream.close()
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    ema = {name: tensor.clone() for name, tensor in trainer.ema.tensors.items()}
    return {
        "model": state,
        "ema": ema,
        "losses": losses,
        "expert": mesh.expert.rank,
        "line": trainer.warm_start.source_line(),
    }


@pytest.fixture(scope="module")
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on two ranks, EP 2, whose averaged and live weights differ."""
    folder = tmp_path_factory.mktemp("start") / "source"
    given = config(
        digits / "train", folder, f"train.steps={STEPS}", "train.ema.thresholds=averaged", "parallel.zero_stage=2"
    )
    run(2, until, layout(given, 2, 2))
    return folder


def tuned(digits: Path, folder: Path, source: Path, *overrides: str) -> Config:
    """A run that starts from the source: other data, seed, batch and rate."""
    mine = ("seed=5", "train.steps=4", "train.global_batch=12", "train.optimizer.lr=1e-3", f"init_from={source}")
    return config(digits / "heldout", folder, *mine, *overrides)


@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize(("world", "expert", "zero"), [(1, 1, 0), (2, 2, 1), (2, 1, 2)])
def test_the_weights_are_those_of_the_source_to_the_bit(
    digits: Path, source: Path, tmp_path: Path, world: int, expert: int, zero: int, weights: str
) -> None:
    """Live weights, averaged weights and thresholds; and a step at a rate of almost nothing leaves them, wherever ZeRO
    keeps its copy.
    """
    stored = store.read(store.resolve(source), sorted(store.tensors(store.resolve(source))))
    given = layout(
        tuned(digits, tmp_path / "run", source, f"init_weights={weights}", "train.optimizer.lr=1e-30"), expert, zero
    )
    for steps in (0, 1):
        for found in run(world, begun, given, steps):
            for name, tensor in found["model"].items():
                if "predictor.threshold" in name or "predictor.updates" in name:
                    wanted = stored[f"model.{name}"]  # the live ones, with averaged weights too
                else:
                    wanted = stored[f"{weights}.{name}"]
                    assert torch.equal(tensor, found["ema"][name]), name
                if ".experts." in name:
                    wanted = wanted.chunk(expert)[found["expert"]]
                if steps == 0:
                    assert torch.equal(tensor, wanted), name
                elif "predictor.updates" in name:
                    assert tensor == STEPS + 1
                elif "predictor.threshold" not in name:
                    torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 2)])
def test_the_first_loss_is_the_sources_loss_on_that_batch(
    digits: Path, source: Path, tmp_path: Path, world: int, expert: int
) -> None:
    given = layout(tuned(digits, tmp_path / "run", source, "train.optimizer.lr=1e-30"), expert, 1)
    model = load_model(source, weights="ema").train()
    stream = Stream(Mixture([Dataset.open(digits / "heldout")]), given.data, seed=given.seed, batch=12)
    batch, objective = next(stream), objective_of("flow")
    noised = objective.noised(batch.latent, batch.noise, batch.u)
    with torch.no_grad():
        output = model(noised.x, noised.t, batch.condition)
        wanted = float(objective.loss(output.prediction, noised) + output.auxiliary)
    for found in run(world, begun, given, 1):
        assert found["losses"][0] == pytest.approx(wanted, rel=1e-6)


def test_thresholds_mean_the_same_under_another_decay(digits: Path, source: Path, tmp_path: Path) -> None:
    """Moved a few times, they are far below what they estimate; the correction for that depends on the decay."""
    old, new = (
        run(1, begun, tuned(digits, tmp_path / f"{decay}", source, f"model.threshold_decay={decay}"), 0)[0]["model"]
        for decay in (0.95, 0.8)
    )
    for name in (name for name in old if "threshold" in name):
        assert (new[name] > 2 * old[name]).all()
        torch.testing.assert_close(new[name] / (1 - 0.8**STEPS), old[name] / (1 - 0.95**STEPS))


def told(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_METRICS} for line in lines]


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_and_does_not_start_again(digits: Path, source: Path, tmp_path: Path) -> None:
    """With expert and router rates of their own and frozen parts; the source may be gone by then."""
    gone = tmp_path / "gone"
    shutil.copytree(source, gone)
    knobs = (
        "checkpoint.every=2",
        "train.optimizer.expert_lr_scale=3",
        "train.optimizer.router_lr_scale=0.5",
        'train.freeze=["blocks.0.*"]',
    )
    uncut = layout(tuned(digits, tmp_path / "uncut", gone, *knobs), 2, 1)
    run(2, until, uncut)
    cut = dataclasses.replace(uncut, folder=str(tmp_path / "cut"))
    run(2, until, dataclasses.replace(cut, train=dataclasses.replace(cut.train, steps=2)))
    shutil.rmtree(gone)
    run(2, until, cut)
    assert told(tmp_path / "cut") == told(tmp_path / "uncut")
    first = told(tmp_path / "cut")[0]
    assert (first["lr"], first["lr_experts"], first["lr_routers"]) == (1e-3, 3e-3, 5e-4)
    one, other = (store.resolve(tmp_path / name) for name in ("uncut", "cut"))
    names = sorted(store.tensors(one))
    for (name, tensor), again in zip(store.read(one, names).items(), store.read(other, names).values(), strict=True):
        assert torch.equal(tensor, again), name
    assert (tmp_path / "cut/ancestry.json").read_bytes() == (tmp_path / "uncut/ancestry.json").read_bytes()


def test_a_chain_is_told(digits: Path, source: Path, tmp_path: Path) -> None:
    """First tuning, an export of it, a second tuning from that: each knows all before it, newest first."""
    run(1, until, tuned(digits, tmp_path / "first", source, "train.steps=1"))
    checkpoint = store.resolve(tmp_path / "first")
    meta = store.read_meta(checkpoint)["meta"]
    assert [(entry["step"], entry["weights"]) for entry in meta["ancestry"]] == [(STEPS, "ema")]
    assert meta["ancestry"][0]["path"] == str(store.resolve(source))
    provenance = {"ancestry": meta["ancestry"]}
    kept = override(config_of(checkpoint), ["sample.weights=model"])
    save_exported(
        load_model(checkpoint, "model"), kept, data_info_of(checkpoint), tmp_path / "single", provenance=provenance
    )
    given = tuned(
        digits,
        tmp_path / "second",
        tmp_path / "single",
        "train.steps=1",
        "init_weights=model",
        'train.freeze=["patches.*"]',
    )
    found = run(1, begun, given, 0)[0]
    assert found["line"] == (
        f"initialized from the model weights of {tmp_path / 'single'} <- ema weights of {store.resolve(source)} "
        f"(step {STEPS}), 2 of 61 parameter tensors are frozen"
    )
    run(1, until, given)
    lines = json.loads((tmp_path / "second/ancestry.json").read_text())
    assert [line["path"] for line in lines] == [str(tmp_path / "single"), str(store.resolve(source))]
    assert lines == store.read_meta(store.resolve(tmp_path / "second"))["meta"]["ancestry"]
    assert all(len(line["fingerprint"]) == 64 for line in lines)


@pytest.mark.parametrize(
    ("override_", "message"),
    [
        ("model.hidden_size=64", r"holds weights of another model: model\.hidden_size is 32 there and 64 here"),
        ("model.condition=text", r"model\.condition is class there and text here"),
        ("init_from=/nowhere/at/all", r"init_from /nowhere/at/all is not a folder"),
        (
            'train.freeze=["pathces.*"]',
            r"train\.freeze: pathces\.\* matches none of the \d+ parameters; near are patches\.projection",
        ),
        ('train.freeze=["*"]', r"so that nothing is trained"),
    ],
)
def test_what_does_not_fit_is_told_on_all_ranks(
    digits: Path, source: Path, tmp_path: Path, override_: str, message: str
) -> None:
    given = layout(tuned(digits, tmp_path / "run", source, override_), 2, 1)
    with pytest.raises(RankError, match=message) as raised:
        run(2, starting, given)
    assert sorted(raised.value.errors) == [0, 1]


def starting(rank: int, given: Config) -> None:
    """Start without the checks of the data, which a model of another shape would not pass."""
    training.Trainer(given, training.start_mesh(given), Mixture.open(given.data))


def test_a_folder_without_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RankError, match="init_from .*empty holds no complete checkpoint"):
        run(1, starting, tuned(digits, tmp_path / "run", tmp_path / "empty"))


@pytest.mark.parametrize("path", ["runs/one", "runs/./one/", "runs/one/checkpoints/step-0000010"])
def test_a_run_does_not_start_from_itself(path: str) -> None:
    with pytest.raises(ConfigError, match="is this run's own folder"):
        override(Config(folder="runs/one"), [f"init_from={path}"])


def test_patterns() -> None:
    names = ["patches.weight", "blocks.0.attention.qkv.weight", "blocks.10.attention.qkv.weight", "head.bias"]
    assert match(["*.attention.*"], names) == set(names[1:3])
    assert match(["blocks.?.*", "head.bias"], names) == {names[1], names[3]}
    assert match([], names) == set()
    with pytest.raises(ConfigError, match="near are head.bias"):
        match(["patches.*", "haed.bias"], names)
    with pytest.raises(ConfigError, match="matches all 4 parameters"):
        match(["patches.*", "b*", "head.*"], names)
