"""Frozen parameters keep their bits, others are trained as if those were constants, whatever the layout; and resuming
works.
"""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffmoe_ep.checkpoint import store
from diffmoe_ep.checkpoint.same_run import check_continues
from diffmoe_ep.config import Config
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.thresholds import predictors_of
from diffmoe_ep.train.warm_start import match
from ranks import run
from train.runs import busy, config, layout

pytestmark = pytest.mark.slow

LAYOUTS = [(1, 1, 0), (1, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 1, 2), (4, 2, 1), (4, 2, 0)]
PATTERNS = {
    "all experts": ["*.experts.*"],
    "the experts of one layer, the patches": ["blocks.1.ffn.experts.*", "patches.*"],
    "experts' biases, router, predictor": ["*.experts.*_bias", "*.router.*", "*.predictor.*"],
    "all but experts": [
        "[!b]*",
        "blocks.?.attention.*",
        "*.modulation.*",
        "blocks.[02].ffn.*",
        "*.router.*",
        "*.predictor.*",
    ],
    "all but one tiny tensor": ["[!h]*", "head.modulation.*", "head.projection.weight"],
}


def steps(rank: int, given: Config, kernel: str = "auto") -> dict[str, Any]:
    """Three steps: each loss and gradient norm, and what this rank's tensors were before and are after."""
    with mock.patch.object(training, "initialize", busy(0.1)):
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, Mixture.open(given.data))
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    told = []
    for _ in range(3):
        values = trainer.measure(trainer.train_step(training.Clock(0)))
        told.append((values["loss"], values["grad_norm"]))
    trainer.stream.close()
    after = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    thresholds = [predictor.threshold.clone() for predictor in predictors_of(trainer.model)]
    return {"told": told, "before": before, "after": after, "ema": trainer.ema.tensors, "thresholds": thresholds}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", PATTERNS)
def test_frozen_parameters_keep_their_bits_and_the_rest_is_the_same_run(
    digits: Path, tmp_path: Path, what: str
) -> None:
    patterns = PATTERNS[what]
    sgd = ("train.optimizer.kind=sgd", "train.optimizer.lr=0.05", "train.max_grad_norm=0.05")
    given = config(digits / "train", tmp_path / "run", f"train.freeze={patterns}", *sgd)
    alone = None
    for world, expert, zero in LAYOUTS:
        for found in run(world, steps, layout(given, expert, zero)):
            frozen = match(patterns, list(found["before"]))
            for name, tensor in found["after"].items():
                assert torch.equal(tensor, found["before"][name]) == (name in frozen), (world, expert, zero, name)
                assert name not in frozen or torch.equal(found["ema"][name], tensor), name
            alone = alone or found
            torch.testing.assert_close(torch.tensor(found["told"]), torch.tensor(alone["told"]), rtol=1e-5, atol=0)
            torch.testing.assert_close(found["thresholds"], alone["thresholds"], rtol=1e-5, atol=0)
            assert all(
                (threshold > 0).all() for threshold in found["thresholds"]
            )  # they follow, also where the predictor is frozen


def test_what_is_not_frozen_gets_the_gradients_that_it_would_get(digits: Path, tmp_path: Path) -> None:
    """One step of SGD: the trained part moves exactly as it does without freezing."""
    given = config(
        digits / "train", tmp_path / "run", "train.optimizer.kind=sgd", "train.max_grad_norm=0", "train.steps=1"
    )
    free = run(1, once, given)[0]
    frozen = run(
        1, once, dataclasses.replace(given, train=dataclasses.replace(given.train, freeze=("blocks.1.*", "time.*")))
    )[0]
    for name, tensor in frozen.items():
        if not name.startswith(("blocks.1.", "time.")):
            assert torch.equal(tensor, free[name]), name


def once(rank: int, given: Config) -> dict[str, torch.Tensor]:
    with mock.patch.object(training, "initialize", busy(0.1)):
        trainer = training.Trainer(given, training.start_mesh(given), Mixture.open(given.data))
    trainer.train_step(training.Clock(0))
    trainer.stream.close()
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


@pytest.mark.parametrize("kernel", ["loop", "batched", "grouped", "fused"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_kernel_takes_frozen_experts(digits: Path, tmp_path: Path, kernel: str, recompute: str) -> None:
    given = config(
        digits / "train", tmp_path / "run", 'train.freeze=["*.experts.fc1_weight", "*.experts.fc2_bias"]',
        f"compute.kernel={kernel}", f"compute.recompute={recompute}", "parallel.zero_stage=2",
    )  # fmt: skip
    found = run(1, steps, given)[0]
    for name, tensor in found["after"].items():
        frozen = name.endswith(("experts.fc1_weight", "experts.fc2_bias"))
        assert torch.equal(tensor, found["before"][name]) == frozen, name


def until(rank: int, given: Config) -> None:
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    training.Trainer(given, mesh, dataset, checkpoint).run()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["all experts", "all but one tiny tensor"])
def test_a_frozen_run_resumes_at_another_layout(digits: Path, tmp_path: Path, what: str) -> None:
    """Checkpoints hold all weights, but moments of the trained ones only."""
    patterns = PATTERNS[what]
    given = config(
        digits / "train", tmp_path / "run", f"train.freeze={patterns}", "train.steps=4", "checkpoint.every=2"
    )
    run(4, until, layout(dataclasses.replace(given, train=dataclasses.replace(given.train, steps=2)), 2, 2))
    names = list(store.tensors(store.resolve(tmp_path / "run")))
    parameters = {name.removeprefix("ema.") for name in names if name.startswith("ema.")}
    frozen = match(patterns, sorted(parameters))
    assert {name.removeprefix("model.") for name in names if name.startswith("model.")} >= parameters
    assert {name.split(".", 2)[2] for name in names if name.startswith("optimizer.")} == parameters - frozen
    before = store.read(store.resolve(tmp_path / "run"), sorted(names))
    run(2, until, layout(given, 2, 1))
    after = store.read(store.resolve(tmp_path / "run"), sorted(names))
    for name in parameters:
        assert torch.equal(before[f"model.{name}"], after[f"model.{name}"]) == (name in frozen), name


def test_other_patterns_are_another_run(digits: Path, tmp_path: Path) -> None:
    given = config(digits / "train", tmp_path / "run", 'train.freeze=["time.*"]', "train.steps=1")
    run(1, until, given)
    other = dataclasses.replace(given, train=dataclasses.replace(given.train, freeze=()))
    with pytest.raises(
        store.CheckpointError,
        match=r"""with train\.freeze \["time\.\*"\], this run has \[\], .*; set 'train\.freeze=\["time\.\*"\]', or""",
    ):
        check_continues(store.resolve(tmp_path / "run"), other)
