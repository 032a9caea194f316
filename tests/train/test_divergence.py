"""A step that is not finite: named with its samples and cause, or passed over, alike in every layout."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.loader import micro_steps
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.plausible import Spread, Usual
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.divergence import Seen, cause
from diffmoe_ep.train.metrics import MACHINE_METRICS
from ranks import run
from train.runs import busy, config, layout

POISONED = 24 * 2 + 17  # a position of step 3, on the last of one, two and four ranks
LAYOUTS = [(1, 1, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 2, 0), (4, 2, 1)]


def poisoned(value: float) -> Any:
    """Samples as they are read, but for one position."""
    original = micro_steps.assemble

    def assemble(positions: range, *rest: Any) -> Any:
        batch = original(positions, *rest)
        if POISONED in positions:
            batch.latent[positions.index(POISONED), 0, 2, 3] = value
        return batch

    return mock.patch.object(micro_steps, "assemble", assemble)


def trained(rank: int, given: Config, value: float) -> tuple[str, bool, dict[str, Any]]:
    """What a run with a poisoned sample raised, whether everywhere, and what it left behind."""
    with poisoned(value), mock.patch.object(training, "initialize", busy(0.02)):
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, *training.prepare(given, mesh))
        try:
            trainer.run()
        except ConfigError as error:
            return str(error), error.everywhere, {}
    state = {fragment.name: fragment.data.clone() for fragment in trainer.weights() + trainer.engine.moments()}
    return "", False, state


def told(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_METRICS} for line in lines]


def address(given: Config) -> str:
    mixture = Mixture.open(given.data)
    place = mixture.order(given.seed, given.data.shuffle_block).locate(POISONED)
    return ", key ".join(mixture.parts[0].address(place.shard, place.sample))


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), 1e25])
@pytest.mark.parametrize(("world", "expert", "zero"), [(1, 1, 0), (2, 2, 0), (2, 1, 1), (4, 2, 2)])
def test_the_sample_is_named_on_every_rank(
    digits: Path, tmp_path: Path, world: int, expert: int, zero: int, value: float
) -> None:
    """Also where the step before the last was the bad one, and at ZeRO 0 all weights are lost in the meantime."""
    given = layout(config(digits / "train", tmp_path / "run", "log.every=2", "train.steps=8"), expert, zero)
    for text, everywhere, _ in run(world, trained, given, value):
        assert everywhere
        assert text.startswith("step 3")
        assert "the run has diverged and is not saved" in text
        assert "1 of 24 losses are not finite" in text
        assert f"position {POISONED} ({address(given)}; loss " in text
        assert "before it: loss and gradient norm" in text and "at step 2" in text
        assert "cause: the data: 1 of these samples have values beyond any plausible range" in text
    assert [line["step"] for line in told(tmp_path / "run")] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_passed_over_alike_in_every_layout(digits: Path, tmp_path: Path, accumulation: int) -> None:
    seen = []
    for world, expert, zero in LAYOUTS:
        folder = tmp_path / f"{world}-{expert}-{zero}"
        keys = ["train.skip_nonfinite=1", "train.steps=6", f"train.grad_accumulation={accumulation}"]
        given = layout(config(digits / "train", folder, *keys), expert, zero)
        if 24 // accumulation % world:
            continue
        for text, _, state in run(world, trained, given, float("nan")):
            assert text == ""
            assert all(tensor.isfinite().all() for tensor in state.values())
        lines = told(folder)
        assert [(line["step"], line["passed_over"]) for line in lines] == [(1, 0), (2, 0), (4, 1), (5, 1), (6, 1)]
        seen.append(lines)
    assert len(seen) >= 4
    for lines in seen[1:]:
        for one, other in zip(seen[0], lines, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
            assert other["threshold"] == pytest.approx(one["threshold"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "zero"), [(1, 0), (2, 1), (1, 2)])
def test_a_passed_over_step_leaves_everything_as_it_was(digits: Path, tmp_path: Path, expert: int, zero: int) -> None:
    """The state after steps 1, 2 and a passed over 3 is that after 1 and 2, to the bit."""

    def given(steps: int) -> Config:
        keys = ["train.skip_nonfinite=1", f"train.steps={steps}"]
        return layout(config(digits / "train", tmp_path / f"run{steps}", *keys), expert, zero)

    before, after = run(2, trained, given(2), float("inf")), run(2, trained, given(3), float("inf"))
    for (_, _, one), (_, _, other) in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        assert any(name.startswith("ema") for name in one) and any(name.endswith("threshold") for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("cut", [3, 4])
def test_a_resumed_run_is_the_uncut_one(digits: Path, tmp_path: Path, zero: int, cut: int) -> None:
    def given(name: str, steps: int) -> Config:
        keys = ["train.skip_nonfinite=1", f"train.steps={steps}"]
        return layout(config(digits / "train", tmp_path / name, *keys), 2, zero)

    run(2, trained, given("uncut", 6), float("nan"))
    run(2, trained, given("cut", cut), float("nan"))
    run(2, trained, given("cut", 6), float("nan"))
    assert told(tmp_path / "cut") == told(tmp_path / "uncut")
    assert told(tmp_path / "cut")[-1]["passed_over"] == 1


@pytest.mark.slow
def test_no_more_are_passed_over_than_allowed(digits: Path, tmp_path: Path) -> None:
    given = config(digits / "train", tmp_path / "run", "train.skip_nonfinite=1", "train.steps=9")
    first = run(1, twice, given)[0]
    assert first.startswith("step 5: the run has diverged and is not saved, after 1 steps that train.skip_nonfinite=1")


def twice(rank: int, given: Config) -> str:
    original = micro_steps.assemble

    def assemble(positions: range, *rest: Any) -> Any:
        batch = original(positions, *rest)
        if positions.start // 24 in (2, 4):
            batch.latent[5] = float("nan")
        return batch

    with mock.patch.object(micro_steps, "assemble", assemble):
        mesh = training.start_mesh(given)
        with pytest.raises(ConfigError) as caught:
            training.Trainer(given, mesh, *training.prepare(given, mesh)).run()
    return str(caught.value)


# -- causes ------------------------------------------------------------------------------------------------------------

MANIFEST = Manifest("toy", "pixels", (1, 8, 8), "float32", 0.5, 0.0, 10, (), "none")


def seen(scale: float = 1.0, losses: Callable[[int], float] = lambda _: 1.0) -> list[Seen]:
    draws = np.random.default_rng(0).standard_normal((12, 64)) * scale
    return [Seen(number, losses(number), Spread.of(row), None) for number, row in enumerate(draws)]


def why(samples: list[Seen], broken: str | None = None, first: bool = False) -> str:
    usual = Usual.of([each.spread for each in samples if each.spread is not None])
    return cause(samples, usual, MANIFEST, broken, first)


def test_causes_are_told_apart() -> None:
    one_bad = lambda number: float("nan") if number == 3 else 1.0  # noqa: E731
    all_bad = lambda _: float("nan")  # noqa: E731
    assert why(seen(losses=one_bad)).startswith("the rate, most likely")
    far = seen(losses=one_bad)
    far[3] = dataclasses.replace(far[3], spread=far[3].spread._replace(high=5e3))  # type: ignore[union-attr]
    assert why(far).startswith("the data: 1 of these samples")
    far[5], far[3] = dataclasses.replace(far[3], loss=1.0), seen()[3]
    assert why(far).startswith("the data: 1 of these samples")  # all losses finite, the norm is not
    scaled = why(seen(50.0, all_bad))
    assert scaled.startswith("the data's scale") and "says scale 0.5; 0.01" in scaled
    assert why(seen(losses=all_bad)).startswith("the weights: no sample's loss is finite")
    assert "that the run started from" in why(seen(losses=all_bad), first=True)
    assert why(seen(losses=one_bad), "model.head.weight").startswith("the weights: model.head.weight holds values")
    assert why([]).startswith("the rate, most likely")
