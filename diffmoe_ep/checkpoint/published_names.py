"""Names and shapes of the published implementation's tensors, and ours, both ways.

There each expert has matrices of its own, (out, in); here the experts of a layer are stacked, (N, in, out).
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.exported import kinds_of
from diffmoe_ep.config import ModelConfig

REST = "reference.safetensors"  # in an imported folder: what only the way back needs
THEIR_POSITIONS, THEIR_DECAY = "pos_embed", "ema_decay"

# Parts of our names and theirs; of each name the first that fits is replaced.
NAMES = (
    ("patches.projection.", "x_embedder.proj."),
    ("time.fc1.", "t_embedder.mlp.0."),
    ("time.fc2.", "t_embedder.mlp.2."),
    ("label.table.", "y_embedder.embedding_table."),
    ("head.modulation.", "final_layer.adaLN_modulation.1."),
    ("head.projection.", "final_layer.linear."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.projection.", ".attn.proj."),
    (".modulation.", ".adaLN_modulation.1."),
    (".ffn.router.weight", ".mlp.gate_weight"),
    (".ffn.predictor.fc1.", ".mlp.capacity_predictor.0."),
    (".ffn.predictor.fc2.", ".mlp.capacity_predictor.2."),
    (".ffn.predictor.threshold", ".mlp.expert_threshold"),
    (".ffn.", ".mlp."),
)
STACKED = re.compile(r"(.+\.ffn\.experts)\.(fc[12])_(weight|bias)")
UPDATES = ".predictor.updates"  # the reference does not count them


def their_names(name: str, model: ModelConfig) -> list[str]:
    """The reference's names of what we call `name`: one, one for each expert, or none."""
    if name.endswith(UPDATES):
        return []
    stacked = STACKED.fullmatch(name)
    if stacked:
        start = stacked[1].replace(".ffn.", ".mlp.")
        return [f"{start}.{expert}.{stacked[2]}.{stacked[3]}" for expert in range(model.num_experts)]
    for our, their in NAMES:
        if our in name:
            return [name.replace(our, their)]
    raise AssertionError(f"{name} has no name in the reference")


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if name.endswith("_weight") else shape


def to_ours(theirs: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our names, experts stacked as (N, in, out). Updates are so many that the thresholds' bias correction divides by
    exactly 1.
    """
    updates = math.ceil(
        60 / -math.log2(model.threshold_decay)
    )  # decay^updates < 2^-60, below half a unit of 1 in float64 too
    ours = {}
    for name in kinds_of(model):
        parts = [theirs[their] for their in their_names(name, model)]
        if not parts:
            ours[name] = torch.tensor(updates)
        elif STACKED.fullmatch(name):
            ours[name] = torch.stack([part.T if name.endswith("_weight") else part for part in parts])
        else:
            ours[name] = parts[0]
    return ours


def to_theirs(ours: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_ours`; thresholds are corrected for their start at 0, which for imported ones divides by
    1.
    """
    theirs: dict[str, Tensor] = {}
    for name in kinds_of(model):
        tensor = ours[name]
        if name.endswith(".predictor.threshold"):
            updates = int(ours[name.removesuffix("threshold") + "updates"])
            tensor = tensor / (1 - model.threshold_decay ** max(1, updates))
        keys = their_names(name, model)
        if STACKED.fullmatch(name):
            parts = [part.T if name.endswith("_weight") else part for part in tensor.unbind()]
            theirs |= {
                key: part.clone(memory_format=torch.contiguous_format) for key, part in zip(keys, parts, strict=True)
            }
        else:
            theirs |= dict.fromkeys(keys, tensor)
    return theirs
