"""Parameters by module from the config alone; a test holds them against `numel` of every config.

Legend: D hidden size, L blocks, N experts of an MoE layer, m granularity (an expert is 4D/m wide), C capacity.
"""

from dataclasses import dataclass

from diffmoe_ep.config import ModelConfig, has_predictor
from diffmoe_ep.model.dit import is_moe


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


def count(model: ModelConfig) -> Count:
    """Count a model's parameters."""
    hidden, num_experts, width = model.hidden_size, model.num_experts, expert_width(model)
    ffn = 8 * hidden**2 + 5 * hidden
    expert = 2 * hidden * width + width + hidden
    shared_width = width * model.shared_experts
    shared = (
        2 * hidden * shared_width + shared_width + hidden if model.shared_experts else 0
    )  # one FFN, so one output bias
    moe = moe_blocks(model)
    linear = hidden**2 + hidden
    patches = model.in_channels * model.patch**2 * hidden + hidden
    time = 256 * hidden + hidden + linear
    text = model.condition == "text"
    condition = model.text_width * (hidden + 1) + hidden + linear if text else (model.num_classes + 1) * hidden
    head = 2 * linear + (hidden + 1) * model.patch**2 * model.out_channels
    return Count(
        dense_ffn=(model.num_blocks - moe) * ffn,
        experts=moe * num_experts * expert,
        shared=moe * shared,
        router=moe * num_experts * hidden,
        predictor=moe * (linear + num_experts * hidden + num_experts) if has_predictor(model) else 0,
        attention=model.num_blocks * 4 * linear,
        cross_attention=model.num_blocks * 4 * linear if text else 0,
        modulation=model.num_blocks * 6 * linear,
        other=patches + time + condition + head,
        capacity=model.top_k / model.granularity if model.family == "tc" else 1.0,
        unit=model.granularity / num_experts,
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
