"""Draw samples with a loaded or training model, all ranks together: labels or prompts in, latents and capacity out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

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
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.diffusion.objective import ObjectiveKind
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.collectives import all_sum, collect_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.decode import Decode
from diffmoe_ep.sampling.generate import CapacityRecord, Generated, Model, Seed, generate, join, to_pixels
from diffmoe_ep.sampling.picture import grid
from diffmoe_ep.sampling.prompts import Prompts


@dataclass(frozen=True)
class Drawn:
    """The samples of all ranks; they come together on the first."""

    latents: Tensor  # (n, C, H, W) float32
    labels: Tensor  # (n,) the classes asked for; (0,) where prompts were
    capacity: CapacityRecord  # over all ranks
    prompts: tuple[str, ...] = ()  # asked for
    decoded: Tensor | None = None  # (n, 3, H, W) uint8, where latents are a VAE's and its decoder is at hand


def classes_in_turn(num: int, classes: list[int]) -> Tensor:
    """Labels (num,) that go through the classes one after the other."""
    return torch.tensor([classes[index % len(classes)] for index in range(num)], dtype=torch.int64)


def draw(
    module: DiT,
    conditions: Tensor | Prompts,
    sample: SampleConfig,
    mesh: Mesh,
    *,
    seed: Seed,
    negative: Prompts | None = None,
    objective: ObjectiveKind = "flow",
    weights: Model | None = None,
    decode: Decode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drawn | None:
    """Draw one sample for each label or prompt; the first rank gets them all, the others None.

    negative: a prompt that guidance leads away from, in place of the null caption. objective: what the model was
    trained to predict. `weights` runs the module with other weights (the averaged ones); the module's mode is restored.
    decode: each rank decodes its own.
    """
    was_training = module.training
    module.eval()
    module.set_inference(InferenceRule(sample.selection, sample.threshold, sample.capacity))
    model = module.config
    part = generate(
        weights or module, conditions, seed=seed, steps=sample.steps, guidance=sample.guidance, chunk=sample.chunk,
        objective=objective, sampler=sample.sampler, eta=sample.eta, rtol=sample.rtol, atol=sample.atol, busy=_busy(mesh),
        guidance_interval=sample.guidance_interval, guidance_channels=sample.guidance_channels,
        null=_null(model) if negative is None else negative[:1], shape=(model.in_channels, model.input_size, model.input_size),
        rank=mesh.rank, world=mesh.size, device=mesh.device, progress=progress,
    )  # fmt: skip
    module.train(was_training)
    parts: list[tuple[Generated, Tensor | None]] | None = collect_objects(
        (part, decode and decode(part.latents)), mesh.world
    )
    if parts is None:
        return None
    latents, capacity = join([part for part, _ in parts])
    pictures = [pictures for _, pictures in parts if pictures is not None]
    decoded = torch.cat(pictures)[torch.cat([part.index for part, _ in parts]).argsort()] if pictures else None
    if isinstance(conditions, Prompts):
        return Drawn(latents, torch.zeros(0, dtype=torch.int64), capacity, conditions.words, decoded)
    return Drawn(latents, conditions, capacity, decoded=decoded)


def _null(model: ModelConfig) -> Condition:
    """The null class, or the null caption."""
    if model.condition == "text":
        return padded([torch.zeros(0, model.text_width)], model.text_length, model.text_width)
    return torch.tensor([model.num_classes])


def _busy(mesh: Mesh) -> Callable[[int], int] | None:
    """How many ranks of this expert group still work, for a solver that chooses its own steps; its passes meet there
    alone.
    """
    if mesh.expert.size == 1:
        return None
    return lambda working: int(all_sum(torch.tensor(working, device=mesh.device), mesh.expert))


def check_labels(classes: list[int], model: ModelConfig) -> None:
    """Raise ConfigError for a class that the model does not have, or if it has none."""
    if model.condition == "text":
        raise ConfigError("this model is conditioned on captions, it has no classes; give it prompts")
    for label in classes:
        if not 0 <= label < model.num_classes:
            raise ConfigError(f"class {label} does not exist: the model has classes 0 to {model.num_classes - 1}")


def check_sampling(config: Config, num: int) -> None:
    """Raise ConfigError if `num` samples cannot be drawn: `topk` needs whole pools in each chunk, and dopri5 its
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
                f"sample.selection is topk and pool.span is {pool}, which does not divide a chunk of {size} samples ({num} samples, "
                f"sample.chunk {sample.chunk}); make both multiples of {pool}, or choose sample.selection=threshold or count"
            )
        span = size if pool == "all" else pool
        tokens_per_expert(
            span * num_tokens(model), sample.capacity, model.num_experts, "sample.capacity", model.granularity
        )


def check_pictures(data_info: DataInfo, vae: str | None) -> None:
    """Raise ConfigError, before anything is drawn, if these data cannot be shown as a grid here; vae: sample.vae."""
    if find_spec("PIL") is None:
        raise ConfigError("grids need Pillow: pip install 'diffmoe_ep[sample]', or set sample.grid_every=0")
    if data_info.kind == "moments":
        if vae is None:
            raise ConfigError(
                f"the data {data_info.name} are latents of a VAE; set sample.vae to its local folder to see pictures, or sample.grid_every=0"
            )
        return
    if data_info.kind != "pixels" or data_info.shape[0] not in (1, 3) or not 1 <= highest(data_info) <= 255:
        raise ConfigError(
            f"the data {data_info.name} (shape {data_info.shape}, scale {data_info.scale}, shift {data_info.shift}) are no pictures "
            "of 1 or 3 channels with values up to 255; set sample.grid_every=0"
        )


def check_pixels(data_info: DataInfo) -> None:
    """Raise ConfigError if samples cannot be compared with stored pixels."""
    if data_info.kind != "pixels":
        raise ConfigError(
            f"the data {data_info.name} are latents of a VAE, and scores compare stored pixels; draw pictures with diffmoe sample "
            "sample.vae=FOLDER and score its samples.npz by other means"
        )
    check_pictures(data_info, None)


def highest(data_info: DataInfo) -> int:
    """The stored value that the data's scaling puts at 1: 16 for the digits, 255 for photographs and what a VAE
    decodes.
    """
    if data_info.kind == "moments":
        return 255
    assert data_info.scale and data_info.shift is not None, "known of pixels"
    return round((1 - data_info.shift) / data_info.scale)


def pixels_of(drawn: Drawn, data_info: DataInfo) -> Tensor:
    """The samples as pixels, stored ones or decoded ones: uint8 (n, C, H, W)."""
    if drawn.decoded is not None:
        return drawn.decoded
    assert data_info.scale and data_info.shift is not None, "known of pixels"
    return to_pixels(drawn.latents, data_info.scale, data_info.shift, highest(data_info))


def write_grid(
    drawn: Drawn,
    data_info: DataInfo,
    path: Path,
    most: int = 200,
    columns: int = 10,
    right: Sequence[bool] | None = None,
) -> None:
    """Write the first `most` samples as a PNG, in rows of up to `columns`, prompts under their pictures.

    right: whether each picture shows what was asked for, seen from its frame.
    """
    pixels = pixels_of(drawn, data_info)[:most]
    grid(
        pixels, path, columns=min(columns, len(pixels)), highest=highest(data_info),
        captions=drawn.prompts[:most] or None, right=None if right is None else right[:most],
    )  # fmt: skip
