"""What a model holds and costs, from its config alone: parameters by module, activated parameters, FLOPs of one sample.

Legend: T tokens of a sample, M places of a caption, D hidden size, N experts of an MoE layer, m granularity, C
capacity.

FLOPs are those of the matmuls, 2 for each multiply-add, as model FLOPs utilisation counts them: what is recomputed, and
norms, softmax and activations, are left out. Training is three forwards (the gradients by weights and by inputs cost
one each).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffmoe_ep.config import Config, ConfigError, ModelConfig, has_experts, has_predictor, num_tokens
from diffmoe_ep.model.count import Count, count, equation_40, expert_width, moe_blocks
from diffmoe_ep.tables import table


@dataclass(frozen=True)
class Part:
    """One kind of module, over all blocks."""

    name: str
    parameters: int  # trainable ones
    activated: float  # those that work on an average token at the plan's capacity
    forward: float  # FLOPs of one sample at the plan's capacity


@dataclass(frozen=True)
class Plan:
    """What a model holds and costs."""

    title: str  # the model in words
    parts: tuple[Part, ...]  # all kinds of modules; those that the model lacks hold zeros
    capacity: float  # C of the activated parameters and of the forward's FLOPs
    training_capacity: float  # C of the training's FLOPs
    equation_40: float  # activated parameters by the paper's estimate
    training: float  # FLOPs of one sample's training step

    @property
    def total(self) -> int:
        """All trainable parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def activated(self) -> float:
        """Parameters that work on an average token, exactly."""
        return sum(part.activated for part in self.parts)

    @property
    def forward(self) -> float:
        """FLOPs of one sample's forward."""
        return sum(part.forward for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, sums included."""
        return asdict(self) | {"total": self.total, "activated": self.activated, "forward": self.forward}

    def lines(self) -> list[str]:
        """The plan as a table to read."""
        held = [(part.name, part.parameters, part.activated, part.forward) for part in self.parts if part.parameters]
        at = f"C = {self.capacity:g}"
        rows = [("", "parameters", f"activated, {at}", f"GFLOPs a sample, {at}")]
        for name, parameters, activated, forward in [*held, ("total", self.total, self.activated, self.forward)]:
            rows.append((name, f"{parameters:,}", f"{activated:,.0f}", f"{forward / 1e9:,.3f}"))
        head, rule, *parts, total = table(rows)
        notes = [
            f"activated, exactly: {self.activated / 1e6:,.1f}M; by the paper's Eq. 40: {self.equation_40 / 1e6:,.1f}M",
            f"FLOPs a sample: forward {self.forward / 1e9:,.3f} G at {at}; "
            f"training {self.training / 1e9:,.3f} G at C = {self.training_capacity:g} (three forwards)",
        ]
        return [self.title, "", head, rule, *parts, rule, total, "", *notes]


def plan(config: Config, capacity: float | None = None) -> Plan:
    """Plan a config's model at a capacity (None: training's, which is pool.capacity, and in family tc what top_k makes
    it).

    Raises ConfigError for a capacity that the model cannot have.
    """
    model, sizes = config.model, count(config.model)
    trained = sizes.capacity * (config.pool.capacity if model.family in ("diffmoe", "ec") else 1.0)
    chosen = trained if capacity is None else capacity
    _check_capacity(model, chosen, trained)
    parts = _parts(model, sizes, chosen)
    training = 3 * sum(part.forward for part in _parts(model, sizes, trained))
    return Plan(_title(model), parts, chosen, trained, equation_40(model, chosen), training)


def _parts(model: ModelConfig, sizes: Count, capacity: float) -> tuple[Part, ...]:
    flops = _forward(model, capacity)
    return (
        Part("FFN", sizes.dense_ffn, sizes.dense_ffn, flops["FFN"]),
        Part("experts", sizes.experts, capacity * sizes.unit * sizes.experts, flops["experts"]),
        Part("shared experts", sizes.shared, sizes.shared, flops["shared experts"]),
        Part("attention", sizes.attention, sizes.attention, flops["attention"]),
        Part("cross-attention", sizes.cross_attention, sizes.cross_attention, flops["cross-attention"]),
        Part("adaLN", sizes.modulation, sizes.modulation, flops["adaLN"]),
        Part("router", sizes.router, sizes.router, flops["router"]),
        Part("predictor", sizes.predictor, sizes.predictor, flops["predictor"]),
        Part("other", sizes.other, sizes.other, flops["other"]),
    )


def _forward(model: ModelConfig, capacity: float) -> dict[str, float]:
    """FLOPs of one sample's forward by kind of module."""
    hidden, tokens, moe, width = model.hidden_size, num_tokens(model), moe_blocks(model), expert_width(model)

    def linear(rows: float, ins: int, outs: int) -> float:
        return 2 * rows * ins * outs

    def ffn(rows: float, width: int) -> float:
        return linear(rows, hidden, width) + linear(rows, width, hidden)

    pixels = model.patch**2
    mixing = linear(tokens, hidden, tokens) + linear(
        tokens, tokens, hidden
    )  # scores, and values by them, over all heads
    caption = (
        model.text_length if model.condition == "text" else 0
    )  # all places, also those that a caption leaves empty
    looking = (
        linear(tokens, hidden, 2 * hidden) + linear(caption, hidden, 2 * hidden) + 2 * linear(tokens, hidden, caption)
    )
    embedding = linear(caption, model.text_width, hidden) + linear(caption, hidden, hidden)
    time = linear(1, 256, hidden) + linear(1, hidden, hidden)
    head = linear(1, hidden, 2 * hidden) + linear(tokens, hidden, pixels * model.out_channels)
    return {
        "FFN": (model.num_blocks - moe) * ffn(tokens, 4 * hidden),
        "experts": moe * ffn(capacity * model.granularity * tokens, width),  # a sample's rows in all N experts together
        "shared experts": moe * model.shared_experts * ffn(tokens, width),
        "attention": model.num_blocks * (linear(tokens, hidden, 3 * hidden) + mixing + linear(tokens, hidden, hidden)),
        "cross-attention": model.num_blocks * looking if caption else 0,
        "adaLN": model.num_blocks * linear(1, hidden, 6 * hidden),
        "router": moe * linear(tokens, hidden, model.num_experts),
        "predictor": moe * linear(tokens, hidden, hidden + model.num_experts) if has_predictor(model) else 0,
        "other": linear(tokens, model.in_channels * pixels, hidden) + time + embedding + head,
    }


