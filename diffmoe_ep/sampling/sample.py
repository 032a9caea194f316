"""Sample from a loaded or training model, all ranks together: labels or prompts in, latents and capacity out."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from diffmoe_ep.config import (
    Config,
    ConfigError,
    ModelConfig,
    SampleConfig,
    has_predictor,
    num_tokens,
    tokens_per_expert,
)
from diffmoe_ep.data.condition import Condition, padded
from diffmoe_ep.diffusion.objective import ObjectiveKind
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.collectives import all_sum, collect_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.capacity_record import CapacityRecord
from diffmoe_ep.sampling.decode import Decode
from diffmoe_ep.sampling.generate import CountActive, Generated, Model, Progress, SampleTask, Seed, generate, join
from diffmoe_ep.sampling.prompts import Prompts


@dataclass(frozen=True)
class Samples:
    """The samples of all ranks; the first rank holds them."""

    latents: Tensor  # (n, C, H, W) float32
    labels: Tensor  # (n,) their classes; (0,) where there are prompts
    capacity: CapacityRecord  # over all ranks
    prompts: tuple[str, ...] = ()  # one for each sample
    decoded: Tensor | None = None  # (n, 3, H, W) uint8, where latents are a VAE's and its decoder was loaded


def sample(
    module: DiT,
    conditions: Tensor | Prompts,
    config: SampleConfig,
    mesh: Mesh,
    *,
    seed: Seed,
    objective: ObjectiveKind = "flow",
    negative: Prompts | None = None,
    weights: Model | None = None,
    decode: Decode | None = None,
    progress: Progress | None = None,
) -> Samples | None:
    """Sample once for each label or prompt; collective. The first rank returns all samples, the others None.

    objective: what the model was trained to predict. negative: a prompt from which guidance leads away, in place of the
    null caption. `weights` runs the module with other weights (the averaged ones); the module's mode is restored.
    decode: each rank decodes its own samples.
    """
    was_training = module.training
    module.eval()
    module.set_inference(InferenceRule(config.selection, config.threshold, config.capacity))
    model = module.config
    shape = (model.in_channels, model.input_size, model.input_size)
    task = SampleTask(seed, objective, shape, null_condition(model) if negative is None else negative[:1])
    generated = generate(
        weights or module, conditions, config, task, mesh, progress=progress, count_active=_count_active(mesh)
    )
    module.train(was_training)
    parts: list[tuple[Generated, Tensor | None]] | None = collect_objects(
        (generated, decode and decode(generated.latents)), mesh.world
    )
    if parts is None:
        return None
    latents, capacity = join([part for part, _ in parts])
    pictures = [pictures for _, pictures in parts if pictures is not None]
    decoded = torch.cat(pictures)[torch.cat([part.index for part, _ in parts]).argsort()] if pictures else None
    if isinstance(conditions, Prompts):
        return Samples(latents, torch.zeros(0, dtype=torch.int64), capacity, conditions.words, decoded)
    return Samples(latents, conditions, capacity, decoded=decoded)


def null_condition(model: ModelConfig) -> Condition:
    """The null class, or the null caption."""
    if model.condition == "text":
        return padded([torch.zeros(0, model.text_width)], model.text_length, model.text_width)
    return torch.tensor([model.num_classes])


def _count_active(mesh: Mesh) -> CountActive | None:
    """How many ranks of this expert group still work, for a solver that chooses its own steps; forward passes wait for
    each other there alone. None where no forward pass waits for another rank.
    """
    if mesh.expert.size == 1:
        return None
    return lambda working: int(all_sum(torch.tensor(working, device=mesh.device), mesh.expert))


def classes_in_turn(num: int, classes: list[int]) -> Tensor:
    """Labels (num,) that go through the classes one after the other."""
    return torch.tensor([classes[index % len(classes)] for index in range(num)], dtype=torch.int64)


def check_labels(classes: list[int], model: ModelConfig) -> None:
    """Raise ConfigError for a class that the model does not have, or if it has none."""
    if model.condition == "text":
        raise ConfigError("this model is conditioned on captions, it has no classes; give it prompts")
    for label in classes:
        if not 0 <= label < model.num_classes:
            raise ConfigError(f"class {label} does not exist: the model has classes 0 to {model.num_classes - 1}")


def check_sampling(config: Config, num: int) -> None:
    """Raise ConfigError if `num` samples cannot be sampled: `topk` needs whole pools in each chunk, and dopri5 its
    package.
    """
    sample, model = config.sample, config.model
    if sample.sampler == "dopri5" and find_spec("torchdiffeq") is None:
        raise ConfigError("sample.sampler dopri5 needs torchdiffeq: pip install 'diffmoe_ep[sample]', or choose heun")
    by_k = sample.selection == "topk" or (sample.selection == "auto" and not has_predictor(model))
    if not by_k or model.family in ("dense", "tc"):
        return
    pool = 1 if model.family == "ec" else config.pool.span
    for size in {min(num, sample.chunk), num % sample.chunk} - {0}:
        if pool != "all" and size % pool:
            raise ConfigError(
                f"sample.selection is topk and pool.span is {pool}, which does not divide a chunk of {size} samples "
                f"({num} samples, sample.chunk {sample.chunk}); make both multiples of {pool}, or choose "
                "sample.selection=threshold or count"
            )
        span = size if pool == "all" else pool
        tokens_per_expert(
            span * num_tokens(model), sample.capacity, model.num_experts, "sample.capacity", model.granularity
        )
