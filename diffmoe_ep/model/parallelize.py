"""The one place where model and mesh meet: slice the experts, swap the dispatcher and the pools, and leave DeepSpeed
its marks.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffmoe_ep.config import ComputeConfig, Config
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.dispatch import AllToAllDispatch
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.parallel.mesh import Mesh


def build_sharded(config: Config, mesh: Mesh, channels: int | None = None) -> DiT:
    """This rank's part of a config's model, on the mesh's device, its weights still to be filled.

    It is cut before it gets any memory, so that a rank never holds more than its own share. channels: see `DiT`.
    """
    compute_type = torch.bfloat16 if config.train.precision == "bf16" else None
    with torch.device("meta"):
        model = DiT(config.model, config.pool, compute_type, config.compute.recompute, channels)
        apply_compute(model, config.compute)
        shard_experts(model, mesh, config.compute.overlap)
    return model.allocate(mesh.device)


def apply_compute(model: DiT, compute: ComputeConfig) -> DiT:
    """Let experts compute and pools search as the config asks; the numbers are the same."""
    for layer in model.moe_layers():
        layer.experts.kernel = compute.kernel
        layer.pools = replace(layer.pools, algorithm=compute.topk)
    return model


def shard_experts(model: DiT, mesh: Mesh, overlap: int = 1) -> DiT:
    """Keep this rank's experts of every layer, and let rows travel to the others. Initial weights are the same before
    or after.

    overlap: parts in which rows travel, so that some are on their way while others are computed; 1: all at once.
    """
    for layer in model.moe_layers():
        shard_layer(layer, mesh, overlap)
    return model


def shard_layer(layer: MoELayer, mesh: Mesh, overlap: int = 1) -> MoELayer:
    """Keep this rank's experts of one layer; see `shard_experts`."""
    if mesh.expert.size > 1:
        here = layer.num_experts // mesh.expert.size
        layer.experts.first = mesh.expert.rank * here
        for name, parameter in list(layer.experts.named_parameters()):
            mine = parameter.detach()[layer.experts.first : layer.experts.first + here].clone()
            setattr(layer.experts, name, nn.Parameter(mine))
        layer.dispatcher = AllToAllDispatch(mesh.expert, overlap)
    return layer


def widen_pools(model: DiT, mesh: Mesh) -> DiT:
    """Let training pools cover the ranks of the mesh's pool group."""
    if mesh.pool.size > 1:
        for layer in model.moe_layers():
            layer.pools = replace(layer.pools, group=mesh.pool)
    return model


def is_expert(name: str) -> bool:
    """Whether a parameter's name is that of a stacked expert tensor, whose dimension 0 counts experts."""
    return ".experts." in name


def mark_for_deepspeed(model: DiT, mesh: Mesh) -> DiT:
    """Tell DeepSpeed which parameters are experts' and over which groups they are sharded and copied.

    DeepSpeed finds experts by the class of a module and two attributes of a parameter. A child without parameters
    carries the class, so that our layers need not inherit from it. Without expert sharding nothing is marked: experts
    are then parameters like all others.
    """
    if mesh.expert.size == 1:
        return model
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    group_name = f"ep_size_{mesh.expert.size}"

    class ExpertMark(MoE):
        def __init__(self, num_experts: int) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size = num_experts, mesh.expert.size
            self.num_local_experts, self.expert_group_name = num_experts // mesh.expert.size, group_name

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """Hand over the mesh's groups, so that DeepSpeed makes none of its own."""
            groups._get_expert_parallel_group_dict()[group_name] = mesh.expert.handle
            groups._get_expert_data_parallel_group_dict()[group_name] = mesh.replicas.handle

        def forward(self, *_: Any) -> torch.Tensor:
            raise AssertionError("a mark is never called")

    for layer in model.moe_layers():
        layer.add_module("deepspeed_mark", ExpertMark(layer.num_experts))
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name = False, group_name  # type: ignore[attr-defined]
    return model
