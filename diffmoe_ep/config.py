"""Every knob of a run, typed and documented: defaults <- YAML <- dotted overrides, strict, with the cross-checks that need no device.

One YAML file describes a run. Each section below is a frozen dataclass; each field's `doc` is its manual (`diffmoe keys` prints them
all). An unknown key, a wrong type or numbers that cannot work together raise `ConfigError`, whose message names key, value and remedy.
"""

import difflib
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend: its message names key or file, value and remedy, and is shown as it is, without a traceback."""

    def __init__(self, message: str, everywhere: bool = False) -> None:
        """everywhere: all ranks raise it alike, so that telling it once is enough."""
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(UserError):
    """A mistake in a run's configuration."""


POSITIVE = (lambda value: value > 0, "greater than 0")
NATURAL = (lambda value: value >= 0, "at least 0")
SHARE = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def knob(default: Any, doc: str, limits: tuple[Callable[[Any], bool], str] | None = None) -> Any:
    """Declare a field with its default, its manual line and the numbers that it may hold."""
    return field(default=default, metadata={"doc": doc, "limits": limits})


def section(kind: type) -> Any:
    """Declare a nested section with all its defaults."""
    return field(default_factory=kind, metadata={"doc": (kind.__doc__ or "").strip().splitlines()[0]})


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are drawn."""

    folder: str = knob("data", "dataset folder (manifest.json, webdataset shards and their indexes)")
    workers: int = knob(2, "loader processes per rank; 0 reads in the training process; never changes what is read", NATURAL)
    prefetch: int = knob(4, "micro-batches that each worker keeps ready", POSITIVE)
    flip: bool = knob(True, "mirror each sample with probability 0.5 (keyed by its position)")
    drop_condition: float = knob(0.1, "probability that a sample's condition is replaced by the null class (guidance needs some)", SHARE)
    shuffle_block: int = knob(
        8, "shards whose samples are shuffled together, after the shards' own order; 0 reads in stored order", NATURAL
    )


SIZES = {  # hidden, blocks, heads; the paper's Table 1, the two largest inferred from the parameter counts of its Table 5
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "XXL": (1280, 32, 16),
    "XXXL": (1440, 36, 20),
}


@dataclass(frozen=True)
class ModelConfig:
    """The network: a dense DiT, or one in which every second block's FFN is an MoE layer."""

    family: Literal["diffmoe", "ec", "tc", "dense"] = knob(
        "diffmoe", "experts choose from a pool; from each sample; tokens choose; no experts"
    )
    size: Literal["S", "B", "L", "XL", "XXL", "XXXL"] | None = knob(
        None, "the paper's hidden, blocks and heads by name; or give them yourself"
    )
    input_size: int = knob(32, "height and width of the (latent) image", POSITIVE)
    in_channels: int = knob(4, "channels of the (latent) image", POSITIVE)
    out_channels: int = knob(8, "channels predicted; under flow those after in_channels (learned variance) are unused", POSITIVE)
    patch: int = knob(2, "height and width of a token in (latent) pixels", POSITIVE)
    hidden: int = knob(384, "width D of a token", POSITIVE)
    blocks: int = knob(12, "transformer blocks L", POSITIVE)
    heads: int = knob(6, "attention heads H; hidden must be a multiple", POSITIVE)
    num_classes: int = knob(1000, "classes; the label table has one row more, the null class", POSITIVE)
    interleave: bool = knob(True, "MoE in blocks 1, 3, 5, ...; false: in every block")
    num_experts: int = knob(16, "experts N of an MoE layer", POSITIVE)
    granularity: int = knob(1, "m: experts are 4D/m wide, so N experts do the work of N/m", POSITIVE)
    shared_experts: int = knob(0, "experts (4D/m wide) that every token passes besides", NATURAL)
    top_k: int = knob(1, "experts that a token chooses (tc); times granularity for equal compute", POSITIVE)
    balance_weight: float = knob(0.01, "weight of the balance loss (tc)", NATURAL)
    predictor: bool | None = knob(None, "capacity predictor and dynamic thresholds; null: diffmoe has them, ec not; tc never")
    kernel: Literal["auto", "loop"] = knob("auto", "auto: one batched matmul where experts have equally many rows; loop: one by one")
    predictor_weight: float = knob(1.0, "weight of the capacity predictors' loss")
    predictor_reduction: Literal["sum", "mean"] = knob("sum", "over MoE layers: sum (the published code) or mean (the paper's Eq. 12)")
    threshold_decay: float = knob(0.95, "decay of the dynamic thresholds (the paper's Eq. 17)", SHARE)


