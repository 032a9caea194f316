"""Every knob of a run, typed and documented: each section is a frozen dataclass, each field's `doc` its manual line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(ValueError):
    """A mistake that the user can mend: its message names key or file, value and remedy, and is shown as it is, without
    a traceback.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        """everywhere: all ranks raise it alike, so that telling it once is enough."""
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(UserError):
    """A mistake in a run's configuration."""


POSITIVE = (lambda value: value > 0, "greater than 0")
NON_NEGATIVE = (lambda value: value >= 0, "at least 0")
UNIT_INTERVAL = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def knob(default: Any, doc: str, limits: tuple[Callable[[Any], bool], str] | None = None) -> Any:
    """Declare a field with its default, its manual line and the numbers that it may hold."""
    return field(default=default, metadata={"doc": doc, "limits": limits})


def section(kind: type) -> Any:
    """Declare a nested section with all its defaults."""
    return field(default_factory=kind, metadata={"doc": (kind.__doc__ or "").strip().splitlines()[0]})


@dataclass(frozen=True)
class PartConfig:
    """One dataset of a mixture."""

    folder: str = knob("", "dataset folder, as data.folder")
    weight: float = knob(1.0, "its share of the positions is its weight over the sum of all weights", POSITIVE)


@dataclass(frozen=True)
class PlainConfig:
    """What plain tars hold (data.mode resampled); data.folder is their folder, a URL, or a pattern such as
    https://host/{000..127}.tar.
    """

    kind: Literal["pixels", "moments"] = knob("moments", "what the arrays are")
    array: str = knob("moments.npy", "extension of the arrays' members")
    label: str = knob(
        "cls",
        "extension of the labels' members; of captions in words where model.condition is text (needs text.online)",
    )
    scale: float = knob(0.18215, "final latent = stored * scale + shift")
    shift: float = knob(0.0, "see scale")
    shuffle: int = knob(1000, "samples that each worker holds and draws from", POSITIVE)


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are drawn."""

    folder: str = knob(
        "data",
        "dataset folder (manifest.json, webdataset shards and their indexes), or its URL: https:, s3:, pipe:, ...",
    )
    mode: Literal["indexed", "resampled"] = knob(
        "indexed",
        "prepared datasets, in an order that resumes exactly; or plain tars without an index, drawn at random: which "
        "samples are read "
        "then depends on ranks, workers and restarts, and there are no epochs",
    )
    plain: PlainConfig = section(PlainConfig)
    mixture: tuple[PartConfig, ...] = knob(
        (), "datasets mixed by weight, [{folder: a, weight: 3}, {folder: b}], in place of data.folder"
    )
    workers: int = knob(
        2, "loader processes per rank; 0 reads in the training process; never changes what is read", NON_NEGATIVE
    )
    prefetch: int = knob(4, "micro-batches that each worker keeps ready", POSITIVE)
    flip: bool = knob(True, "mirror each sample with probability 0.5 (keyed by its position)")
    condition_dropout: float = knob(
        0.1, "probability that a sample's condition is replaced by the null class (guidance needs some)", UNIT_INTERVAL
    )
    shuffle_block: int = knob(
        8,
        "shards whose samples are shuffled together, after the shards' own order; 0 reads in stored order",
        NON_NEGATIVE,
    )
    lanes: int = knob(
        1,
        "equal slices of a micro-step that have shards of their own, so that a rank or node reads few; part of the "
        "order",
        POSITIVE,
    )
    max_bad_fraction: float = knob(
        0.001,
        "share of samples whose bytes may be bad: each is replaced by another of its block and listed; more stop the "
        "run",
        UNIT_INTERVAL,
    )
    retries: int = knob(
        5, "times that a shard which cannot be had is asked for again, after 1, 2, 4, ... 60 seconds", NON_NEGATIVE
    )
    cache: str = knob("cache", "folder of this host for shards fetched from a URL; all its processes share it")
    cache_gb: float = knob(100.0, "most that is kept there, in 10^9 bytes", POSITIVE)
    allow_commands: bool = knob(False, "whether a pipe: URL may run its shell command")


@dataclass(frozen=True)
class TextConfig:
    """How captions become features (model.condition text)."""

    encoder: Literal["t5", "clip"] = knob(
        "t5", "whose features the model is conditioned on; their width is model.text_width"
    )
    folder: str | None = knob(
        None, "local folder of that encoder: for prompts, and for captions without stored features"
    )
    online: bool = knob(
        False, "encode captions while training, though features may be stored; never trained, one encoder on each rank"
    )
    precision: Literal["float32", "bfloat16"] = knob("float32", "type that the encoder computes in")


# hidden_size, num_blocks, num_heads; the paper's Table 1, the two largest inferred from the parameter counts of its
# Table 5
SIZES = {
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
        None, "the paper's hidden_size, num_blocks and num_heads by name; or give them yourself"
    )
    input_size: int = knob(32, "height and width of the (latent) image", POSITIVE)
    in_channels: int = knob(4, "channels of the (latent) image", POSITIVE)
    out_channels: int = knob(
        8, "channels predicted; under flow those after in_channels (learned variance) are unused", POSITIVE
    )
    patch: int = knob(2, "height and width of a token in (latent) pixels", POSITIVE)
    hidden_size: int = knob(384, "width D of a token", POSITIVE)
    num_blocks: int = knob(12, "transformer blocks L", POSITIVE)
    num_heads: int = knob(6, "attention heads H; hidden_size must be a multiple", POSITIVE)
    condition: Literal["class", "text"] = knob(
        "class", "a label, added to the time; or a caption, by cross-attention in every block"
    )
    num_classes: int = knob(
        1000, "classes; the label table has one row more, the null class (condition class)", POSITIVE
    )
    text_width: int = knob(4096, "width of a caption token's features (condition text); 4096: T5-XXL", POSITIVE)
    text_length: int = knob(
        120, "tokens of a caption that the model sees; longer captions are cut (condition text)", POSITIVE
    )
    interleave: bool = knob(True, "MoE in blocks 1, 3, 5, ...; false: in every block")
    num_experts: int = knob(16, "experts N of an MoE layer", POSITIVE)
    granularity: int = knob(1, "m: experts are 4D/m wide, so N experts do the work of N/m", POSITIVE)
    shared_experts: int = knob(0, "experts (4D/m wide) that every token passes besides", NON_NEGATIVE)
    top_k: int = knob(1, "experts that a token chooses (tc); times granularity for equal compute", POSITIVE)
    balance_weight: float = knob(0.01, "weight of the balance loss (tc)", NON_NEGATIVE)
    predictor: bool | None = knob(
        None, "capacity predictor and dynamic thresholds; null: diffmoe has them, ec not; tc never"
    )
    predictor_weight: float = knob(1.0, "weight of the capacity predictors' loss")
    predictor_reduction: Literal["sum", "mean"] = knob(
        "sum", "over MoE layers: sum (the published code) or mean (the paper's Eq. 12)"
    )
    threshold_decay: float = knob(0.95, "decay of the dynamic thresholds (the paper's Eq. 17)", UNIT_INTERVAL)


@dataclass(frozen=True)
class PoolConfig:
    """What the experts choose from."""

    span: int | Literal["all"] = knob(
        "all", "samples in one pool: all = the micro-step of all ranks; 1 = each sample by itself"
    )
    capacity: float = knob(
        1.0, "capacity factor C in training: each expert takes floor(P * C / N) of the P tokens of a pool", POSITIVE
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are moved."""

    kind: Literal["adamw", "sgd"] = knob("adamw", "adamw or sgd")
    lr: float = knob(1e-4, "peak learning rate", POSITIVE)
    betas: tuple[float, float] = knob((0.9, 0.999), "AdamW's decays of the two moments")
    eps: float = knob(1e-8, "AdamW's epsilon", POSITIVE)
    weight_decay: float = knob(0.0, "decoupled weight decay for adamw, L2 for sgd", NON_NEGATIVE)
    expert_lr_scale: float = knob(1.0, "the routed experts' learning rate as a multiple of lr", NON_NEGATIVE)
    router_lr_scale: float = knob(1.0, "the routers' learning rate as a multiple of lr", NON_NEGATIVE)
    momentum: float = knob(0.0, "momentum of sgd", UNIT_INTERVAL)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over steps: a linear warm-up, then constant, or falling to `final` times the peak at the last
    step.
    """

    kind: Literal["constant", "linear", "cosine"] = knob("constant", "shape after the warm-up")
    warmup: int = knob(0, "steps of linear warm-up from 0", NON_NEGATIVE)
    final: float = knob(0.0, "last rate as a fraction of the peak (linear and cosine)")


@dataclass(frozen=True)
class EmaConfig:
    """The averaged weights that are sampled from."""

    decay: float = knob(0.9999, "decay of the average per step", UNIT_INTERVAL)
    ramp: bool = knob(
        False, "use min(decay, (1 + step) / (10 + step)), so that a short run is not held by its first weights"
    )
    thresholds: Literal["live", "averaged"] = knob(
        "live", "thresholds it carries: the live ones, or averaged too (too low early in a run)"
    )


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many at a time, in which precision."""

    objective: Literal["flow", "ddpm"] = knob(
        "flow", "rectified flow, uniform time; or DDPM with learned variance (2 * in_channels out)"
    )
    steps: int = knob(100_000, "optimiser steps of the whole run", POSITIVE)
    global_batch: int = knob(256, "samples of one optimiser step over all ranks", POSITIVE)
    grad_accumulation: int = knob(
        1, "micro-steps into which a step's samples are cut; pools lie inside a micro-step", POSITIVE
    )
    precision: Literal["bf16", "float32"] = knob(
        "bf16", "compute type; weights, moments, router, thresholds and EMA are float32 in both"
    )
    max_grad_norm: float = knob(0.0, "largest global gradient norm; 0 = no clipping", NON_NEGATIVE)
    freeze: tuple[str, ...] = knob(
        (), 'patterns of names (*, ?): parameters that stay as they start, as ["patches.*", "*.attention.*"]'
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    ema: EmaConfig = section(EmaConfig)

    @property
    def micro_step_samples(self) -> int:
        """Samples of one micro-step over all ranks."""
        return self.global_batch // self.grad_accumulation


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is laid over ranks. Nothing here changes what is computed."""

    expert_parallel: int = knob(
        1, "expert parallelism EP: ranks over which one copy of the experts is sharded", POSITIVE
    )
    zero_stage: int = knob(1, "DeepSpeed ZeRO stage: 0, 1 or 2")
    timeout_minutes: int = knob(10, "longest wait for a peer in any collective", POSITIVE)
    deepspeed: str | None = knob(
        None, "a DeepSpeed JSON file whose settings are merged in (not those that this config decides)"
    )


@dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed: nothing here changes a result beyond rounding."""

    kernel: Literal["auto", "loop", "batched", "grouped", "fused"] = knob(
        "auto",
        "how experts compute, all with one result: one by one; one batched matmul, padded where rows are ragged; "
        "torch's grouped matmul "
        "(no float64); one function that writes gradients in place; auto: what was measured quickest for device, "
        "type and evenness",
    )
    topk: Literal["auto", "gather", "owner", "radix"] = knob(
        "auto",
        "how ranks find the exact top-k together, all with one result: gather all scores; send them to columns' "
        "owners; sum histograms; "
        "auto: the cheapest by bytes and rounds",
    )
    recompute: Literal["none", "ffn", "block"] = knob(
        "none",
        "activations not kept for the backward but computed again there (choices are kept): none, those of the FFN "
        "part, all of a block",
    )
    overlap: int = knob(
        1,
        "parts in which rows travel to the experts, so that some travel while others compute; 1: all at once",
        POSITIVE,
    )
    compile: bool = knob(
        False, "compile adaLN, attention, dense FFNs and parts of MoE layers (torch.compile; needs a compiler)"
    )


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn, in training's sample grids, `diffmoe sample` and `diffmoe evaluate`."""

    sampler: Literal["euler", "heun", "dopri5", "ddpm", "ddim"] = knob(
        "euler", "the solver; ddpm (ancestral) and ddim need objective ddpm"
    )
    steps: int = knob(250, "steps of the solver; heun evaluates twice in each; dopri5 chooses its own", POSITIVE)
    eta: float = knob(0.0, "noise of ddim: 0 none, 1 as ddpm", NON_NEGATIVE)
    rtol: float = knob(1e-5, "relative tolerance of dopri5", POSITIVE)
    atol: float = knob(1e-5, "absolute tolerance of dopri5", POSITIVE)
    guidance: float = knob(1.5, "classifier-free guidance scale; 1 = none")
    guidance_interval: tuple[float, float] | None = knob(
        None, "times [low, high] between which guidance acts, 1 = noise; null: always"
    )
    guidance_channels: int | None = knob(
        None, "channels that are guided, from the first; null: all of the (latent) image"
    )
    chunk: int = knob(
        64,
        "samples computed together; part of the protocol, so that results do not depend on the number of ranks",
        POSITIVE,
    )
    selection: Literal["auto", "threshold", "count", "topk"] = knob(
        "auto",
        "tokens over the threshold; as many, by score; the training rule; auto: threshold where there is a "
        "predictor, else topk",
    )
    threshold: float | Literal["dynamic", "raw"] = knob(
        "dynamic", "moving average, bias-corrected or raw; or one number for every expert"
    )
    capacity: float = knob(1.0, "capacity factor of `topk`", POSITIVE)
    weights: Literal["ema", "model"] = knob("ema", "averaged or live weights")
    vae: str | None = knob(
        None, "local folder of the VAE that made the latents, to see samples as pictures; null: latents alone"
    )
    grid_every: int = knob(0, "steps between sample grids while training; 0 = none", NON_NEGATIVE)
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
    keep_every: int = knob(0, "checkpoints at multiples of this many steps are kept for ever; 0 = none", NON_NEGATIVE)


@dataclass(frozen=True)
class Config:
    """One run."""

    folder: str = knob("runs/run", "run folder: config, metrics, sample grids, checkpoints")
    seed: int = knob(
        0, "seed of everything random; drawn per sample position, expert and step, never per rank", NON_NEGATIVE
    )
    resume: Literal["auto", "never"] = knob(
        "auto", "auto: continue from the folder's newest checkpoint; never: refuse such a folder"
    )
    init_from: str | None = knob(
        None,
        "start from the weights (and thresholds) of this run, checkpoint or exported folder; step, rate, data and "
        "moments are new",
    )
    init_weights: Literal["ema", "model"] = knob("ema", "which of its weights: the averaged or the live ones")
    data: DataConfig = section(DataConfig)
    text: TextConfig = section(TextConfig)
    model: ModelConfig = section(ModelConfig)
    pool: PoolConfig = section(PoolConfig)
    train: TrainConfig = section(TrainConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    compute: ComputeConfig = section(ComputeConfig)
    sample: SampleConfig = section(SampleConfig)
    log: LogConfig = section(LogConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