def _check_capacity(model: ModelConfig, capacity: float, trained: float) -> None:
    most = model.num_experts / model.granularity
    if has_experts(model) and not (math.isfinite(capacity) and 0 <= capacity <= most):
        raise ConfigError(
            f"capacity {capacity:g} is not between 0 and {most:g}, where every expert takes every token "
            "(model.num_experts / model.granularity); give one between"
        )
    if model.family in ("tc", "dense") and capacity != trained:
        reason = "tokens choose model.top_k experts each" if model.family == "tc" else "every token passes every layer"
        raise ConfigError(
            f"capacity {capacity:g}: in family {model.family} {reason}, so C is {trained:g}; leave the capacity out"
        )


def _title(model: ModelConfig) -> str:
    words = [model.family if model.size is None else f"{model.family}, size {model.size}"]
    words.append(
        f"{model.num_blocks} blocks, hidden {model.hidden_size}, {model.num_heads} heads, {num_tokens(model)} tokens"
    )
    if model.condition == "text":
        words.append(f"captions of {model.text_length} tokens, width {model.text_width}")
    if has_experts(model):
        fine = f" of width 4D/{model.granularity}" if model.granularity > 1 else ""
        shared = f" and {model.shared_experts} shared" if model.shared_experts else ""
        words.append(f"{model.num_experts}{shared} experts{fine} in {moe_blocks(model)} blocks")
    return "; ".join(words)
