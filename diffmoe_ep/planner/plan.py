"""What a model holds and costs, from its config alone: parameters by module, activated parameters, FLOPs of one sample.

Legend: T tokens of a sample, m granularity, C capacity.

FLOPs are those of the matmuls, 2 for each multiply-add, as model FLOPs utilisation counts them: what is recomputed, and
norms, softmax and activations, are left out. Training is three forwards (the gradients by weights and by inputs cost
one each).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffmoe_ep.config import Config, ConfigError, ModelConfig, has_experts, num_tokens
from diffmoe_ep.model.count import count, equation_40, moe_blocks
from diffmoe_ep.planner.operations import Load, operations
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
    model = config.model
    trained = count(model).capacity * (config.pool.capacity if model.family in ("diffmoe", "ec") else 1.0)
    chosen = trained if capacity is None else capacity
    _check_capacity(model, chosen, trained)
    parts = _parts(model, chosen)
    training = 3 * sum(part.forward for part in _parts(model, trained))
    return Plan(_title(model), parts, chosen, trained, equation_40(model, chosen), training)


def _parts(model: ModelConfig, capacity: float) -> tuple[Part, ...]:
    """Every kind of module, with the FLOPs of one sample; its rows in all experts together are C m T."""
    sizes, rows = count(model), capacity * model.granularity * num_tokens(model)
    parameters = {
        "FFN": sizes.dense_ffn, "experts": sizes.experts, "shared experts": sizes.shared,
        "attention": sizes.attention, "cross-attention": sizes.cross_attention, "adaLN": sizes.modulation,
        "router": sizes.router, "predictor": sizes.predictor, "other": sizes.other,
    }  # fmt: skip
    flops = dict.fromkeys(parameters, 0.0)
    for times, listed in operations(model, Load(samples=1, pairs=rows, rows=rows, experts=model.num_experts)).counted():
        for operation in listed:
            flops[operation.module] += times * operation.flops
    work = {"experts": capacity * sizes.unit * sizes.experts}
    return tuple(Part(name, held, work.get(name, held), flops[name]) for name, held in parameters.items())


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
