"""Initial weights as a function of (seed, parameter's name, expert's number), never of the layout or a global
generator.
"""

import hashlib
import math

import torch
from torch import Tensor

from diffmoe_ep.model.dit import DiT

ZERO, XAVIER, ROUTER, NORMAL = "zero", "xavier", "router", "normal"

# The first ending that fits a parameter's name says how it starts; adaLN-Zero: modulations and the last map start at
# zero, and so does what cross-attention adds.
RULES = (
    ("bias", ZERO),
    ("modulation.weight", ZERO),
    ("head.projection.weight", ZERO),
    ("cross_attention.projection.weight", ZERO),
    ("router.weight", ROUTER),
    ("label.table.weight", NORMAL),
    ("caption.null", NORMAL),
    ("time.fc1.weight", NORMAL),
    ("time.fc2.weight", NORMAL),
    ("weight", XAVIER),
)


@torch.no_grad()
def initialize(model: DiT, seed: int) -> DiT:
    """Fill all weights in place; a rank that holds experts e.. gives them what a single device gives them. Returns the
    model.
    """
    for name, parameter in model.named_parameters():
        rule = next(rule for ending, rule in RULES if name.endswith(ending))
        if ".experts." in name:
            first = model.get_submodule(name.rpartition(".")[0]).first
            assert isinstance(first, int)
            for offset, expert in enumerate(parameter.unbind()):
                _fill(expert, rule, _generator(seed, f"{name}.{first + offset}"))
        else:
            _fill(parameter, rule, _generator(seed, name))
    return model


def _fill(weight: Tensor, rule: str, generator: torch.Generator) -> None:
    if rule == ZERO:
        weight.zero_()
    elif rule == XAVIER:  # uniform; a convolution counts as a map from its flattened patch
        ins, outs = weight[0].numel(), weight.shape[0]  # an expert's (in, out) matrix gives the same bound
        bound = math.sqrt(6.0 / (ins + outs))
        weight.copy_(torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    else:
        std = 0.006 if rule == ROUTER else 0.02
        weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
