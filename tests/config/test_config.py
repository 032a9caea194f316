"""The config: strict, typed, documented, and read back to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffmoe_ep.config import (
    Config,
    ConfigError,
    check_world,
    dump,
    fit_world,
    from_tree,
    keys,
    load,
    override,
    tokens_per_expert,
)


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    config = from_tree(
        {"train": {"optimizer": {"lr": "1e-3", "betas": [0.8, 0.9]}}, "pool": {"span": 4}, "sample": {"threshold": 0.4}}
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    assert config.train.optimizer.lr == 1e-3
    assert config.train.optimizer.betas == (0.8, 0.9)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 7, global_batch: 32}\n")
    config = load(path, ["train.steps=9", "parallel.deepspeed=null", "train.schedule={kind: cosine, warmup: 2}"])
    assert (
        config.train.steps,
        config.train.global_batch,
        config.train.schedule.kind,
        config.train.schedule.warmup,
    ) == (9, 32, "cosine", 2)
    assert override(config, ["train.steps=3"]).train.schedule == config.train.schedule


def test_every_key_is_documented() -> None:
    documented = list(keys())
    assert len(documented) > 60
    assert all(len(key.doc) > 8 for key in documented)
    steps = next(key for key in documented if key.name == "train.steps")
    assert (steps.kind, steps.default) == ("int", 100_000)
    assert steps.doc.startswith("optimizer steps of the whole run")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    assert load(path) == Config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepps=1"], "unknown key train.stepps; did you mean train.steps?"),
        (["modle.hidden=1"], "unknown key modle; did you mean model?"),
        (["num_experts=4"], "unknown key num_experts; the number of experts of a layer is model.num_experts"),
        (["zzz=4"], "unknown key zzz; the keys here are folder, seed"),
        (["train.steps=many"], r"train.steps: expected int, got 'many' \(str\)"),
        (["train.steps=1.5"], r"train.steps: expected int, got 1.5 \(float\)"),
        (["train.steps=true"], r"train.steps: expected int, got True \(bool\)"),
        (["data.flip=1"], r"data.flip: expected true \| false, got 1 \(int\)"),
        (["train=3"], "train: expected a section with keys, got 3"),
        (["train.precision=bf61"], "train.precision: 'bf61' .* is not one of bf16 | float32; did you mean bf16"),
        (["train.steps.more=1"], "train.steps: expected int, got {'more': 1}"),
        (["train.steps=1", "train.steps.more=1"], "steps is a value, not a section"),
        (["train.steps"], "is not of the form key=value"),
        (
            ["model.num_experts=16", "parallel.expert_parallel=3"],
            "model.num_experts 16 is not a multiple of parallel.expert_parallel 3; .* 1, 2, 4, 8, 16",
        ),
        (
            ["train.global_batch=10", "train.grad_accumulation=4"],
            "train.global_batch 10 is not a multiple of train.grad_accumulation 4; .* 1, 2, 5, 10",
        ),
        (["parallel.zero_stage=3"], "parallel.zero_stage is 3: DeepSpeed refuses ZeRO-3 with native MoE"),
        (["parallel.zero_stage=7"], "parallel.zero_stage is 7: the stages are 0, 1 and 2"),
        (["pool.capacity=0.0001"], r"floor\(65536 \* 0.0001 / 16\) = 0 tokens"),
        (["pool.capacity=17"], "pool.capacity 17 .* at most the pool"),
        (["pool.span=3", "train.global_batch=16"], "pool.span 3 does not divide the 16 samples .* 1, 2, 4, 8, 16"),
        (["model.hidden_size=30", "model.num_heads=4"], "model.hidden_size 30 must be a multiple of model.num_heads"),
        (["model.input_size=31"], "model.input_size 31 is not a multiple of model.patch 2"),
        (
            ["model.family=dense", "parallel.expert_parallel=2"],
            "model.family dense has no experts to shard; set parallel.expert_parallel=1",
        ),
        (["train.global_batch=0"], "train.global_batch is 0; it must be greater than 0"),
        (["train.objective=ddpm", "model.out_channels=4"], "model.out_channels is 4, set it to 8"),
        (["sample.sampler=ddim"], "sample.sampler ddim needs a model of train.objective ddpm, this one is of flow"),
        (["sample.guidance_interval=[0.8,0.2]"], "sample.guidance_interval is"),
        (["sample.guidance_channels=5"], "it must be 1 to 4"),
        (["train.ema.decay=1"], "train.ema.decay is 1.0; it must be at least 0 and less than 1"),
        (["sample.eta=1.5"], "sample.eta is 1.5; it must be from 0 to 1"),
        (["sample.eta=-0.1"], "sample.eta is -0.1; it must be from 0 to 1"),
        (["model.out_channels=2"], "model.out_channels 2 is less than model.in_channels 4"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree({}, overrides)


@pytest.mark.parametrize(
    ("tree", "world", "message"),
    [
        (
            {"parallel": {"expert_parallel": 4}},
            2,
            "parallel.expert_parallel is 4 but only 2 processes were started; start at least 4 .* or set "
            "parallel.expert_parallel=2",
        ),
        (
            {"parallel": {"expert_parallel": 4}},
            6,
            "number of ranks 6 is not a multiple of parallel.expert_parallel 4; .* 1, 2, 3, 6",
        ),
        (
            {"train": {"global_batch": 10}},
            4,
            "= 10 samples of a micro-step do not divide over 4 ranks; make train.global_batch a multiple of 4",
        ),
        (
            {"train": {"global_batch": 24}, "pool": {"span": 8}},
            2,
            "neither lies inside a rank's 12 samples nor covers whole ranks; spans that fit: 1, 2, 3, 4, 6, 12, 24, "
            "all",
        ),
    ],
)
def test_worlds_that_do_not_fit_are_named(tree: Any, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_world(from_tree(tree), world)


def test_worked_identity_of_the_capacity() -> None:
    assert tokens_per_expert(100, 1.0, 16) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a config is a mapping of keys"),
        ("a: [", "is not YAML"),
        ("a: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "other.yaml")


@pytest.mark.parametrize(("asked", "world", "taken"), [(4, 8, 4), (4, 6, 2), (4, 3, 1), (4, 2, 2), (4, 1, 1)])
def test_an_elastic_run_fits_its_experts_to_the_ranks_that_there_are(asked: int, world: int, taken: int) -> None:
    elastic = from_tree({"parallel": {"expert_parallel": asked, "elastic": True}, "train": {"global_batch": 48}})
    fitted = fit_world(elastic, world)
    assert fitted.parallel.expert_parallel == taken
    check_world(fitted, world)
    assert replace(fitted, parallel=elastic.parallel) == elastic
    fixed = from_tree({"parallel": {"expert_parallel": asked}})
    assert fit_world(fixed, world) == fixed
