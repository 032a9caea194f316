"""What one rank holds and handles in a layout: its parameters, its share of a micro-step, and the rows that its experts
get.

Legend: W ranks, EP of them share a copy of the experts, EDP = W / EP copies; S tokens of a rank's micro-step, N
experts, P tokens and k choices of a pool.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Literal, get_args

from diffmoe_ep.config import (
    Config,
    ModelConfig,
    has_experts,
    has_predictor,
    num_tokens,
    pool_samples,
    tokens_per_expert,
)
from diffmoe_ep.model.count import expert_width
from diffmoe_ep.model.dit import is_moe

Recompute = Literal["none", "ffn", "block"]  # nothing, the feed-forward part of each block, each block whole
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
LARGEST_EXPERT_GROUP = 178_956_971  # elements; DeepSpeed begins another flat group of experts beyond


@dataclass(frozen=True)
class Layout:
    """How a run is laid over ranks."""

    world: int  # W
    expert: int  # EP
    zero: int  # ZeRO stage
    recompute: Recompute  # what is not kept for the backward but computed again there

    @property
    def replicas(self) -> int:
        """Copies of the experts, EDP."""
        return self.world // self.expert

    @property
    def name(self) -> str:
        """The layout in words."""
        return f"EP {self.expert}, ZeRO {self.zero}, recompute {self.recompute}"


@dataclass(frozen=True)
class Weight:
    """One trainable tensor as a rank holds it."""

    numel: int
    expert: bool  # sharded over the expert group and copied in the replicas
    copied: bool  # under bf16 its cast copy is kept from the forward to the backward
    moe: bool = False  # stands in an MoE block
    block: bool = False  # stands in a block
    ffn: bool = False  # in its feed-forward part
    stacked: bool = False  # holds several experts


@dataclass(frozen=True)
class Share:
    """One rank's part of a micro-step."""

    samples: int  # B
    tokens: int  # S
    pairs: int  # (token, expert) choices of this rank's tokens, mean over ranks
    most_pairs: int  # the most that there can be
    rows: int  # rows that this rank's experts get, mean over ranks
    most_rows: int  # the most that there can be
    pool_ranks: int  # ranks of one pool


@lru_cache
def weights(model: ModelConfig, expert: int) -> tuple[Weight, ...]:
    """A rank's trainable tensors in the order of `model.parameters()`, for experts sharded over `expert` ranks."""
    hidden = model.hidden_size
    found = _linear(model.in_channels * model.patch**2, hidden, copied=False)
    found += _linear(256, hidden, copied=False) + _linear(hidden, hidden)
    text = model.condition == "text"
    if text:
        found += [Weight(model.text_width, False, False), *_linear(model.text_width, hidden), *_linear(hidden, hidden)]
    else:
        found.append(Weight((model.num_classes + 1) * hidden, False, False))
    for block in range(model.num_blocks):
        moe = is_moe(model, block)
        attention, ffn = _linear(hidden, 3 * hidden) + _linear(hidden, hidden), _ffn(model, moe, expert)
        attention += _linear(hidden, hidden) * 4 if text else []
        for part, is_ffn in ((attention, False), (ffn, True), (_linear(hidden, 6 * hidden), False)):
            found += [replace(weight, moe=moe, block=True, ffn=is_ffn) for weight in part]
    return tuple(found + _linear(hidden, 2 * hidden) + _linear(hidden, model.patch**2 * model.out_channels))


def _ffn(model: ModelConfig, moe: bool, expert: int) -> list[Weight]:
    hidden, width, experts = model.hidden_size, expert_width(model), model.num_experts
    if not moe:
        return _linear(hidden, 4 * hidden) + _linear(4 * hidden, hidden)
    part = [Weight(experts * hidden, False, False)]  # the router stays float32
    if has_predictor(model):
        part += _linear(hidden, hidden, copied=False) + _linear(hidden, experts)
    here = experts // expert
    shapes = ((hidden, width), (width,), (width, hidden), (hidden,))
    part += [Weight(here * prod(shape), expert > 1, len(shape) == 2, stacked=True) for shape in shapes]
    if model.shared_experts:
        part += _linear(hidden, model.shared_experts * width) + _linear(model.shared_experts * width, hidden)
    return part


def _linear(ins: int, outs: int, copied: bool = True) -> list[Weight]:
    return [Weight(ins * outs, False, copied), Weight(outs, False, False)]


@dataclass(frozen=True)
class Partition:
    """A flat group of parameters as ZeRO 1 and 2 cut it: the rank that holds most."""

    ranks: int  # over which it is cut
    padded: int  # elements of the whole group, with the padding that makes the parts equal
    touched: int  # elements of the parameters of which this part holds anything: their reduced gradients are kept whole

    @property
    def part(self) -> int:
        """Elements of one part."""
        return self.padded // self.ranks


@lru_cache
def partitions(held: tuple[Weight, ...], layout: Layout) -> tuple[Partition, ...]:
    """The flat groups of a rank's parameters: dense ones over all ranks, sharded experts, in groups of a most size,
    over their copies.
    """
    groups = [([weight.numel for weight in held if not weight.expert], layout.world)]
    run: list[int] = []
    for numel in [weight.numel for weight in held if weight.expert]:
        if sum(run) + numel > LARGEST_EXPERT_GROUP:
            groups.append((run, layout.replicas))
            run = []
        run.append(numel)
    groups.append((run, layout.replicas))
    return tuple(_cut(numels, ranks) for numels, ranks in groups if numels)


def _cut(numels: list[int], ranks: int) -> Partition:
    step = 2 * ranks  # DeepSpeed's alignment
    padded = -(-sum(numels) // step) * step
    size = padded // ranks
    touched = [0] * ranks
    for end, numel in zip(accumulate(numels), numels, strict=True):
        for part in range((end - numel) // size, (end - 1) // size + 1):
            touched[part] += numel
    return Partition(ranks, padded, max(touched))


def share(config: Config, layout: Layout) -> Share:
    """One rank's part of a micro-step; the config's batch must divide over the ranks."""
    model = config.model
    samples = config.train.micro_step_samples // layout.world
    tokens = samples * num_tokens(model)
    if not has_experts(model):
        return Share(samples, tokens, 0, 0, 0, 0, 1)
    here = model.num_experts // layout.expert
    if model.family == "tc":
        pairs = tokens * model.top_k
        return Share(samples, tokens, pairs, pairs, pairs, layout.expert * tokens * min(model.top_k, here), 1)
    span = pool_samples(config)
    ranks = max(1, span // samples)  # of a pool
    k = tokens_per_expert(
        span * num_tokens(model), config.pool.capacity, model.num_experts, "pool.capacity", model.granularity
    )
    pairs = samples * model.num_experts * k // span
    most_pairs = pairs if ranks == 1 else model.num_experts * min(k, tokens)
    inside = (
        ranks <= layout.expert and layout.expert % ranks == 0
    )  # whole pools in an expert group: every expert gets its k rows of each
    most_rows = pairs if inside else here * min(-(-layout.expert // ranks) * k, layout.expert * tokens)
    return Share(samples, tokens, pairs, max(pairs, most_pairs), pairs, max(pairs, most_rows), ranks)
