"""DeepSpeed's settings: ours, the user's merged in, and contradictions named."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffmoe_ep.config import Config, ConfigError, from_tree
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train import engine
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.engine import settings
from ranks import run
from train import runs


def config(tmp_path: Path, user: Any, *overrides: str) -> Config:
    path = tmp_path / "deepspeed.json"
    path.write_text(user if isinstance(user, str) else json.dumps(user))
    return from_tree({"parallel": {"deepspeed": str(path)}}, overrides)


def test_batch_sizes_follow_the_config(tmp_path: Path) -> None:
    found = settings(
        config(tmp_path, {}, "train.global_batch=96", "train.grad_accumulation=3", "train.max_grad_norm=0.5"),
        Mesh(world=Group(size=4)),
    )
    assert (
        found["train_batch_size"],
        found["train_micro_batch_size_per_gpu"],
        found["gradient_accumulation_steps"],
    ) == (96, 8, 3)
    assert found["gradient_clipping"] == 0.5


def test_user_settings_are_merged(tmp_path: Path) -> None:
    user = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5}, "memory_breakdown": True}
    found = settings(config(tmp_path, user, "parallel.zero_stage=2"), Mesh())
    assert found["memory_breakdown"] is True
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"gradient_clipping": 1.0}, r"sets gradient_clipping, which this config decides"),
        ({"zero_optimization": {"stage": 2}}, r"but parallel\.zero_stage is 1"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"zero_optimization\.offload_optimizer"),
        ({"wall_clock_breakdown": True}, r"switches wall_clock_breakdown on, .* log\.profile=\[10,13\] writes a trace"),
        ({"flops_profiler": {"enabled": True}}, r"switches flops_profiler on, .* remove it there"),
        ({"comet": {"enabled": True}}, r"switches comet on, which needs comet_ml: pip install comet_ml"),
        ("{not json", "cannot be read as JSON"),
        ([1], "holds a list"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, user: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(config(tmp_path, user), Mesh())


def test_what_does_not_work_may_be_off(tmp_path: Path) -> None:
    user = {"wall_clock_breakdown": False, "flops_profiler": {"enabled": False}, "comet": {"enabled": False}}
    assert settings(config(tmp_path, user), Mesh())["wall_clock_breakdown"] is False


def test_one_run_is_not_sent_to_wandb_twice(tmp_path: Path) -> None:
    with (
        mock.patch.object(engine, "find_spec"),
        pytest.raises(ConfigError, match="switches wandb on, and so does log.wandb=true"),
    ):
        settings(config(tmp_path, {"wandb": {"enabled": True}}, "log.wandb=true"), Mesh())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        settings(from_tree({"parallel": {"deepspeed": str(tmp_path / "nowhere.json")}}), Mesh())


def waits(rank: int, given: Config) -> tuple[int, int]:
    """How often DeepSpeed waits for the device in five steps, and when it is asked to once."""
    from deepspeed.accelerator import get_accelerator

    trainer, counted = training.Trainer(given, training.start_mesh(given), Mixture.open(given.data)), mock.Mock()
    with mock.patch.object(type(get_accelerator()), "synchronize", counted):
        for _ in range(5):
            trainer.train_step(training.Clock(0))
        steps = counted.call_count
        get_accelerator().synchronize()
    trainer.stream.close()
    return steps, counted.call_count - steps


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_step_never_waits_for_the_device(digits: Path, tmp_path: Path, zero: int) -> None:
    given = runs.config(digits / "train", tmp_path, "train.grad_accumulation=2", f"parallel.zero_stage={zero}")
    assert run(1, waits, given) == [(0, 1)]
