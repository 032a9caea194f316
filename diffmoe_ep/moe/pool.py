"""Exact top-k per expert over pools of tokens that may be sharded over ranks: the choice of W ranks is the choice of one.

Legend: S tokens on this rank, N experts, P tokens in a pool, k tokens that an expert takes from a pool.

The order is total: score descending, then global token number ascending (sample position, then token), so the chosen set does not depend
on how tokens are laid over ranks, ties included. Samples of a micro-step are laid over ranks in the order of their positions, so a pool is
a run of consecutive samples: several pools inside one rank, or one pool over neighbouring ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.parallel.collectives import ALONE, Group, all_gather


@dataclass(frozen=True)
class Pools:
    """How a rank's tokens are cut into pools."""

    tokens: int | None = None  # tokens P of a pool; None: all tokens of the call, over the group's ranks, are one pool
    group: Group = ALONE  # the ranks that one pool covers; this rank alone when pools lie inside it

    def size(self, local: int) -> int:
        """Tokens of one pool when this rank has `local` tokens."""
        return local * self.group.size if self.tokens is None else self.tokens


@dataclass(frozen=True)
class Selection:
    """What the experts chose of this rank's tokens."""

    chosen: Tensor  # (S, N) bool
    kth: Tensor | None  # (pools that this rank is part of, M): k-th largest value of each column of `also`


def select(scores: Tensor, k: int | Tensor, pools: Pools, also: Tensor | None = None) -> Selection:
    """Let every expert take its k best tokens of each pool, by all-gathering the scores (`gather`).

    scores (S, N): larger is better; compared as they are, so give them in float32 or float64.
    k: one number for all experts, or (N,) one for each (0 allowed; needs no host synchronisation).
    also (S, M): further columns of which only the k-th largest value is wanted (M = N when k is a tensor); they ride in the same gather.
    """
    local, num_experts = scores.shape
    columns = scores.detach() if also is None else torch.cat([scores.detach(), also.detach().to(scores.dtype)], dim=1)
    pooled = all_gather(columns, pools.group)  # (S * ranks, N + M)
    pooled = pooled.view(-1, pools.size(local), columns.shape[1])  # (pools, P, N + M)
    kth = _kth_largest(pooled, k)  # (pools, N + M)

    mine, bound = pooled[:, :, :num_experts], kth[:, None, :num_experts]
    above, tied = mine > bound, mine == bound
    quota = k - above.sum(1, keepdim=True)  # (pools, 1, N) ties that are still taken
    chosen = above | (tied & (tied.cumsum(1) <= quota))  # earlier tokens win ties
    chosen = chosen.view(-1, num_experts)
    first = pools.group.rank * local
    return Selection(chosen[first : first + local], None if also is None else kth[:, num_experts:])


def _kth_largest(pooled: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest value of each column of pooled (pools, P, M) as (pools, M); +inf where k is 0."""
    if isinstance(k, int):
        if k == 0:
            return pooled.new_full((pooled.shape[0], pooled.shape[2]), float("inf"))
        return pooled.topk(k, dim=1).values[:, -1]
    k = k.repeat(pooled.shape[2] // k.shape[0])  # the columns of `also` are ranked like the experts'
    ordered = pooled.sort(dim=1, descending=True).values
    index = (k - 1).clamp(min=0).expand(pooled.shape[0], 1, -1)
    return ordered.gather(1, index).squeeze(1).masked_fill(k == 0, float("inf"))
