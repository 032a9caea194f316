"""How a run is laid over ranks, and one rank's share of a micro-step in a layout: its samples, and the rows that its
experts get.

Legend: W ranks, EP of them share a copy of the experts, EDP = W / EP copies; S tokens of a rank's micro-step, N
experts, P tokens and k choices of a pool.
"""

from dataclasses import dataclass
from typing import get_args

from diffmoe_ep.config import (
    Config,
    has_experts,
    num_tokens,
    pool_samples,
    tokens_per_expert,
)
from diffmoe_ep.model.parallelize import Recompute

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


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
class Share:
    """One rank's part of a micro-step."""

    samples: int  # B
    tokens: int  # S
    pairs: int  # (token, expert) choices of this rank's tokens, mean over ranks
    most_pairs: int  # the most that there can be
    rows: int  # rows that this rank's experts get, mean over ranks
    most_rows: int  # the most that there can be
    pool_ranks: int  # ranks of one pool


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
