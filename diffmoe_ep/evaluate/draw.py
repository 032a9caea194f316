"""Draw samples with a loaded or training model, all ranks together: labels in, latents and capacity out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError, ModelConfig, SampleConfig
from diffmoe_ep.evaluate.generate import CapacityRecord, Generated, Model, generate, join, to_pixels
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh


@dataclass(frozen=True)
class Drawn:
    """Samples of all ranks, on every rank."""

    latents: Tensor  # (n, C, H, W) float32
    labels: Tensor  # (n,) the classes asked for
    capacity: CapacityRecord  # over all ranks


def classes_in_turn(num: int, classes: list[int]) -> Tensor:
    """Labels (num,) that go through the classes one after the other."""
    return torch.tensor([classes[index % len(classes)] for index in range(num)], dtype=torch.int64)


def draw(
    module: DiT,
    labels: Tensor,
    sample: SampleConfig,
    mesh: Mesh,
    *,
    seed: int,
    weights: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draw one sample for each label. `weights` runs the module with other weights (the averaged ones); its mode is restored."""
    was_training = module.training
    module.eval()
    module.set_inference(InferenceRule(sample.selection, sample.threshold, sample.capacity))
    model = module.config
    part = generate(
        weights or module, labels, seed=seed, steps=sample.steps, guidance=sample.guidance, chunk=sample.chunk,
        null_condition=model.num_classes, shape=(model.in_channels, model.input_size, model.input_size),
        rank=mesh.rank, world=mesh.size, device=mesh.device, progress=progress,
    )  # fmt: skip
    module.train(was_training)
    parts: list[Generated] = gather_objects(part, mesh.world)
    latents, capacity = join(parts)
    return Drawn(latents, labels, capacity)


def check_labels(classes: list[int], model: ModelConfig) -> None:
    """Raise ConfigError for a class that the model does not have."""
    for label in classes:
        if not 0 <= label < model.num_classes:
            raise ConfigError(f"class {label} does not exist: the model has classes 0 to {model.num_classes - 1}")


def pixels_of(latents: Tensor, facts: Mapping[str, Any]) -> Tensor:
    """Turn final latents into stored pixels, uint8 (n, C, H, W); raises ConfigError for latents of a VAE, which need its decoder."""
    if facts["kind"] != "pixels":
        raise ConfigError(
            f"the data {facts['name']} are latents of a VAE, and this version has no decoder: set sample.grid_every=0 and use the "
            "saved latents"
        )
    return to_pixels(latents, facts["scale"], facts["shift"])
