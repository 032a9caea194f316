"""Cross-checks of a config that need no device, and the numbers that follow from it."""

import math
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from diffmoe_ep.config.knob import ConfigError
from diffmoe_ep.config.schema import SIZES, Config, DataConfig, ModelConfig

MOST_PROFILED = 100  # steps; the traces of more take too much memory to be written or looked at
MOST_TRIED, MOST_LISTED = 65_536, 100  # numbers that are tried as divisors for a message, and that stand in it
MOST_NUMBERS = 10**14  # of a tensor
MOST_BLOCKS = 10_000


def check(config: Config) -> None:
    """Check what follows from the config alone; raises ConfigError at the first contradiction."""
    model, train = config.model, config.train
    check_limits(config)
    if model.size is not None and (model.hidden_size, model.num_blocks, model.num_heads) != SIZES[model.size]:
        hidden, blocks, heads = SIZES[model.size]
        raise ConfigError(
            f"model.size {model.size} means hidden_size {hidden}, num_blocks {blocks}, num_heads {heads}, but the "
            f"config has {model.hidden_size}, "
            f"{model.num_blocks}, {model.num_heads}; set model.size=null, or remove the others"
        )
    if model.input_size % model.patch:
        raise ConfigError(f"model.input_size {model.input_size} is not a multiple of model.patch {model.patch}")
    if model.hidden_size % model.num_heads or model.hidden_size % 4:
        raise ConfigError(
            f"model.hidden_size {model.hidden_size} must be a multiple of model.num_heads ({model.num_heads}) and of "
            "4 (positions)"
        )
    if model.out_channels < model.in_channels:
        raise ConfigError(
            f"model.out_channels {model.out_channels} is less than model.in_channels {model.in_channels}; flow "
            "predicts all of them"
        )
    _check_size(model)
    _check_start(config)
    _check_data(config)
    _check_sampling(config)
    _check_log(config)
    if config.parallel.zero_stage not in (0, 1, 2):
        reason = "DeepSpeed refuses ZeRO-3 with native MoE layers, whose experts parallel.expert_parallel shards; use 2"
        raise ConfigError(
            f"parallel.zero_stage is {config.parallel.zero_stage}: "
            f"{reason if config.parallel.zero_stage == 3 else 'the stages are 0, 1 and 2'}"
        )
    if model.family == "dense" and config.parallel.expert_parallel != 1:
        raise ConfigError(
            f"parallel.expert_parallel is {config.parallel.expert_parallel}, but model.family dense has no experts "
            "to shard; set parallel.expert_parallel=1"
        )
    if train.global_batch % train.grad_accumulation:
        raise ConfigError(
            f"train.global_batch {train.global_batch} is not a multiple of train.grad_accumulation "
            f"{train.grad_accumulation}; "
            f"accumulation that divides it: {_divisors(train.global_batch)}"
        )
    if not all(0 <= beta < 1 for beta in train.optimizer.betas):
        raise ConfigError(
            f"train.optimizer.betas are {list(train.optimizer.betas)}; they must be at least 0 and less than 1"
        )
    if config.seed >= 2**63:
        raise ConfigError(f"seed is {config.seed}; it must be less than 2^63")
    if has_experts(model):
        _check_experts(config)


def _check_size(model: ModelConfig) -> None:
    """Sizes that no machine holds would end in the middle of building the model, or keep it building."""
    made = {
        "num_experts": 4 * model.hidden_size * model.hidden_size * max(model.num_experts, 1),
        "input_size": num_tokens(model) * model.hidden_size,
        "patch": model.patch**2 * max(model.in_channels, model.out_channels) * model.hidden_size,
        "num_classes": model.num_classes * model.hidden_size,
        "text_width": model.text_width * model.hidden_size,
    }
    for key, numbers in made.items():
        if numbers > MOST_NUMBERS:
            raise ConfigError(
                f"model.{key} {getattr(model, key)} with model.hidden_size {model.hidden_size} makes a tensor of "
                f"{numbers:,} numbers, which no machine holds; lower one of them"
            )
    if model.num_blocks > MOST_BLOCKS:
        raise ConfigError(f"model.num_blocks is {model.num_blocks}; it must be at most {MOST_BLOCKS:,}")


def _check_start(config: Config) -> None:
    if config.init_from is None:
        return
    if not config.init_from:
        raise ConfigError(
            "init_from is empty; give a run folder, a checkpoint or an exported folder, or null to start from the seed"
        )
    if Path(os.path.normpath(config.init_from)).is_relative_to(os.path.normpath(config.folder)):
        raise ConfigError(
            f"init_from {config.init_from} is this run's own folder; a run continues its own checkpoints without it "
            "(resume=auto): "
            "set init_from=null, or give the new run another folder"
        )