@dataclass(frozen=True)
class PoolConfig:
    """What the experts choose from."""

    span: int | Literal["all"] = knob("all", "samples in one pool: all = the micro-step of all ranks; 1 = each sample by itself")
    select: Literal["gather"] = knob("gather", "how ranks find the exact top-k together: gather = all-gather the scores")
    capacity: float = knob(1.0, "capacity factor C in training: each expert takes floor(P * C / N) of the P tokens of a pool", POSITIVE)


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are moved."""

    kind: Literal["adamw", "sgd"] = knob("adamw", "adamw or sgd")
    rate: float = knob(1e-4, "peak learning rate", POSITIVE)
    betas: tuple[float, float] = knob((0.9, 0.999), "AdamW's decays of the two moments")
    eps: float = knob(1e-8, "AdamW's epsilon", POSITIVE)
    weight_decay: float = knob(0.0, "decoupled weight decay for adamw, L2 for sgd", NATURAL)
    momentum: float = knob(0.0, "momentum of sgd", SHARE)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over steps: a linear warm-up, then constant, or falling to `final` times the peak at the last step."""

    kind: Literal["constant", "linear", "cosine"] = knob("constant", "shape after the warm-up")
    warmup: int = knob(0, "steps of linear warm-up from 0", NATURAL)
    final: float = knob(0.0, "last rate as a fraction of the peak (linear and cosine)")


@dataclass(frozen=True)
class EmaConfig:
    """The averaged weights that are sampled from."""

    decay: float = knob(0.9999, "decay of the average per step", SHARE)
    ramp: bool = knob(False, "use min(decay, (1 + step) / (10 + step)), so that a short run is not held by its first weights")
    thresholds: Literal["live", "averaged"] = knob("live", "thresholds it carries: the live ones, or averaged too (too low early in a run)")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many at a time, in which precision."""

    objective: Literal["flow", "ddpm"] = knob("flow", "rectified flow, uniform time; or DDPM with learned variance (2 * in_channels out)")
    steps: int = knob(100_000, "optimiser steps of the whole run", POSITIVE)
    batch: int = knob(256, "samples of one optimiser step over all ranks", POSITIVE)
    accumulation: int = knob(1, "micro-steps into which a step's samples are cut; pools lie inside a micro-step", POSITIVE)
    precision: Literal["bf16", "float32"] = knob("bf16", "compute type; weights, moments, router, thresholds and EMA are float32 in both")
    clip: float = knob(0.0, "largest global gradient norm; 0 = no clipping", NATURAL)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    ema: EmaConfig = section(EmaConfig)


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is laid over ranks. Nothing here changes what is computed."""

    expert: int = knob(1, "expert parallelism EP: ranks over which one copy of the experts is sharded", POSITIVE)
    zero: int = knob(1, "DeepSpeed ZeRO stage: 0, 1 or 2")
    timeout_minutes: int = knob(10, "longest wait for a peer in any collective", POSITIVE)
    deepspeed: str | None = knob(None, "a DeepSpeed JSON file whose settings are merged in (not those that this config decides)")


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn, in training's sample grids, `diffmoe sample` and `diffmoe evaluate`."""

    sampler: Literal["euler", "heun", "dopri5", "ddpm", "ddim"] = knob("euler", "the solver; ddpm (ancestral) and ddim need objective ddpm")
    steps: int = knob(250, "steps of the solver; heun evaluates twice in each; dopri5 chooses its own", POSITIVE)
    eta: float = knob(0.0, "noise of ddim: 0 none, 1 as ddpm", NATURAL)
    rtol: float = knob(1e-5, "relative tolerance of dopri5", POSITIVE)
    atol: float = knob(1e-5, "absolute tolerance of dopri5", POSITIVE)
    guidance: float = knob(1.5, "classifier-free guidance scale; 1 = none")
    guidance_interval: tuple[float, float] | None = knob(None, "times [low, high] between which guidance acts, 1 = noise; null: always")
    guidance_channels: int | None = knob(None, "channels that are guided, from the first; null: all of the (latent) image")
    chunk: int = knob(64, "samples computed together; part of the protocol, so that results do not depend on the number of ranks", POSITIVE)
    selection: Literal["auto", "threshold", "count", "topk"] = knob(
        "auto", "tokens over the threshold; as many, by score; the training rule; auto: threshold where there is a predictor, else topk"
    )
    threshold: float | Literal["dynamic", "raw"] = knob("dynamic", "moving average, bias-corrected or raw; or one number for every expert")
    capacity: float = knob(1.0, "capacity factor of `topk`", POSITIVE)
    weights: Literal["ema", "model"] = knob("ema", "averaged or live weights")
    grid_every: int = knob(0, "steps between sample grids while training; 0 = none", NATURAL)
    grid_size: int = knob(80, "samples in such a grid, classes in turn", POSITIVE)


