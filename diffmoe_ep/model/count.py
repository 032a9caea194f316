"""Parameters by module from the config alone; a test holds them against `numel` of every config."""

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
    modulation: int  # adaLN of the blocks
    other: int  # patches, time, labels, head
    active: float  # routed experts that work on an average token at capacity 1, as a share of them all

    @property
    def total(self) -> int:
        """All trainable parameters."""
        return self.experts + self.always

    @property
    def always(self) -> int:
        """The parameters that work on every token."""
        return self.dense_ffn + self.shared + self.router + self.predictor + self.attention + self.modulation + self.other

    def activated(self, capacity: float = 1.0) -> float:
        """Parameters that work on an average token at a capacity: C * experts / N (times granularity) and all that always runs."""
        return capacity * self.experts * self.active + self.always


def count(model: ModelConfig) -> Count:
    """Count a model's parameters."""
    hidden, num_experts = model.hidden, model.num_experts
    ffn, width = 8 * hidden**2 + 5 * hidden, 4 * hidden // model.granularity
    expert = 2 * hidden * width + width + hidden
    shared = 2 * hidden * width * model.shared_experts + width * model.shared_experts + hidden if model.shared_experts else 0
    moe = sum(is_moe(model, block) for block in range(model.blocks))
    linear = hidden**2 + hidden
    patches = model.in_channels * model.patch**2 * hidden + hidden
    time = 256 * hidden + hidden + linear
    labels = (model.num_classes + 1) * hidden
    head = 2 * linear + (hidden + 1) * model.patch**2 * model.out_channels
    return Count(
        dense_ffn=(model.blocks - moe) * ffn,
        experts=moe * num_experts * expert,
        shared=moe * shared,
        router=moe * num_experts * hidden,
        predictor=moe * (linear + num_experts * hidden + num_experts) if has_predictor(model) else 0,
        attention=model.blocks * 4 * linear,
        modulation=model.blocks * 6 * linear,
        other=patches + time + labels + head,
        active=(model.top_k if model.family == "tc" else model.granularity) / num_experts,
    )