def _check_data(config: Config) -> None:
    data, micro = config.data, config.train.micro_step_samples
    if data.mode == "resampled":
        text = config.model.condition == "text"
        for key, wrong in (("mixture", bool(data.mixture)), ("lanes", data.lanes > 1)):
            if wrong:
                raise ConfigError(
                    f"data.mode is resampled, and data.{key} is only for indexed datasets; index the tars, or unset it"
                )
        if text and not config.text.online:
            raise ConfigError(
                "data.mode is resampled, so captions come as words; set text.online=true and text.folder, or index "
                "the tars"
            )
        if text and config.sample.grid_every and not config.sample.prompts:
            raise ConfigError(
                "sample.grid_every takes captions from an indexed dataset; with data.mode=resampled set "
                "sample.prompts, or sample.grid_every=0"
            )
    if data.mixture and data.folder != DataConfig.folder:
        raise ConfigError(
            f"data.folder is {data.folder} and data.mixture names datasets too; set data.folder={DataConfig.folder}, "
            "or no mixture"
        )
    folders = [part.folder for part in data.mixture]
    for number, folder in enumerate(folders):
        if not folder or folder in folders[:number]:
            state = "is missing" if not folder else f"{folder} is named twice"
            raise ConfigError(f"data.mixture[{number}].folder {state}; name each dataset once, with its weight")
    if micro % data.lanes:
        raise ConfigError(
            f"data.lanes {data.lanes} does not divide the {micro} samples of a micro-step (train.global_batch / "
            "train.grad_accumulation); "
            f"lanes that do: {_divisors(micro)}"
        )
    waits = sum(min(2**attempt, 60) for attempt in range(min(data.retries, 10_000)))
    if waits >= 60 * config.parallel.timeout_minutes:
        raise ConfigError(
            f"data.retries {data.retries} wait {waits} seconds for a shard, but the other ranks wait no longer than "
            f"parallel.timeout_minutes {config.parallel.timeout_minutes:g}; lower data.retries or raise the timeout"
        )


def _check_sampling(config: Config) -> None:
    model, sample, objective = config.model, config.sample, config.train.objective
    if objective == "ddpm" and model.out_channels != 2 * model.in_channels:
        raise ConfigError(
            f"train.objective ddpm learns a variance too: model.out_channels is {model.out_channels}, set it to "
            f"{2 * model.in_channels}"
        )
    if sample.sampler in ("ddpm", "ddim") and objective != "ddpm":
        raise ConfigError(
            f"sample.sampler {sample.sampler} needs a model of train.objective ddpm, this one is of {objective}; set "
            "euler or heun"
        )
    if sample.sampler in ("ddpm", "ddim") and sample.steps > 1000:
        raise ConfigError(
            f"sample.steps is {sample.steps}, but {sample.sampler} chooses among 1000 steps; set at most 1000"
        )
    if sample.prompts and model.condition == "class":
        raise ConfigError(
            "sample.prompts are words, but model.condition is class, whose grids show the classes in turn; set "
            "sample.prompts=[]"
        )
    low, high = sample.guidance_interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"sample.guidance_interval is [{low:g}, {high:g}]; it must be 0 <= low <= high <= 1")
    if sample.guidance_channels is not None and not 1 <= sample.guidance_channels <= model.in_channels:
        raise ConfigError(
            f"sample.guidance_channels is {sample.guidance_channels}; it must be 1 to {model.in_channels} "
            "(model.in_channels), or null"
        )


def _check_log(config: Config) -> None:
    if config.log.profile is None:
        return
    first, last = config.log.profile
    if not 1 <= first <= last <= config.train.steps or last - first >= MOST_PROFILED:
        raise ConfigError(
            f"log.profile is [{first}, {last}]; it must be the first and the last of at most {MOST_PROFILED} steps "
            f"from 1 to train.steps {config.train.steps}, or null"
        )


