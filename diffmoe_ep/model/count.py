"""Parameters by module, from the config alone: of a build on the meta device, which takes no memory.

Legend: D hidden size, N experts of an MoE layer, m granularity (an expert is 4D/m wide), C capacity.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from diffmoe_ep.config import ModelConfig
from diffmoe_ep.model.dit import DiT, is_moe

# The first part that a parameter's name holds says which field of `Count` it belongs to; other parameters of a block
# are its modulation, and those outside the blocks `other`.
KINDS = (
    (".ffn.experts.", "experts"), (".ffn.shared.", "shared"), (".ffn.router.", "router"),
    (".ffn.predictor.", "predictor"),
    (".ffn.", "dense_ffn"), (".attention.", "attention"), (".cross_attention.", "cross_attention"),
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Trainable parameters of each kind of module; positions are fixed and not counted."""

    dense_ffn: int  # feed-forward networks of the dense blocks
    experts: int  # all routed experts of all MoE layers
    shared: int  # their shared experts
    router: int
    predictor: int
    attention: int
    cross_attention: int  # over captions
    modulation: int  # adaLN of the blocks
    other: int  # patches, time, labels or captions, head
    capacity: float  # C of training at pool.capacity 1: what the tokens choose (tc: top_k / m), else 1
    unit: float  # share of the routed experts that works on an average token at C = 1: m / N

    @property
    def total(self) -> int:
        """All trainable parameters."""
        return self.experts + self.always

    @property
    def ffn(self) -> int:
        """What the paper's Table 9 calls FFN: dense ones, experts, and what goes with them."""
        return self.dense_ffn + self.experts + self.shared + self.router + self.predictor

    @property
    def always(self) -> int:
        """The parameters that work on every token."""
        beside = self.attention + self.cross_attention + self.modulation + self.other
        return self.dense_ffn + self.shared + self.router + self.predictor + beside

    def activated(self, capacity: float | None = None) -> float:
        """Parameters that work on an average token at a capacity (None: training's): C * experts * m / N, and all that
        always runs.
        """
        return (self.capacity if capacity is None else capacity) * self.unit * self.experts + self.always


def moe_blocks(model: ModelConfig) -> int:
    """How many blocks have an MoE layer."""
    return sum(is_moe(model, block) for block in range(model.num_blocks))


def expert_width(model: ModelConfig) -> int:
    """Width of an expert, routed or shared: 4D/m."""
    return 4 * model.hidden_size // model.granularity


@lru_cache
def shapes(model: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all trainable parameters, in the model's order, over all experts."""
    with torch.device("meta"):
        built = DiT(model)
    return tuple((name, tuple(parameter.shape)) for name, parameter in built.named_parameters())


@lru_cache
def count(model: ModelConfig) -> Count:
    """Count a model's parameters."""
    found = Counter[str]()
    for name, shape in shapes(model):
        block = name.startswith("blocks.")
        kind = next((kind for part, kind in KINDS if part in name), "modulation") if block else "other"
        found[kind] += prod(shape)
    kinds = (*(kind for _, kind in KINDS), "modulation", "other")
    return Count(
        **{kind: found[kind] for kind in kinds},
        capacity=model.top_k / model.granularity if model.family == "tc" else 1.0,
        unit=model.granularity / model.num_experts,
    )


def equation_40(model: ModelConfig, capacity: float | None = None) -> float:
    """The paper's estimate of the average activated parameters: (1 + C) / (1 + N) * FFN + attention + adaLN + other.

    Its factor supposes one dense block for each MoE block, so an even L. Here the blocks are counted, and an MoE
    block's feed-forward units are N/m routed ones, of which C work, and the shared ones, which all do. Router and
    predictor are scaled with the FFN, as in the paper (its Table 9), though they always run: `Count.activated` is
    exact.
    """
    sizes, moe = count(model), moe_blocks(model)
    capacity = sizes.capacity if capacity is None else capacity
    dense, shared = model.num_blocks - moe, model.shared_experts / model.granularity
    active = dense + moe * (capacity + shared)
    whole = dense + moe * (model.num_experts / model.granularity + shared)
    return active / whole * sizes.ffn + sizes.attention + sizes.cross_attention + sizes.modulation + sizes.other