@dataclass(frozen=True)
class LogConfig:
    """What a run tells."""

    every: int = knob(10, "steps between lines in metrics.jsonl (and updates of the progress bar)", POSITIVE)
    tensorboard: bool = knob(False, "also write TensorBoard events to the run folder, through DeepSpeed's monitor")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run keeps."""

    every: int = knob(1000, "steps between checkpoints; the last step is always saved", POSITIVE)
    keep_last: int = knob(2, "newest checkpoints that are kept", POSITIVE)
    keep_every: int = knob(0, "checkpoints at multiples of this many steps are kept for ever; 0 = none", NATURAL)


@dataclass(frozen=True)
class Config:
    """One run."""

    folder: str = knob("runs/run", "run folder: config, metrics, sample grids, checkpoints")
    seed: int = knob(0, "seed of everything random; drawn per sample position, expert and step, never per rank", NATURAL)
    resume: Literal["auto", "never"] = knob("auto", "auto: continue from the folder's newest checkpoint; never: refuse such a folder")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    pool: PoolConfig = section(PoolConfig)
    train: TrainConfig = section(TrainConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    sample: SampleConfig = section(SampleConfig)
    log: LogConfig = section(LogConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay dotted overrides ("train.steps=20") over it and build the typed, checked config.

    Raises ConfigError for a missing or malformed file, an unknown key (the nearest is named), a wrong type or numbers that contradict.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; give the path of a YAML file, for example configs/digits.yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from error
    return from_tree({} if tree is None else tree, overrides)


def from_tree(tree: Any, overrides: Sequence[str] = ()) -> Config:
    """Build a config from a plain tree of dictionaries and dotted overrides; see `load`."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a config is a mapping of keys, got {_show(tree)}")
    try:
        merged = json.loads(json.dumps(tree))  # a deep copy, and proof that it is plain data
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config holds a value that is no plain text, number or list ({error}); put it in quotes") from error
    for override in overrides:
        _lay_over(merged, override)
    model = merged.get("model")
    if isinstance(model, dict) and model.get("size") in SIZES:  # a name stands for its three numbers
        merged["model"] = dict(zip(("hidden", "blocks", "heads"), SIZES[model["size"]], strict=True)) | model
    config = _build(Config, merged, "")
    check(config)
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Lay dotted overrides over a built config."""
    return from_tree(to_tree(config), overrides)


def to_tree(config: Any) -> dict[str, Any]:
    """Give a config (or a section) as plain data; tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def dump(config: Config) -> str:
    """Write a config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)


def keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted key, type, default, manual line) of every knob."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        hint = hints[entry.name]
        if is_dataclass(hint):
            yield from keys(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + entry.name, _name(hint), entry.default, entry.metadata["doc"]


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example train.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    *path, last = key.split(".")
    place = tree
    for part in path:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    place[last] = value


def _build(kind: type[T], tree: Any, path: str) -> T:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path.rstrip('.')}: expected a section with keys, got {_show(tree)}")
    hints = get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise ConfigError(_unknown(f"{path}{key}", hints))
    return kind(**{key: _value(hints[key], value, f"{path}{key}") for key, value in tree.items()})


def _unknown(key: str, hints: Mapping[str, Any]) -> str:
    name = key.rpartition(".")[2]
    every = [entry[0] for entry in keys()]
    near = difflib.get_close_matches(name, list(hints), n=1, cutoff=0.6)
    if near:
        guess = key[: len(key) - len(name)] + near[0]
    else:
        elsewhere = [other for other in every if other.rpartition(".")[2] == name] or difflib.get_close_matches(key, every, n=1, cutoff=0.6)
        if not elsewhere:
            return f"unknown key {key}; the keys here are {', '.join(hints)}"
        guess = elsewhere[0]
    return f"unknown key {key}; did you mean {guess}?"


def _value(hint: Any, value: Any, key: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, key + ".")  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            try:
                return _value(member, value, key)
            except ConfigError:
                continue
    elif get_origin(hint) is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
        near = difflib.get_close_matches(str(value), [str(member) for member in get_args(hint)], n=1)
        raise ConfigError(f"{key}: {_show(value)} is not one of {_name(hint)}" + (f"; did you mean {near[0]}?" if near else ""))
    elif get_origin(hint) is tuple:
        members = get_args(hint)
        if isinstance(value, list | tuple) and len(value) == len(members):
            return tuple(_value(member, item, f"{key}[{index}]") for index, (member, item) in enumerate(zip(members, value, strict=True)))
    elif hint is types.NoneType:
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{key}: expected a number, got {_show(value)}") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{key}: expected a finite number, got {value}")
            return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {_name(hint)}, got {_show(value)}")


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(str(member) for member in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_name(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return f"[{', '.join(_name(member) for member in get_args(hint))}]"
    return {types.NoneType: "null", bool: "true | false"}.get(hint, hint.__name__)


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"


# ---------------------------------------------------------------------------------------------------------------------------------
# Cross-checks
# ---------------------------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Check what follows from the config alone; raises ConfigError at the first contradiction."""
    model, train = config.model, config.train
    _check_limits(config, "")
    if model.size is not None and (model.hidden, model.blocks, model.heads) != SIZES[model.size]:
        hidden, blocks, heads = SIZES[model.size]
        raise ConfigError(
            f"model.size {model.size} means hidden {hidden}, blocks {blocks}, heads {heads}, but the config has {model.hidden}, "
            f"{model.blocks}, {model.heads}; set model.size=null, or remove the others"
        )
    if model.input_size % model.patch:
        raise ConfigError(f"model.input_size {model.input_size} is not a multiple of model.patch {model.patch}")
    if model.hidden % model.heads or model.hidden % 4:
        raise ConfigError(f"model.hidden {model.hidden} must be a multiple of model.heads ({model.heads}) and of 4 (positions)")
    if model.out_channels < model.in_channels:
        raise ConfigError(
            f"model.out_channels {model.out_channels} is less than model.in_channels {model.in_channels}; flow predicts all of them"
        )
    _check_sampling(config)
    if config.parallel.zero not in (0, 1, 2):
        reason = "DeepSpeed refuses ZeRO-3 with native MoE layers, whose experts parallel.expert shards; use 2"
        raise ConfigError(
            f"parallel.zero is {config.parallel.zero}: {reason if config.parallel.zero == 3 else 'the stages are 0, 1 and 2'}"
        )
    if model.family == "dense" and config.parallel.expert != 1:
        raise ConfigError(
            f"parallel.expert is {config.parallel.expert}, but model.family dense has no experts to shard; set parallel.expert=1"
        )
    if train.batch % train.accumulation:
        raise ConfigError(
            f"train.batch {train.batch} is not a multiple of train.accumulation {train.accumulation}; "
            f"accumulation that divides it: {_divisors(train.batch)}"
        )
    if not all(0 <= beta < 1 for beta in train.optimizer.betas):
        raise ConfigError(f"train.optimizer.betas are {list(train.optimizer.betas)}; they must be at least 0 and less than 1")
    if config.seed >= 2**63:
        raise ConfigError(f"seed is {config.seed}; it must be less than 2^63")
    if has_experts(model):
        _check_experts(config)


