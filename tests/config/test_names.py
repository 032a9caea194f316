"""Unknown keys are answered by what is meant; stored configs of before are read under the names of today."""

from pathlib import Path

import pytest

from diffmoe_ep.config import ConfigError, flat, from_tree, keys, nested, to_tree, today
from diffmoe_ep.config.names import EXPLAINED, MEANINGS, RENAMED, meant_by

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
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


ANSWERS = {  # exactly
    "topk": "did you mean compute.topk, the exact top-k over ranks, or model.top_k, the number of experts that a token "
    "chooses (family tc)?",
    "pool.topk": "did you mean compute.topk, the exact top-k over ranks, or model.top_k, the number of experts that a "
    "token chooses (family tc)?",
    "sample.batch_size": "the number of samples that are computed together is sample.chunk",
    "sample.batch-size": "the number of samples that are computed together is sample.chunk",
    "text.dtype": "the type that the text encoder computes in is text.precision",
    "sample.select": "the rule by which experts take tokens in sampling is sample.selection",
    "optimizer": "train.optimizer is a section with the keys kind, lr, betas, eps, weight_decay, expert_lr_scale, "
    "router_lr_scale, momentum",
    "train.ema_": "did you mean train.ema?",
    "optimizer.name": "the optimizer's name is train.optimizer.kind",
    "optimizer.banana": "the keys of train.optimizer are kind, lr, betas, eps, weight_decay, expert_lr_scale, "
    "router_lr_scale, momentum",
    "sample.num_samples": "how many are drawn is an option of the verb, diffmoe sample RUN --samples N, and in a grid "
    "while training sample.grid_size",
    "wandb": "Weights & Biases, on or off, is log.wandb",
    "use_wandb": "Weights & Biases, on or off, is log.wandb",
    "wandb_project": "set log.wandb=true; the environment says where it writes to (WANDB_PROJECT, WANDB_ENTITY, "
    "WANDB_MODE=offline), and a run is called by its folder",
    "wall_clock_breakdown": "a trace of some steps is written with log.profile=[10,13]; speed and mfu stand in every "
    "line of metrics.jsonl",
    "log.dir": "the run's folder is folder",
    "vae.path": "the VAE's local folder is sample.vae",
    "precision": "did you mean text.precision, the type that the text encoder computes in, or train.precision, the "
    "compute type, bf16 or float32?",
    "model_num_experts": "the number of experts of a layer is model.num_experts",
    "train.stps": "did you mean train.steps?",
    "trian.steps": "did you mean train?",
    "model.hiden": "did you mean model.hidden_size?",
    "train.lrr": "did you mean train.optimizer.lr?",
    "log.evry": "did you mean log.every?",
    "pool.banana": "the keys of pool are span, capacity",
    "log.monkey": "the keys of log are every, tensorboard, wandb, profile",
    "pool.foo": "the keys of pool are span, capacity",
    "banana.foo": "list all: diffmoe keys",
}


def answered(name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        from_tree({}, [f"{name}=1"])
    return str(refused.value)


@pytest.mark.parametrize("name", PEERS)
def test_what_peers_say_is_answered_with_the_key(name: str) -> None:
    key = PEERS[name]
    assert answered(name) == f"unknown key {name}; " + (
        f"it is called {key}" if name in RENAMED else f"{MEANINGS[key][0]} is {key}"
    )


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str) -> None:
    said = name.partition(".")[0] if name.startswith("trian") else name  # its section is what is unknown
    assert answered(name) == f"unknown key {said}; {ANSWERS[name]}"


@pytest.mark.parametrize("word", ["foo", "bar", "banana", "qwerty", "monkey", "purple", "house", "hello", "xyzzy"])
def test_nonsense_is_answered_with_what_there_is(word: str) -> None:
    for section in ("", "train.", "data.", "model.", "sample.", "train.optimizer."):
        assert answered(section + word).startswith(
            f"unknown key {section}{word}; the keys {f'of {section[:-1]}' if section else 'here'} are "
        )


@pytest.mark.parametrize("old", RENAMED)
def test_every_name_of_before_is_answered_in_a_users_config_and_read_in_a_stored_one(old: str) -> None:
    assert answered(old) == f"unknown key {old}; it is called {RENAMED[old]}"
    assert flat(today(nested({old: "value"}))) == {RENAMED[old]: "value"}
    assert f"| `{old}` | `{RENAMED[old]}` |\n" in CHANGELOG.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for names in EXPLAINED for name in names.split()])
def test_what_is_no_key_is_explained(name: str) -> None:
    assert answered(name) == f"unknown key {name}; " + next(
        EXPLAINED[names] for names in EXPLAINED if name in names.split()
    )


def test_remedies_of_what_is_no_key() -> None:
    for name, remedy in {
        "epochs": "train.steps to epochs",
        "train.micro_batch_size": "train.global_batch / train.grad_accumulation / ranks",
        "resume_from": "resume=auto",
        "fp16": "train.precision is bf16 or float32",
        "num_gpus": "the launcher says",
    }.items():
        assert remedy in answered(name)


def test_the_tables_name_real_keys_and_no_name_twice() -> None:
    assert set(MEANINGS) <= KEYS and set(RENAMED.values()) <= KEYS
    assert not set(RENAMED) & KEYS
    names = [name for _, text in MEANINGS.values() for name in text.split()]
    names += [name for text in EXPLAINED for name in text.split()]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & KEYS
    assert meant_by("Learning-Rate") == "train.optimizer.lr" and meant_by("steps") is None


def test_a_stored_config_of_before_is_read_and_a_users_is_not() -> None:
    old = {
        "train": {"batch": 32, "accumulation": 2, "optimizer": {"rate": 0.5}},
        "parallel": {"expert": 2, "overlap": 3},
    }
    config = from_tree(today(old))
    assert (config.train.global_batch, config.train.grad_accumulation, config.train.optimizer.lr) == (32, 2, 0.5)
    assert (config.parallel.expert_parallel, config.compute.overlap) == (2, 3)
    assert old["train"]["batch"] == 32 and old["train"]["optimizer"] == {"rate": 0.5}  # untouched
    assert today(to_tree(config)) == to_tree(config)
    assert today({"model": {"kernel": "loop"}, "compute": None})["compute"] == {"kernel": "loop"}
    with pytest.raises(ConfigError, match="unknown key model.kernel; it is called compute.kernel"):
        from_tree(today({"model": {"kernel": "loop"}, "compute": 3}))
    with pytest.raises(ConfigError, match="unknown key train.batch; it is called train.global_batch"):
        from_tree(old)
