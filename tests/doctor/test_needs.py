"""What a config asks for is what training then takes: bytes of a checkpoint, packages, folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffmoe_ep.config import Config, load
from diffmoe_ep.doctor.needs import check_config, check_folders, needs_of, sample_bytes

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "configs/text/diffmoe_e16_4.6b.yaml"


def config_of(*overrides: str) -> Config:
    return load(ROOT / "configs/digits.yaml", ["parallel.expert_parallel=1", *overrides])


def faults(findings: Any) -> dict[str, str]:
    return {one.name: one.found for one in findings if one.state != "ok"}


@pytest.mark.slow
def test_a_checkpoint_takes_what_is_asked_for(digits: Path, tmp_path: Path) -> None:
    from diffmoe_ep.train.trainer import train

    config = config_of(
        f"folder={tmp_path / 'run'}", f"data.folder={digits / 'train'}", "train.steps=1", "data.workers=0",
        "sample.grid_every=0", "train.global_batch=8", "model.hidden_size=96", "model.num_heads=2",
    )  # fmt: skip
    asked = needs_of(config, 1, "cpu")
    assert train(config)
    (folder,) = (tmp_path / "run/checkpoints").glob("step-*")
    taken = sum(file.stat().st_size for file in folder.iterdir())
    assert asked.checkpoint <= taken < 1.1 * asked.checkpoint
    left = needs_of(config, 1, "cpu").checkpoints
    assert left == asked.checkpoints - taken  # what is there is not asked for again


def test_checkpoints_that_are_kept() -> None:
    one = needs_of(config_of(), 1, "cpu")
    assert one.checkpoints == 3 * one.checkpoint  # two, and one that is being written
    many = needs_of(config_of("train.steps=1000", "checkpoint.keep_every=100"), 1, "cpu")
    assert many.checkpoints == 13 * one.checkpoint
    assert needs_of(config_of("train.optimizer.kind=sgd"), 1, "cpu").checkpoint == one.checkpoint // 2


def test_batches_in_shared_memory() -> None:
    config = load(TEXT, [])
    assert sample_bytes(config) == 2 * 4 * 4 * 32**2 + 2 * 120 * 4096
    world = config.parallel.expert_parallel
    local = config.train.micro_step_samples // world
    batches = needs_of(config, world, "cuda").batches
    assert batches == sample_bytes(config) * local * config.data.workers * config.data.prefetch
    assert needs_of(load(TEXT, ["data.workers=0"]), world, "cuda").batches == 0


def test_packages_by_setting(tmp_path: Path) -> None:
    user = tmp_path / "ds.json"
    user.write_text(json.dumps({"wandb": {"enabled": True}, "comet": {"enabled": False}}))
    config = config_of("log.tensorboard=true", "sample.sampler=dopri5", f"parallel.deepspeed={user}")
    assert [package for package, _ in needs_of(config, 1, "cpu").packages] == [
        "tensorboard", "pillow", "torchdiffeq", "wandb"
    ]  # fmt: skip
    assert needs_of(config_of("sample.grid_every=0"), 1, "cpu").packages == ()


def test_a_config_on_ranks_that_do_not_fit() -> None:
    config = config_of()
    assert faults(check_config(config, needs_of(config, 2, "cpu"), 2, True)) == {}
    found = next(iter(check_config(config, needs_of(config, 3, "cpu"), 3, True)))
    assert found.state == "problem"
    assert "do not divide over 3 ranks" in found.found
    assert found.remedy == "make train.global_batch a multiple of 3"
    assert next(iter(check_config(config, needs_of(config, 3, "cpu"), 3, False))).state == "note"


def test_folders_that_are_not_there(digits: Path, tmp_path: Path) -> None:
    there = f"data.folder={digits / 'train'}"
    assert faults(check_folders(config_of(there))) == {}
    found = faults(check_folders(config_of(f"data.folder={tmp_path}", f"init_from={tmp_path / 'gone'}")))
    assert list(found) == ["data", "init_from"]
    assert faults(check_folders(config_of("data.folder=https://example.com/set"))) == {}