def _check_sampling(config: Config) -> None:
    model, sample, objective = config.model, config.sample, config.train.objective
    if objective == "ddpm" and model.out_channels != 2 * model.in_channels:
        raise ConfigError(
            f"train.objective ddpm learns a variance too: model.out_channels is {model.out_channels}, set it to {2 * model.in_channels}"
        )
    if sample.sampler in ("ddpm", "ddim") and objective != "ddpm":
        raise ConfigError(
            f"sample.sampler {sample.sampler} needs a model of train.objective ddpm, this one is of {objective}; set euler or heun"
        )
    if sample.sampler in ("ddpm", "ddim") and sample.steps > 1000:
        raise ConfigError(f"sample.steps is {sample.steps}, but {sample.sampler} chooses among 1000 steps; set at most 1000")
    low, high = sample.guidance_interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"sample.guidance_interval is [{low:g}, {high:g}]; it must be 0 <= low <= high <= 1")
    if sample.guidance_channels is not None and not 1 <= sample.guidance_channels <= model.in_channels:
        raise ConfigError(
            f"sample.guidance_channels is {sample.guidance_channels}; it must be 1 to {model.in_channels} (model.in_channels), or null"
        )


def _check_limits(part: Any, prefix: str) -> None:
    for entry in fields(part):
        value, limits = getattr(part, entry.name), entry.metadata.get("limits")
        if is_dataclass(value):
            _check_limits(value, f"{prefix}{entry.name}.")
        elif limits is not None and not limits[0](value):
            raise ConfigError(f"{prefix}{entry.name} is {value}; it must be {limits[1]}")


