"""What a config asks of the hosts that it will run on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffmoe_ep.config import Config, ConfigError, check_world, num_tokens
from diffmoe_ep.data.manifest import MANIFEST_NAME
from diffmoe_ep.data.remote.fetch import is_remote, shown
from diffmoe_ep.doctor.finding import Finding
from diffmoe_ep.doctor.host import existing
from diffmoe_ep.planner.layout import Layout
from diffmoe_ep.planner.memory import memory
from diffmoe_ep.planner.plan import plan
from diffmoe_ep.tables import size

_found = partial(Finding, "this config")
FLOAT = 4  # bytes
MONITORS = {"wandb": "wandb", "comet": "comet_ml"}  # a DeepSpeed file's section -> the package that it needs


@dataclass(frozen=True)
class Needs:
    """What one host has to give; nothing where no config is given."""

    checkpoint: int = 0  # bytes of one checkpoint
    checkpoints: int = 0  # bytes that checkpoints will take beside those that are there
    batches: int = 0  # bytes of shared memory that the data workers of one rank may hold
    memory: int = 0  # bytes of a rank, by the plan
    packages: tuple[tuple[str, str], ...] = ()  # package, and the setting that needs it
    cache: int = 0  # bytes of the cache of remote shards
    compiles: bool = False


def needs_of(config: Config, world: int, device: str) -> Needs:
    """What the run asks for on this number of ranks."""
    train, data = config.train, config.data
    states = 2 if train.optimizer.kind == "adamw" else int(train.optimizer.momentum > 0)
    checkpoint = FLOAT * plan(config).total * (2 + states)  # weights, averaged weights, moments
    for_ever = train.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    there = sum(file.stat().st_size for file in Path(config.folder, "checkpoints").glob("step-*/*"))
    kept = checkpoint * (config.checkpoint.keep_last + 1 + for_ever)  # one more while it is written
    try:
        check_world(config, world)
        layout = Layout(world, config.parallel.expert_parallel, config.parallel.zero_stage, config.compute.recompute)
        planned = memory(config, layout, "cuda" if device == "cuda" else "cpu").total
    except ConfigError:
        planned = 0  # check_config says why it cannot run on so many ranks
    return Needs(
        checkpoint,
        max(kept - there, 0),
        sample_bytes(config) * max(1, train.micro_step_samples // world) * data.workers * data.prefetch,
        planned,
        tuple(packages(config)),
        int(data.cache_gb * 1e9) if any(is_remote(folder) for folder in folders(config)) else 0,
        config.compute.compile,
    )


def sample_bytes(config: Config) -> int:
    """Bytes of one sample in a batch: its latent, its noise and, with stored captions, their float16 features."""
    model = config.model
    latent = model.in_channels * model.input_size**2
    text = model.text_length * model.text_width if model.condition == "text" and not config.text.online else 0
    return 2 * FLOAT * latent + 2 * text


def packages(config: Config) -> Iterator[tuple[str, str]]:
    """Optional packages, each with the setting that needs it."""
    if config.log.tensorboard:
        yield "tensorboard", "log.tensorboard"
    if config.sample.grid_every:
        yield "pillow", "sample.grid_every"
        if config.sample.vae is not None:
            yield "diffusers", "sample.vae"
        if config.sample.sampler == "dopri5":
            yield "torchdiffeq", "sample.sampler dopri5"
    if config.model.condition == "text" and config.text.online:
        yield "transformers", "text.online"
    if any(folder.startswith("s3:") for folder in folders(config)):
        yield "boto3", "data.folder in a bucket"
    for name in monitors(config):
        yield MONITORS[name], f"{name} in {config.parallel.deepspeed}"


def monitors(config: Config) -> list[str]:
    """Monitors that the user's DeepSpeed file switches on; training says what is wrong with that file."""
    if config.parallel.deepspeed is None or not Path(config.parallel.deepspeed).is_file():
        return []
    try:
        user = json.loads(Path(config.parallel.deepspeed).read_text(encoding="utf-8"))
    except ValueError:
        return []
    sections = {name: user.get(name) if isinstance(user, dict) else None for name in MONITORS}
    return [name for name, one in sections.items() if isinstance(one, dict) and one.get("enabled")]


def folders(config: Config) -> list[str]:
    """Folders or URLs of the data."""
    return [part.folder for part in config.data.mixture] or [config.data.folder]


def check_config(config: Config, needs: Needs, world: int, launched: bool) -> Iterator[Finding]:
    """Whether the config can run on these ranks, and what it will take. launched: the ranks are those of a launcher."""
    try:
        check_world(config, world)
    except ConfigError as error:
        text, remedy = str(error).rsplit("; ", 1) if "; " in str(error) else (str(error), "see diffmoe train --dry-run")
        yield _found("ranks", "problem" if launched else "note", text, remedy)
    else:
        local = config.train.micro_step_samples // world
        yield _found("ranks", "ok", f"{world}, each {local} samples of {num_tokens(config.model)} tokens a micro-step")
    if needs.memory:
        yield _found("memory of a rank", "ok", f"{size(needs.memory)} by the plan", values={"bytes": needs.memory})
    text = f"{size(needs.checkpoint)} each; {config.checkpoint.keep_last} are kept"
    text += f", and those of every {config.checkpoint.keep_every} steps" if config.checkpoint.keep_every else ""
    yield _found("checkpoints", "ok", text, values={"bytes": needs.checkpoint})


def check_folders(config: Config) -> Iterator[Finding]:
    """Whether this host has the folders that the config names; data, encoders, weights to start from."""
    for folder in folders(config):
        if is_remote(folder):
            yield _found("data", "ok", f"{shown(folder)}, fetched when it is needed; not tried here")
        elif config.data.mode == "indexed" and not Path(folder, MANIFEST_NAME).is_file():
            remedy = "give a prepared dataset with data.folder=..., one that all hosts see (see data_prep)"
            yield _found("data", "problem", f"there is no {MANIFEST_NAME} in {Path(folder).absolute()}", remedy)
        else:
            yield _found("data", "ok", folder)
    named = (
        ("text.folder", config.text.folder if config.text.online else None),
        ("sample.vae", config.sample.vae if config.sample.grid_every else None),
        ("init_from", config.init_from),
    )
    for key, path in named:
        if path is not None and not Path(path).exists():
            near = existing(Path(path))
            remedy = f"give it with {key}=...; the nearest folder that is there is {near}"
            yield _found(key, "problem", f"{path} is not there", remedy)
