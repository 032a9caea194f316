"""Law 4 for a run that changes its layout: what W ranks left, any number takes up, at any expert parallelism and ZeRO
stage. (That the data do not know of workers either is a law of the stream.)
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.checkpoint import store
from diffmoe_ep.config import Config
from diffmoe_ep.train import trainer as training
from ranks import run
from train.runs import FAULTS, config, layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Layout = tuple[int, int, int]  # ranks, expert parallelism, ZeRO stage

CHAINS: dict[str, list[Layout]] = {
    "4 to 1 to 2 to 4": [(4, 2, 2), (1, 1, 0), (2, 2, 1), (4, 4, 0)],
    "1 to 4 to 2 to 1": [(1, 1, 1), (4, 4, 2), (2, 1, 0), (1, 1, 2)],
}
KINDS = {"adamw": ["train.optimizer.kind=adamw"], "sgd": ["train.optimizer.kind=sgd", "train.optimizer.momentum=0.9"]}
PART = 3  # steps that each layout trains


def given_for(data: Path, folder: Path, *overrides: str) -> Config:
    """A run of as many steps as a chain trains."""
    return config(data, folder, f"train.steps={4 * PART}", "train.grad_accumulation=2", *overrides)


def until(rank: int, given: Config, fault: str | None = None) -> None:
    """Train until the config's last step, taking up what the folder holds."""
    with FAULTS[fault]():
        mesh = training.start_mesh(given)
        dataset, checkpoint = training.prepare(given, mesh)
        training.Trainer(given, mesh, dataset, checkpoint).run()


def carry(rank: int, given: Config) -> None:
    """Take up what the folder holds, and save it again in its place, as this layout does."""
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    trainer = training.Trainer(given, mesh, dataset, checkpoint)
    mesh.agree(None)  # all have read it
    if mesh.is_first:
        shutil.rmtree(trainer.folder.checkpoints)
    mesh.agree(None)
    with trainer.saver as saver:
        trainer.save(lambda _: None)
        saver.finish()


def chained(given: Config, chain: list[Layout], fault: str | None = None) -> list[dict[str, Any]]:
    """The metrics of a run that goes through layouts."""
    for number, at in enumerate(chain, start=1):
        part = dataclasses.replace(layout(given, *at[1:]), train=dataclasses.replace(given.train, steps=number * PART))
        run(at[0], until, part, fault, timeout=300)
    return lines_of(given)


def lines_of(given: Config) -> list[dict[str, Any]]:
    """A run's metrics, step by step."""
    lines = [json.loads(line) for line in (Path(given.folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, given.train.steps + 1))
    return lines


def apart(lines: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float:
    """How far a metric is from that of another run at most."""
    pairs = [(torch.tensor(one[key]), torch.tensor(other[key])) for one, other in zip(lines, others, strict=True)]
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.fixture(scope="module")
def uncut(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """The metrics of runs that keep one layout, each trained once."""
    done: dict[Any, list[dict[str, Any]]] = {}

    def trained(at: Layout, *overrides: str) -> list[dict[str, Any]]:
        if (at, overrides) not in done:
            given = layout(given_for(digits / "train", tmp_path_factory.mktemp("uncut"), *overrides), *at[1:])
            run(at[0], until, given, timeout=300)
            done[at, overrides] = lines_of(given)
        return done[at, overrides]

    return trained


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_through_layouts_without_a_changed_bit(digits: Path, tmp_path: Path, kind: str) -> None:
    """Weights, thresholds, averaged weights and moments, loaded and saved by one layout after the other."""
    given = config(digits / "train", tmp_path / "run", "train.steps=3", *KINDS[kind])
    first, *others = CHAINS["4 to 1 to 2 to 4"]
    run(first[0], until, layout(given, *first[1:]), timeout=300)
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    start = store.resolve(tmp_path / "first")
    names = sorted(store.tensors(start))
    moments = sum(name.startswith("optimizer.") for name in names)
    assert moments == (2 if kind == "adamw" else 1) * sum(name.startswith("ema.") for name in names) > 0
    wanted = store.read(start, names)
    for at in others:
        run(at[0], carry, layout(given, *at[1:]), timeout=300)
        found = store.resolve(tmp_path / "run")
        assert sorted(store.tensors(found)) == names
        for name, tensor in store.read(found, names).items():
            assert torch.equal(tensor, wanted[name]), f"{name} at {at}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_that_changes_its_layout_is_the_uncut_run(
    digits: Path, tmp_path: Path, uncut: Callable[..., list[dict[str, Any]]], chain: str, kind: str
) -> None:
    given = given_for(digits / "train", tmp_path, *KINDS[kind])
    lines, wanted = chained(given, CHAINS[chain]), uncut((1, 1, 0), *KINDS[kind])
    for key in ("samples", "epoch", "bad_samples", "lr"):
        assert [line[key] for line in lines] == [line[key] for line in wanted]
    assert apart(lines, wanted, "loss") <= 1e-6
    assert max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(lines, wanted, strict=True)) <= 1e-5
    assert apart(lines, wanted, "threshold") <= 1e-6


def test_forgotten_moments_are_seen(digits: Path, tmp_path: Path, uncut: Callable[..., list[dict[str, Any]]]) -> None:
    given = given_for(digits / "train", tmp_path, *KINDS["adamw"])
    lines = chained(given, CHAINS["1 to 4 to 2 to 1"], "forgotten moments")
    assert apart(lines, uncut((1, 1, 0), *KINDS["adamw"]), "loss") > 1e-4


def test_in_bf16_it_is_as_close_as_uncut_runs_are_to_each_other(
    digits: Path, tmp_path: Path, uncut: Callable[..., list[dict[str, Any]]]
) -> None:
    """Layouts round differently there, so uncut runs differ too; what a change of layout adds is no more than that."""
    bf16 = ("train.precision=bf16", *KINDS["adamw"])
    chain = CHAINS["4 to 1 to 2 to 4"]
    runs = [uncut(at, *bf16) for at in chain]
    spread = max(apart(one, other, "loss") for one, other in itertools.combinations(runs, 2))
    lines = chained(given_for(digits / "train", tmp_path, *bf16), chain)
    assert 0 < spread < 5e-3
    assert max(apart(lines, each, "loss") for each in runs) <= 2 * spread  # its own roundings, and those of each