def check_limits(part: Any, prefix: str = "") -> None:
    """Check that each number of a section lies within the limits of its key, which `prefix` begins; raises
    ConfigError.
    """
    for entry in fields(part):
        value, limits = getattr(part, entry.name), entry.metadata.get("limits")
        if is_dataclass(value):
            check_limits(value, f"{prefix}{entry.name}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for number, each in enumerate(value):
                check_limits(each, f"{prefix}{entry.name}[{number}].")
        elif limits is not None and not limits[0](value):
            raise ConfigError(f"{prefix}{entry.name} is {value}; it must be {limits[1]}")


def _check_experts(config: Config) -> None:
    num_experts, expert = config.model.num_experts, config.parallel.expert_parallel
    if num_experts % expert:
        raise ConfigError(
            f"model.num_experts {num_experts} is not a multiple of parallel.expert_parallel {expert}; "
            f"parallel.expert_parallel that divides it: {_divisors(num_experts)}"
        )
    micro = config.train.micro_step_samples
    if isinstance(config.pool.span, int) and (config.pool.span < 1 or micro % config.pool.span):
        raise ConfigError(
            f"pool.span {config.pool.span} does not divide the {micro} samples of a micro-step "
            f"(train.global_batch / train.grad_accumulation); spans that do: {_divisors(micro)}"
        )
    if not config.model.interleave or config.model.num_blocks > 1:
        pool, tokens = pool_samples(config), num_tokens(config.model)
        if config.model.family != "tc":
            tokens_per_expert(
                pool * tokens, config.pool.capacity, num_experts, "pool.capacity", config.model.granularity
            )
    _check_family(config)


def _check_family(config: Config) -> None:
    model = config.model
    if 4 * model.hidden_size % model.granularity or model.num_experts % model.granularity:
        raise ConfigError(
            f"model.granularity {model.granularity} must divide 4 * model.hidden_size ({4 * model.hidden_size}) and "
            "model.num_experts "
            f"({model.num_experts})"
        )
    if model.family == "tc" and model.top_k > model.num_experts:
        raise ConfigError(f"model.top_k {model.top_k} is more than model.num_experts {model.num_experts}")
    if model.family == "tc" and model.predictor:
        raise ConfigError(
            "model.predictor is true, but in family tc tokens choose and nothing is to predict; set "
            "model.predictor=null"
        )
    if model.family == "ec" and config.pool.span not in ("all", 1):
        raise ConfigError(
            f"pool.span is {config.pool.span}, but in family ec a pool is one sample; set pool.span=1, or "
            "model.family=diffmoe"
        )
    if config.sample.selection in ("threshold", "count") and not has_predictor(model):
        raise ConfigError(
            f"sample.selection {config.sample.selection} needs a capacity predictor, which family {model.family} has "
            "not here; "
            "set sample.selection=auto" + ("" if model.family == "tc" else ", or train with model.predictor=true")
        )


def fit_world(config: Config, world: int) -> Config:
    """The config on W ranks: itself, or with `parallel.elastic` as many ranks for a copy of the experts as divide W."""
    parallel = config.parallel
    expert = math.gcd(parallel.expert_parallel, world) if parallel.elastic else parallel.expert_parallel
    return replace(config, parallel=replace(parallel, expert_parallel=expert))


def check_world(config: Config, world: int) -> None:
    """Check what follows from the number of ranks W; raises ConfigError."""
    expert, micro = config.parallel.expert_parallel, config.train.micro_step_samples
    if world < expert:
        raise ConfigError(
            f"parallel.expert_parallel is {expert} but only {world} "
            f"{'process was' if world == 1 else 'processes were'} started; start at least "
            f"{expert} (deepspeed --num_gpus {expert} --module diffmoe_ep ..., or torchrun --nproc-per-node {expert} "
            "-m diffmoe_ep ...) "
            f"or set parallel.expert_parallel={world}"
        )
    if world % expert:
        raise ConfigError(
            f"the number of ranks {world} is not a multiple of parallel.expert_parallel {expert}; "
            f"parallel.expert_parallel that divides it: {_divisors(world)}; parallel.elastic=true takes "
            f"{math.gcd(world, expert)}"
        )
    if micro % world:
        raise ConfigError(
            f"train.global_batch {config.train.global_batch} / train.grad_accumulation "
            f"{config.train.grad_accumulation} = {micro} samples of a micro-step do not "
            f"divide over {world} ranks; make train.global_batch a multiple of {world * config.train.grad_accumulation}"
        )
    span, local = pool_samples(config), micro // world
    if has_experts(config.model) and local % span and span % local:
        fits = _divisors(micro, lambda size: local % size == 0 or size % local == 0)
        raise ConfigError(
            f"pool.span {span} neither lies inside a rank's {local} samples nor covers whole ranks; spans that fit: "
            f"{fits}, all"
        )


def num_tokens(model: ModelConfig) -> int:
    """Tokens T of one sample."""
    return (model.input_size // model.patch) ** 2


def has_experts(model: ModelConfig) -> bool:
    """Whether there are MoE layers."""
    return model.family != "dense"


def has_predictor(model: ModelConfig) -> bool:
    """Whether MoE layers have a capacity predictor."""
    return model.family in ("diffmoe", "ec") and (
        model.family == "diffmoe" if model.predictor is None else model.predictor
    )


def pool_samples(config: Config) -> int:
    """Samples in one training pool."""
    if config.model.family == "ec":
        return 1
    return config.train.micro_step_samples if config.pool.span == "all" else config.pool.span


def tokens_per_expert(pool: int, capacity: float, num_experts: int, key: str = "capacity", granularity: int = 1) -> int:
    """Tokens k = floor(P * C * m / N) that an expert takes from a pool of P; raises ConfigError when that is none, or
    more than P.
    """
    taken = int(
        Fraction(str(capacity)) * pool * granularity / num_experts
    )  # exact: in floats, 100 * 0.58 / 2 falls below 29
    if taken < 1 or capacity * granularity > num_experts:
        raise ConfigError(
            f"{key} {capacity:g} with a pool of {pool} tokens and {num_experts} experts lets each expert take "
            f"floor({pool} * {capacity:g} / {num_experts}) = {taken} tokens; it must be at least 1 and at most the "
            f"pool: change {key}, "
            "the pool's size or model.num_experts"
        )
    return taken


def _divisors(number: int, fits: Callable[[int], bool] | None = None) -> str:
    """The divisors of a number that fit; of a number with many, or a vast one, the first."""
    found = (size for size in range(1, min(number, MOST_TRIED) + 1) if number % size == 0)
    listed = [str(size) for size in islice((size for size in found if fits is None or fits(size)), MOST_LISTED)]
    return ", ".join(listed + ["..."] * (number > MOST_TRIED or len(listed) == MOST_LISTED))