def _check_experts(config: Config) -> None:
    num_experts, expert = config.model.num_experts, config.parallel.expert
    if num_experts % expert:
        raise ConfigError(
            f"model.num_experts {num_experts} is not a multiple of parallel.expert {expert}; "
            f"parallel.expert that divides it: {_divisors(num_experts)}"
        )
    micro = config.train.batch // config.train.accumulation
    if isinstance(config.pool.span, int) and (config.pool.span < 1 or micro % config.pool.span):
        raise ConfigError(
            f"pool.span {config.pool.span} does not divide the {micro} samples of a micro-step "
            f"(train.batch / train.accumulation); spans that do: {_divisors(micro)}"
        )
    if not config.model.interleave or config.model.blocks > 1:
        pool, tokens = pool_samples(config), num_tokens(config.model)
        if config.model.family != "tc":
            tokens_per_expert(pool * tokens, config.pool.capacity, num_experts, "pool.capacity", config.model.granularity)
    _check_family(config)


def _check_family(config: Config) -> None:
    model = config.model
    if 4 * model.hidden % model.granularity or model.num_experts % model.granularity:
        raise ConfigError(
            f"model.granularity {model.granularity} must divide 4 * model.hidden ({4 * model.hidden}) and model.num_experts "
            f"({model.num_experts})"
        )
    if model.family == "tc" and model.top_k > model.num_experts:
        raise ConfigError(f"model.top_k {model.top_k} is more than model.num_experts {model.num_experts}")
    if model.family == "tc" and model.predictor:
        raise ConfigError("model.predictor is true, but in family tc tokens choose and nothing is to predict; set model.predictor=null")
    if model.family == "ec" and config.pool.span not in ("all", 1):
        raise ConfigError(
            f"pool.span is {config.pool.span}, but in family ec a pool is one sample; set pool.span=1, or model.family=diffmoe"
        )
    if config.sample.selection in ("threshold", "count") and not has_predictor(model):
        raise ConfigError(
            f"sample.selection {config.sample.selection} needs a capacity predictor, which family {model.family} has not here; "
            "set sample.selection=auto" + ("" if model.family == "tc" else ", or train with model.predictor=true")
        )


