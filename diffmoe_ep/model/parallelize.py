"""What is applied to a model from outside: kernels, recomputation, compilation; and, in the one place where model and
mesh meet, the slices of the experts, another dispatcher, wider pools, and DeepSpeed's marks.

Legend: N experts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffmoe_ep.config import ComputeConfig, Config
from diffmoe_ep.model.block import Block
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.moe.dispatch import AllToAllDispatch
from diffmoe_ep.moe.experts import FeedForward
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.mesh import Mesh

Recompute = Literal["none", "ffn", "block"]


def build_sharded(config: Config, mesh: Mesh, channels: int | None = None) -> DiT:
    """This rank's part of a config's model, on the mesh's device, its weights still to be filled.

    It is cut before it gets any memory, so that a rank never holds more than its own share. channels: how many are
    predicted; None: all.
    """
    with torch.device("meta"):
        model = DiT(config.model, config.pool)
        model.compute_type = torch.bfloat16 if config.train.precision == "bf16" else None
        model.channels = model.channels if channels is None else channels
        apply_compute(model, config.compute)
        shard_experts(model, mesh, config.compute.overlap)
    return model.allocate(mesh.device)


def apply_compute(model: DiT, compute: ComputeConfig) -> DiT:
    """Let experts compute, pools search and the backward recompute as the config asks; the numbers are the same.

    (`apply_compile` is apart: it changes roundings, and only training wants it; `shard_experts` takes the overlap.)
    """
    for layer in model.moe_layers():
        layer.experts.kernel = compute.kernel
        layer.pools = replace(layer.pools, algorithm=compute.topk)
    return apply_recompute(model, compute.recompute)


def apply_recompute(model: DiT, recompute: Recompute) -> DiT:
    """Set what blocks do not save for the backward but compute again there: nothing, the feed-forward half, or all.

    Every rank does so at the same place of its backward, so that the rows that travel again meet.
    """
    for block in _blocks(model):
        for name in ("forward", "feed_forward"):
            block.__dict__.pop(name, None)  # what an earlier call put before the method
        if recompute == "ffn":
            _put_before(block, "feed_forward", _feed_forward_recomputed)
        elif recompute == "block":
            _put_before(block, "forward", _block_recomputed)
    return model


def _feed_forward_recomputed(block: Block, *inputs: Any) -> Any:
    return _recomputed(Block.feed_forward, block, *inputs)


def _block_recomputed(block: Block, *inputs: Any) -> Any:
    return _recomputed(Block.forward, block, *inputs)


def _recomputed(function: Callable[..., Any], block: Block, *inputs: Any) -> Any:
    """What function(block, *inputs) returns. The backward finds only the inputs and the layer's routing, which is not
    made a second time; nothing random is drawn in a forward.
    """
    saved: list[Routing] = []  # filled by the first forward, read by the second

    def with_routing(*inputs: Any) -> Any:
        with block.ffn.reuse_routing(saved) if isinstance(block.ffn, MoELayer) else nullcontext():
            return function(block, *inputs)

    return checkpoint(with_routing, *inputs, use_reentrant=False, preserve_rng_state=False)


def apply_compile(model: DiT) -> DiT:
    """Let torch.compile fuse what of each block needs no other rank, at the first call and once for all blocks."""
    for block in _blocks(model):
        _put_before(block, "attend", _compiled(Block.attend))
        if isinstance(block.ffn, MoELayer):
            compile_layer(block.ffn)
        else:
            _put_before(block.ffn, "forward", _compiled(FeedForward.forward))
    return model


def compile_layer(layer: MoELayer) -> MoELayer:
    """Let torch.compile fuse what of one layer needs no other rank: the predictor."""
    if layer.predictor is not None:
        _put_before(layer.predictor, "forward", _compiled(CapacityPredictor.forward))
    return layer


@cache
def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(method)


def _put_before(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let a module's method be another function, bound as methods are: that of a copied module is bound to the copy."""
    module.__dict__[name] = MethodType(function, module)


def _blocks(model: DiT) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


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
