"""Unknown keys are answered by what is meant; stored configs of before are read under the names of today."""

import pytest

from diffmoe_ep.config import ConfigError, from_tree, keys, to_tree, today
from diffmoe_ep.config.names import EXPLAINED, MEANINGS, RENAMED, meant_by

KEYS = {key.name for key in keys()}
PEERS = {
    "train.lr": "train.optimizer.lr",
    "learning_rate": "train.optimizer.lr",
    "optimizer.lr": "train.optimizer.lr",
    "batch_size": "train.global_batch",
    "data.batch-size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_steps": "train.steps",
    "optimizer.weight_decay": "train.optimizer.weight_decay",
    "num_workers": "data.workers",
    "train.seed": "seed",
    "ema_decay": "train.ema.decay",
    "warmup_steps": "train.schedule.warmup",
    "grad_clip": "train.max_grad_norm",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "dtype": "train.precision",
    "mixed_precision": "train.precision",
    "train.bf16": "train.precision",
    "zero": "parallel.zero_stage",
    "ep_size": "parallel.expert_parallel",
    "parallel.ep": "parallel.expert_parallel",
    "expert_parallel_size": "parallel.expert_parallel",
    "model.depth": "model.num_blocks",
    "num_layers": "model.num_blocks",
    "model.dim": "model.hidden_size",
    "model.width": "model.hidden_size",
    "n_heads": "model.num_heads",
    "patch_size": "model.patch",
    "image_size": "model.input_size",
    "resolution": "model.input_size",
    "capacity_factor": "pool.capacity",
    "cfg_scale": "sample.guidance",
    "guidance_scale": "sample.guidance",
    "num_sampling_steps": "sample.steps",
    "output_dir": "folder",
    "run_dir": "folder",
    "save_every": "checkpoint.every",
    "log_every": "log.every",
    "compile": "compute.compile",
    "activation_checkpointing": "compute.recompute",
    "adam_beta1": "train.optimizer.betas",
    "betas": "train.optimizer.betas",
    "top_k": "model.top_k",
    "train.batch": "train.global_batch",
    "parallel.expert": "parallel.expert_parallel",
    "train.optimizer.rate": "train.optimizer.lr",
}


@pytest.mark.parametrize("name", PEERS)
def test_what_peers_say_is_answered_with_the_key(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^unknown key {name}\b.* {PEERS[name]}\b"):
        from_tree({}, [f"{name}=1"])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("epochs", "train.steps to epochs"),
        ("train.micro_batch_size", "train.global_batch / train.grad_accumulation / ranks"),
        ("resume_from", "resume=auto"),
        ("fp16", "train.precision is bf16 or float32"),
        ("num_gpus", "the launcher says"),
    ],
)
def test_what_is_no_key_is_explained(name: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key {name}: .*{remedy}"):
        from_tree({}, [f"{name}=1"])


def test_the_tables_name_real_keys_and_no_name_twice() -> None:
    assert set(MEANINGS) <= KEYS and set(RENAMED.values()) <= KEYS
    assert not set(RENAMED) & KEYS
    names = [name for _, text in MEANINGS.values() for name in text.split()]
    names += [name for text in EXPLAINED for name in text.split()]
    assert sorted(names) == sorted(set(names))
    assert meant_by("Learning-Rate") == "train.optimizer.lr" and meant_by("steps") is None


def test_a_stored_config_of_before_is_read_and_a_users_is_not() -> None:
    old = {
        "train": {"batch": 32, "accumulation": 2, "optimizer": {"rate": 0.5}},
        "parallel": {"expert": 2, "overlap": 3},
    }
    config = from_tree(today(old))
    assert (config.train.global_batch, config.train.grad_accumulation, config.train.optimizer.lr) == (32, 2, 0.5)
    assert (config.parallel.expert_parallel, config.compute.overlap) == (2, 3)
    assert old["train"]["batch"] == 32  # untouched
    assert today(to_tree(config)) == to_tree(config)
    with pytest.raises(ConfigError, match="unknown key train.batch; it is called train.global_batch"):
        from_tree(old)
