"""Every key of a run, typed and documented: each section is a frozen dataclass, each field says its role and its manual
line (see `knob`).
"""

from dataclasses import dataclass
from typing import Literal

from diffmoe_ep.config.knob import (
    NON_NEGATIVE,
    POSITIVE,
    UNIT_INTERVAL,
    execution,
    identity,
    recipe,
    reporting,
    section,
)


@dataclass(frozen=True)
class PartConfig:
    """One dataset of a mixture."""

    folder: str = identity("", "dataset folder, as data.folder")
    weight: float = identity(1.0, "its share of the positions is its weight over the sum of all weights", POSITIVE)


@dataclass(frozen=True)
class PlainConfig:
    """What plain tars hold (data.mode resampled); data.folder is their folder, a URL, or a pattern such as
    https://host/{000..127}.tar.
    """

    kind: Literal["pixels", "moments"] = identity("moments", "what the arrays are")
    array: str = identity("moments.npy", "extension of the arrays' members")
    label: str = identity(
        "cls",
        "extension of the labels' members; of captions in words where model.condition is text (needs text.online)",
    )
    scale: float = identity(0.18215, "final latent = stored * scale + shift")
    shift: float = identity(0.0, "see scale")
    shuffle: int = recipe(
        1000,
        "samples that each worker holds and draws from; this mode has no order that a resume could break",
        POSITIVE,
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are drawn."""

    folder: str = identity(
        "data",
        "dataset folder (manifest.json, webdataset shards and their indexes), or its URL: https:, s3:, pipe:, ...; a "
        "resume compares not this name but the fingerprint of what lies there, so it may move and not change: of the "
        "manifest, in which every shard's checksum stands; with data.mode resampled of the tars' paths or URLs and of "
        "what a sample is, so there it may not move, and what tars hold is not compared",
        by_fingerprint=True,
    )
    mode: Literal["indexed", "resampled"] = identity(
        "indexed",
        "prepared datasets, in an order that resumes exactly; or plain tars without an index, drawn at random: which "
        "samples are read then depends on ranks, workers and restarts, and there are no epochs",
    )
    plain: PlainConfig = section(PlainConfig)
    mixture: tuple[PartConfig, ...] = identity(
        (),
        "datasets mixed by weight, [{folder: a, weight: 3}, {folder: b}], in place of data.folder; they may move",
        by_fingerprint=True,
    )
    workers: int = execution(
        2, "loader processes per rank; 0 reads in the training process; never changes what is read", NON_NEGATIVE
    )
    prefetch: int = execution(4, "micro-batches that each worker keeps ready", POSITIVE)
    flip: bool = identity(True, "mirror each sample with probability 0.5 (keyed by its position)")
    condition_dropout: float = identity(
        0.1, "probability that a sample's condition is replaced by the null class (guidance needs some)", UNIT_INTERVAL
    )
    shuffle_block: int = identity(
        8,
        "shards whose samples are shuffled together, after the shards' own order; 0 reads in stored order",
        NON_NEGATIVE,
    )
    lanes: int = identity(
        1,
        "equal slices of a micro-step that have shards of their own, so that a rank or node reads few; part of the "
        "order",
        POSITIVE,
    )
    max_bad_fraction: float = execution(
        0.001,
        "fraction of samples whose bytes may be bad: each is replaced by another of its block and listed; more stop "
        "the run",
        UNIT_INTERVAL,
    )
    retries: int = execution(
        5, "times that an unreachable shard is requested again, after 1, 2, 4, ... 60 seconds", NON_NEGATIVE
    )
    cache: str = execution("cache", "folder of this host for shards fetched from a URL; all its processes share it")
    cache_gb: float = execution(100.0, "most that is kept there, in 10^9 bytes", POSITIVE)
    allow_commands: bool = execution(False, "whether a pipe: URL may run its shell command")


@dataclass(frozen=True)
class TextConfig:
    """How captions become features (model.condition text)."""

    encoder: Literal["t5", "clip"] = identity(
        "t5", "whose features the model is conditioned on; their width is model.text_width"
    )
    folder: str | None = execution(
        None,
        "local folder of that encoder: for prompts, and for captions without stored features; it may move: its "
        "fingerprint is compared with that of stored features, and at a resume with the run's",
    )
    online: bool = recipe(
        False, "encode captions while training, though features may be stored; never trained, one encoder on each rank"
    )
    precision: Literal["float32", "bfloat16"] = recipe("float32", "type that the encoder computes in")


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

    family: Literal["diffmoe", "ec", "tc", "dense"] = identity(
        "diffmoe", "experts choose from a pool; from each sample; tokens choose; no experts"
    )
    size: Literal["S", "B", "L", "XL", "XXL", "XXXL"] | None = identity(
        None, "the paper's hidden_size, num_blocks and num_heads by name; or give them yourself"
    )
    input_size: int = identity(32, "height and width of the (latent) image", POSITIVE)
    in_channels: int = identity(4, "channels of the (latent) image", POSITIVE)
    out_channels: int = identity(
        8, "channels predicted; under flow those after in_channels (learned variance) are unused", POSITIVE
    )
    patch: int = identity(2, "height and width of a token in (latent) pixels", POSITIVE)
    hidden_size: int = identity(384, "width D of a token", POSITIVE)
    num_blocks: int = identity(12, "transformer blocks L", POSITIVE)
    num_heads: int = identity(6, "attention heads H; hidden_size must be a multiple", POSITIVE)
    condition: Literal["class", "text"] = identity(
        "class", "a label, added to the time; or a caption, by cross-attention in every block"
    )
    num_classes: int = identity(
        1000, "classes; the label table has one row more, the null class (condition class)", POSITIVE
    )
    text_width: int = identity(4096, "width of a caption token's features (condition text); 4096: T5-XXL", POSITIVE)
    text_length: int = identity(
        120, "tokens of a caption that the model sees; longer captions are cut (condition text)", POSITIVE
    )
    interleave: bool = identity(True, "MoE in blocks 1, 3, 5, ...; false: in every block")
    num_experts: int = identity(16, "experts N of an MoE layer", POSITIVE)
    granularity: int = identity(1, "m: experts are 4D/m wide, so N experts do the work of N/m", POSITIVE)
    shared_experts: int = identity(0, "experts (4D/m wide) that every token passes besides", NON_NEGATIVE)
    top_k: int = identity(1, "experts that a token chooses (tc); times granularity for equal compute", POSITIVE)
    balance_weight: float = recipe(0.01, "weight of the balance loss (tc)", NON_NEGATIVE)
    predictor: bool | None = identity(
        None, "capacity predictor and dynamic thresholds; null: diffmoe has them, ec not; tc never"
    )
    predictor_weight: float = recipe(1.0, "weight of the capacity predictors' loss")
    predictor_reduction: Literal["sum", "mean"] = recipe(
        "sum", "over MoE layers: sum (the published code) or mean (the paper's Eq. 12)"
    )
    threshold_decay: float = recipe(0.95, "decay of the dynamic thresholds (the paper's Eq. 17)", UNIT_INTERVAL)


@dataclass(frozen=True)
class PoolConfig:
    """What the experts choose from."""

    span: int | Literal["all"] = identity(
        "all", "samples in one pool: all = the micro-step of all ranks; 1 = each sample by itself"
    )
    capacity: float = identity(
        1.0, "capacity factor C in training: each expert takes floor(P * C / N) of the P tokens of a pool", POSITIVE
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are moved."""

    kind: Literal["adamw", "sgd"] = identity("adamw", "adamw or sgd; their moments are not each other's")
    lr: float = recipe(1e-4, "peak learning rate", POSITIVE)
    betas: tuple[float, float] = recipe((0.9, 0.999), "AdamW's decays of the two moments")
    eps: float = recipe(1e-8, "AdamW's epsilon", POSITIVE)
    weight_decay: float = recipe(0.0, "decoupled weight decay for adamw, L2 for sgd", NON_NEGATIVE)
    expert_lr_scale: float = recipe(1.0, "the routed experts' learning rate as a multiple of lr", NON_NEGATIVE)
    router_lr_scale: float = recipe(1.0, "the routers' learning rate as a multiple of lr", NON_NEGATIVE)
    momentum: float = identity(0.0, "momentum of sgd; at 0 there is no buffer that could be continued", UNIT_INTERVAL)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over steps: a linear warm-up, then constant, or falling to `final` times the peak at the last
    step.
    """

    kind: Literal["constant", "linear", "cosine"] = recipe("constant", "shape after the warm-up")
    warmup: int = recipe(0, "steps of linear warm-up from 0", NON_NEGATIVE)
    final: float = recipe(0.0, "last learning rate as a fraction of the peak (linear and cosine)")


@dataclass(frozen=True)
class EmaConfig:
    """The averaged weights that are sampled from."""

    decay: float = recipe(0.9999, "decay of the average per step", UNIT_INTERVAL)
    ramp: bool = recipe(
        False, "use min(decay, (1 + step) / (10 + step)), so that a short run is not held by its first weights"
    )
    thresholds: Literal["live", "averaged"] = identity(
        "live", "thresholds it carries: the live ones, or averaged too (too low early in a run); decides what is saved"
    )


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many at a time, in which precision."""

    objective: Literal["flow", "ddpm"] = identity(
        "flow", "rectified flow, uniform time; or DDPM with learned variance (2 * in_channels out)"
    )
    steps: int = recipe(
        100_000,
        "optimizer steps of the whole run; a cosine or linear schedule ends with them; under a constant one more "
        "steps are no other recipe",
        POSITIVE,
    )
    global_batch: int = identity(256, "samples of one optimizer step over all ranks", POSITIVE)
    grad_accumulation: int = identity(
        1, "micro-steps into which a step's samples are cut; pools lie inside a micro-step", POSITIVE
    )
    precision: Literal["bf16", "float32"] = recipe(
        "bf16", "compute type; weights, moments, router, thresholds and EMA are float32 in both"
    )
    max_grad_norm: float = recipe(0.0, "largest global gradient norm; 0 = no clipping", NON_NEGATIVE)
    skip_nonfinite: int = recipe(
        0,
        "steps of the whole run that may be passed over because their loss or gradient norm is not finite: weights, "
        "moments, averages and thresholds stay, the data go on; one more stops the run. Above 0 each step waits for "
        "the device",
        NON_NEGATIVE,
    )
    freeze: tuple[str, ...] = identity(
        (),
        'patterns of names (*, ?): parameters that stay as they start, as ["patches.*", "*.attention.*"]; they have no '
        "moments that could be continued",
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

    expert_parallel: int = execution(
        1, "expert parallelism EP: ranks over which one copy of the experts is sharded", POSITIVE
    )
    elastic: bool = execution(
        False,
        "train on whatever number of ranks is started: where expert_parallel does not divide it, the largest number "
        "that divides both is taken instead",
    )
    zero_stage: int = execution(1, "DeepSpeed ZeRO stage: 0, 1 or 2")
    timeout_minutes: float = execution(10.0, "longest wait for a peer in any collective", POSITIVE)
    deepspeed: str | None = execution(
        None, "a DeepSpeed JSON file whose settings are merged in (not those that this config decides)"
    )


@dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed: nothing here changes a result beyond rounding."""

    kernel: Literal["auto", "loop", "batched", "grouped", "fused"] = execution(
        "auto",
        "how experts compute, all with one result: one by one; one batched matmul, padded where rows are ragged; "
        "torch's grouped matmul (no float64); one function that writes gradients in place; auto: by device, "
        "type and evenness",
    )
    topk: Literal["auto", "gather", "owner", "radix"] = execution(
        "auto",
        "how ranks find the exact top-k together, all with one result: gather all scores; send them to columns' "
        "owners; sum histograms; auto: the cheapest by bytes and rounds",
    )
    recompute: Literal["none", "ffn", "block"] = execution(
        "none",
        "activations not kept for the backward but computed again there (choices are kept): none, those of the FFN "
        "part, all of a block",
    )
    overlap: int = execution(
        1,
        "parts in which rows travel to the experts, so that some travel while others compute; 1: all at once",
        POSITIVE,
    )
    deterministic: bool = execution(
        False,
        "on GPUs the same bits in every run on one layout, more slowly: sums in a fixed order, in attention's backward "
        "and over ranks; an operator that has none ends the run, named",
    )
    compile: bool = execution(
        False, "compile adaLN with attention, dense FFNs and predictors (torch.compile; needs a compiler)"
    )


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn, in training's sample grids, `diffmoe sample` and `diffmoe evaluate`; no training step
    depends on it.
    """

    sampler: Literal["euler", "heun", "dopri5", "ddpm", "ddim"] = reporting(
        "euler", "the solver; ddpm (ancestral) and ddim need objective ddpm"
    )
    steps: int = reporting(250, "steps of the solver; heun evaluates twice in each; dopri5 chooses its own", POSITIVE)
    eta: float = reporting(0.0, "noise of ddim: 0 none, 1 as ddpm", (lambda value: 0 <= value <= 1, "from 0 to 1"))
    rtol: float = reporting(1e-5, "relative tolerance of dopri5", POSITIVE)
    atol: float = reporting(1e-5, "absolute tolerance of dopri5", POSITIVE)
    guidance: float = reporting(1.5, "classifier-free guidance scale; 1 = none")
    guidance_interval: tuple[float, float] | None = reporting(
        None, "times [low, high] between which guidance acts, 1 = noise; null: always"
    )
    guidance_channels: int | None = reporting(
        None, "channels that are guided, from the first; null: all of the (latent) image"
    )
    chunk: int = reporting(
        64,
        "samples computed together; part of the protocol, so that results do not depend on the number of ranks",
        POSITIVE,
    )
    selection: Literal["auto", "threshold", "count", "topk"] = reporting(
        "auto",
        "tokens over the threshold; as many, by score; the training rule; auto: threshold where there is a "
        "predictor, else topk",
    )
    threshold: float | Literal["dynamic", "raw"] = reporting(
        "dynamic", "moving average, bias-corrected or raw; or one number for every expert"
    )
    capacity: float = reporting(1.0, "capacity factor of `topk`", POSITIVE)
    weights: Literal["ema", "model"] = reporting("ema", "averaged or live weights")
    vae: str | None = reporting(
        None, "local folder of the VAE that made the latents, to see samples as pictures; null: latents alone"
    )
    grid_every: int = reporting(0, "steps between sample grids while training; 0 = none", NON_NEGATIVE)
    grid_size: int = reporting(80, "samples in such a grid, classes in turn or the data's first captions", POSITIVE)
    prompts: tuple[str, ...] | str = reporting(
        (),
        "what such a grid shows instead, one sample each (condition text; needs text.folder): a list of prompts, or a "
        "text file with one on each line",
    )


@dataclass(frozen=True)
class LogConfig:
    """What a run reports while it trains."""

    every: int = reporting(10, "steps between lines in metrics.jsonl, of which the progress shows each", POSITIVE)
    tensorboard: bool = reporting(
        False, "also write numbers, capacity by layer and sample grids for TensorBoard, to the run folder"
    )
    wandb: bool = reporting(
        False,
        "also send them to Weights & Biases, with the config less its credentials; the environment says where "
        "(WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline)",
    )
    profile: tuple[int, int] | None = reporting(
        None, "first and last step of which each rank writes a trace (torch.profiler) to the run folder; null: none"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run keeps."""

    every: int = reporting(1000, "steps between checkpoints; the last step is always saved", POSITIVE)
    minutes: float = reporting(
        0.0, "most minutes between checkpoints, by the first rank's clock, at the end of a step; 0 = none", NON_NEGATIVE
    )
    background: bool = execution(
        True,
        "training waits only for a copy in host memory, and goes on while it is written; false: until all is written",
    )
    grace_seconds: float = execution(
        60.0,
        "a run that gets SIGTERM, SIGUSR1 or Ctrl-C ends its step, saves and leaves with exit code 75; after this time "
        "it leaves unsaved",
        POSITIVE,
    )
    keep_last: int = reporting(2, "newest checkpoints that are kept", POSITIVE)
    keep_every: int = reporting(
        0, "checkpoints at multiples of this many steps are kept for ever; 0 = none", NON_NEGATIVE
    )


@dataclass(frozen=True)
class Config:
    """One run."""

    folder: str = reporting("runs/run", "run folder: config, metrics, sample grids, checkpoints; it may move")
    seed: int = identity(
        0, "seed of everything random; drawn per sample position, expert and step, never per rank", NON_NEGATIVE
    )
    resume: Literal["auto", "never"] = execution(
        "auto", "auto: continue from the folder's newest checkpoint; never: refuse such a folder"
    )
    init_from: str | None = identity(
        None,
        "start from the weights (and thresholds) of this run, checkpoint or exported folder; step, learning rate, data "
        "and moments are new; a resume does not load it again; it may move: the fingerprint of what it was is kept",
        by_fingerprint=True,
    )
    init_weights: Literal["ema", "model"] = identity("ema", "which of its weights: the averaged or the live ones")
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
