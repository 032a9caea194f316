"""Between checkpoints and models: what of a model goes into a checkpoint, and a checkpoint back into a model at any
expert parallelism.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.exported import (
    CONFIG,
    check_blocks,
    check_sums,
    fill,
    is_exported,
    kinds_of,
    load_exported,
    read_exported,
)
from diffmoe_ep.checkpoint.fragments import Fragment, expert_fragment, whole
from diffmoe_ep.checkpoint.store import REMEDY, SUMS, CheckpointError, load, read_meta, resolve, tensors
from diffmoe_ep.config import Config, ConfigError, from_tree, today
from diffmoe_ep.config.foreign import read_bytes
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import build_sharded, is_expert
from diffmoe_ep.parallel.mesh import Mesh

Weights = Literal["ema", "model"]


def fragments(named: Mapping[str, Tensor], prefix: Weights, model: DiT, mesh: Mesh) -> list[Fragment]:
    """This rank's part of named parameters or buffers, under canonical names "prefix.name" and the logical shape over
    all experts.
    """
    return [
        expert_fragment(f"{prefix}.{name}", tensor, mesh.expert.rank, model.config.num_experts)
        if is_expert(name)
        else whole(f"{prefix}.{name}", tensor)
        for name, tensor in named.items()
    ]


def resolve_model_path(path: Path) -> Path:
    """The checkpoint that a path names: a run folder, its `checkpoints` folder, one checkpoint, or a folder in the
    exported form.
    """
    return path if is_exported(path) else resolve(path)


def load_model(path: str | Path, weights: Weights | None = None, device: str | torch.device = "cpu") -> DiT:
    """Load a trained model for one device, in eval mode, without DeepSpeed or a process group.

    path: a run folder, its `checkpoints` folder, one checkpoint, or a folder in the exported form (one set of
    weights).
    weights: "ema" (averaged, with the live thresholds) or "model"; by default what its config samples from (ema, unless
    sample.weights
        says otherwise) or the set that an exported folder holds.
    Call it as `model(x (B, C, H, W), t (B,), condition (B,) int64) -> Output(prediction, auxiliary, layers)`;
    `model.train()` selects by pool as in training. Raises CheckpointError when there is no complete checkpoint, or it
    is damaged.
    """
    folder = resolve_model_path(Path(path))
    config = config_of(folder)
    return load_sharded(folder, weights or config.sample.weights, config, Mesh(device=torch.device(device)))


def load_sharded(folder: Path, weights: Weights, config: Config, mesh: Mesh) -> DiT:
    """Load a checkpoint into a model whose experts are sharded over the mesh; every rank reads only what it holds."""
    if is_exported(folder):
        there = read_exported(folder).config.sample.weights
        if weights != there:
            raise CheckpointError(
                f"{folder} holds one set of weights, {there}, not {weights}; ask for {there} (sample.weights={there})"
            )
        return load_exported(folder, config, mesh)
    stored = tensors(folder)
    _check_shapes(folder, config, stored)
    model = build_sharded(config, mesh)
    named = dict(model.named_parameters()) | persistent_buffers(model)
    wanted: list[Fragment] = []
    for name, tensor in named.items():
        own = weights if f"{weights}.{name}" in stored else "model"  # the averaged weights carry the live thresholds
        if own != weights and isinstance(tensor, torch.nn.Parameter):
            raise CheckpointError(f'{folder} has no averaged weights for {name}; load it with weights="model"')
        wanted += fragments({name: tensor}, own, model, mesh)
    load(folder, wanted, group=mesh.world.handle, world=mesh.size, allow_extra=True)
    return model.to(mesh.device).eval()


def _check_shapes(folder: Path, config: Config, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raise CheckpointError unless a checkpoint's tensors are those of its config's model, before that takes memory."""
    check_blocks(config.model, len(stored), str(folder))
    for name, (shape, _) in kinds_of(config.model).items():
        there = stored[f"model.{name}"][0] if f"model.{name}" in stored else "no shape"
        if there != shape:
            raise CheckpointError(
                f"{folder} is a checkpoint of another model or optimizer: {name} has {there} there and {shape} here. "
                f"{REMEDY}"
            )


def load_into(model: DiT, folder: Path, weights: Weights, mesh: Mesh) -> None:
    """Fill a model to be trained, its experts sharded over the mesh, with stored weights; every rank reads only what it
    holds.

    Thresholds, and how often they were moved, are the live ones with either set of weights. Weights of the reversed
    time convention are rewritten to ours (and rounded to float32 again); stored positions are not taken over.
    All ranks raise UserError if one cannot load.
    """
    if not is_exported(folder):
        wanted = fragments(dict(model.named_parameters()), weights, model, mesh)
        wanted += fragments(persistent_buffers(model), "model", model, mesh)
        load(folder, wanted, group=mesh.world.handle, world=mesh.size, allow_extra=True)
        return
    exported = read_exported(folder)
    check_sums(folder, exported, mesh)
    problem = None
    try:
        fill(model, folder, exported, mesh, model.state_dict())
    except CheckpointError as error:
        problem = str(error)
    mesh.agree(problem)


def persistent_buffers(model: DiT) -> dict[str, Tensor]:
    """The buffers that belong to a model's state: thresholds and how often they were moved."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def config_of(folder: Path) -> Config:
    """The configuration with which a checkpoint was trained."""
    if is_exported(folder):
        return read_exported(folder).config
    try:
        return from_tree(today(meta_of(folder)["config"]))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def data_info_of(folder: Path) -> DataInfo:
    """What a checkpoint knows of the data it was trained on: kind, shape, scale, shift, class names."""
    if is_exported(folder):
        return read_exported(folder).data_info
    try:
        return DataInfo.from_json(meta_of(folder)["data"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}; use a sound copy") from error


def fingerprint_of(folder: Path) -> str:
    """The sha256 of the file that vouches for a checkpoint or an exported folder."""
    return hashlib.sha256(read_bytes(folder / (CONFIG if is_exported(folder) else SUMS))).hexdigest()


def meta_of(folder: Path) -> dict[str, Any]:
    """What a training noted of itself in a checkpoint: config, data, fingerprint, and, where it knows them, recipe,
    ancestry, text_encoder and passed_over.
    """
    meta = dict(read_meta(folder)["meta"])
    kinds: dict[str, type] = {"config": dict, "data": dict, "fingerprint": str}
    perhaps: dict[str, type] = {"recipe": list, "ancestry": list, "text_encoder": str, "passed_over": int}
    kinds |= {key: kind for key, kind in perhaps.items() if meta.get(key) is not None}
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            raise CheckpointError(f"{folder}: its meta.json has no {key}: it was not saved by a training")
    return meta