def check_world(config: Config, world: int) -> None:
    """Check what follows from the number of ranks W; raises ConfigError."""
    expert, micro = config.parallel.expert, config.train.batch // config.train.accumulation
    if world < expert:
        raise ConfigError(
            f"parallel.expert is {expert} but only {world} {'process was' if world == 1 else 'processes were'} started; start at least "
            f"{expert} (deepspeed --num_gpus {expert} --module diffmoe_ep ..., or torchrun --nproc-per-node {expert} -m diffmoe_ep ...) "
            f"or set parallel.expert={world}"
        )
    if world % expert:
        raise ConfigError(
            f"the number of ranks {world} is not a multiple of parallel.expert {expert}; "
            f"parallel.expert that divides it: {_divisors(world)}"
        )
    if micro % world:
        raise ConfigError(
            f"train.batch {config.train.batch} / train.accumulation {config.train.accumulation} = {micro} samples of a micro-step do not "
            f"divide over {world} ranks; make train.batch a multiple of {world * config.train.accumulation}"
        )
    span, local = pool_samples(config), micro // world
    if has_experts(config.model) and local % span and span % local:
        fits = [size for size in range(1, micro + 1) if micro % size == 0 and (local % size == 0 or size % local == 0)]
        raise ConfigError(
            f"pool.span {span} neither lies inside a rank's {local} samples nor covers whole ranks; spans that fit: "
            f"{', '.join(map(str, fits))}, all"
        )


def num_tokens(model: ModelConfig) -> int:
    """Tokens T of one sample."""
    return (model.input_size // model.patch) ** 2


def has_experts(model: ModelConfig) -> bool:
    """Whether there are MoE layers."""
    return model.family != "dense"


def has_predictor(model: ModelConfig) -> bool:
    """Whether MoE layers have a capacity predictor."""
    return model.family in ("diffmoe", "ec") and (model.family == "diffmoe" if model.predictor is None else model.predictor)


def pool_samples(config: Config) -> int:
    """Samples in one training pool."""
    if config.model.family == "ec":
        return 1
    return config.train.batch // config.train.accumulation if config.pool.span == "all" else config.pool.span


def tokens_per_expert(pool: int, capacity: float, num_experts: int, key: str = "capacity", granularity: int = 1) -> int:
    """Tokens k = floor(P * C * m / N) that an expert takes from a pool of P; raises ConfigError when that is none, or more than P."""
    taken = int(Fraction(str(capacity)) * pool * granularity / num_experts)  # exact: in floats, 100 * 0.58 / 2 falls below 29
    if taken < 1 or capacity * granularity > num_experts:
        raise ConfigError(
            f"{key} {capacity:g} with a pool of {pool} tokens and {num_experts} experts lets each expert take "
            f"floor({pool} * {capacity:g} / {num_experts}) = {taken} tokens; it must be at least 1 and at most the pool: change {key}, "
            "the pool's size or model.num_experts"
        )
    return taken


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
