"""Between checkpoints and models: what of a model goes into a checkpoint, and a checkpoint back into a model at any expert parallelism."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.layout import Fragment, expert_fragment, whole
from diffmoe_ep.checkpoint.single import is_single, load_single, read_single
from diffmoe_ep.checkpoint.store import CheckpointError, load, read_meta, resolve, tensors
from diffmoe_ep.config import Config, from_tree, to_tree
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import is_expert, shard_experts
from diffmoe_ep.parallel.mesh import Mesh

Weights = Literal["ema", "model"]
HOW = ("model.kernel", "pool.select")  # these change how a model is computed, not what it is


def fragments(named: Mapping[str, Tensor], prefix: Weights, model: DiT, mesh: Mesh) -> list[Fragment]:
    """This rank's part of named parameters or buffers, under canonical names "prefix.name" and the logical shape over all experts."""
    return [
        expert_fragment(f"{prefix}.{name}", tensor, mesh.expert.rank, model.config.num_experts)
        if is_expert(name)
        else whole(f"{prefix}.{name}", tensor)
        for name, tensor in named.items()
    ]


def located(path: Path) -> Path:
    """The checkpoint that a path names: a run folder, its `checkpoints` folder, one checkpoint, or a folder in the single-file form."""
    return path if is_single(path) else resolve(path)


def load_model(path: str | Path, weights: Weights | None = None, device: str | torch.device = "cpu") -> DiT:
    """Load a trained model for one device, in eval mode, without DeepSpeed or a process group.

    path: a run folder, its `checkpoints` folder, one checkpoint, or a folder in the single-file form (one set of weights).
    weights: "ema" (averaged, with the live thresholds) or "model"; by default what its config samples from (ema, unless sample.weights
        says otherwise) or the set that a single-file folder holds.
    Call it as `model(x (B, C, H, W), t (B,), condition (B,) int64) -> Output(prediction, auxiliary, layers)`; `model.train()` selects by
    pool as in training. Raises CheckpointError when there is no complete checkpoint, or it is damaged.
    """
    folder = located(Path(path))
    config = config_of(folder)
    return load_sharded(folder, weights or config.sample.weights, config, Mesh(device=torch.device(device)))


def load_sharded(folder: Path, weights: Weights, config: Config, mesh: Mesh) -> DiT:
    """Load a checkpoint into a model whose experts are sharded over the mesh; every rank reads only what it holds."""
    if is_single(folder):
        there = read_single(folder).config.sample.weights
        if weights != there:
            raise CheckpointError(f"{folder} holds one set of weights, {there}, not {weights}; ask for {there} (sample.weights={there})")
        return load_single(folder, config, mesh)
    compute_type = torch.bfloat16 if config.train.precision == "bf16" else None
    model = shard_experts(DiT(config.model, config.pool, compute_type), mesh)
    named = dict(model.named_parameters()) | persistent_buffers(model)
    stored = tensors(folder)
    wanted: list[Fragment] = []
    for name, tensor in named.items():
        own = weights if f"{weights}.{name}" in stored else "model"  # the averaged weights carry the live thresholds
        if own != weights and isinstance(tensor, torch.nn.Parameter):
            raise CheckpointError(f'{folder} has no averaged weights for {name}; load it with weights="model"')
        wanted += fragments({name: tensor}, own, model, mesh)
    load(folder, wanted, group=mesh.world.handle, world=mesh.size, allow_extra=True)
    return model.to(mesh.device).eval()


def persistent_buffers(model: DiT) -> dict[str, Tensor]:
    """The buffers that belong to a model's state: thresholds and how often they were moved."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def config_of(folder: Path) -> Config:
    """The configuration with which a checkpoint was trained."""
    if is_single(folder):
        return read_single(folder).config
    return from_tree(_meta(folder)["config"])


def facts_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint knows of the data it was trained on: kind, shape, scale, shift, class names."""
    if is_single(folder):
        return dict(read_single(folder).facts)
    return dict(_meta(folder)["data"])


def check_continues(folder: Path, config: Config, fingerprint: str) -> None:
    """Raise CheckpointError, naming the first differing key, unless a run with this config and data continues what the checkpoint began."""
    meta = _meta(folder)
    for key, here, there in _differences(to_tree(config), to_tree(from_tree(meta["config"]))):
        if key.startswith(("model.", "pool.")) and key not in HOW:
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: {key} is {there} there and {here} here; give this run another "
                f"folder, or set {key}={there}"
            )
        if key in (
            "seed",
            "train.batch",
            "train.accumulation",
            "train.objective",
            "train.optimizer.kind",
            "train.optimizer.momentum",
            "train.ema.thresholds",
            "data.shuffle_block",
            "data.lanes",
        ):
            raise CheckpointError(
                f"{folder} was trained with {key} {there}, this run has {here}, so it would not be the same run; set "
                f"{key}={there}, or give this run another folder"
            )
    if fingerprint != meta["fingerprint"]:
        raise CheckpointError(
            f"{folder} was trained on other data than data.folder (or data.mixture) holds now (fingerprint "
            f"{meta['fingerprint'][:12]} there, {fingerprint[:12]} here); restore the data, or give this run another folder"
        )


def _meta(folder: Path) -> dict[str, Any]:
    return dict(read_meta(folder)["meta"])


def _differences(here: Any, there: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(here, dict) and isinstance(there, dict):
        keys = list(here) + [key for key in there if key not in here]
        return [found for key in keys for found in _differences(here.get(key), there.get(key), f"{prefix}.{key}" if prefix else key)]
    return [] if here == there else [(prefix, here, there)]
