"""Exact top-k per expert over pools of tokens that may be sharded over ranks: the choice of W ranks is the choice of
one.

Legend: S tokens on this rank, N experts, M further columns, P tokens in a pool, k tokens that an expert takes from a
pool.

The order is total: score descending, then global token number ascending (sample position, then token), so the chosen
set does not depend on how tokens are laid over ranks, ties included. Zeros are equal whatever their sign, and a score
that is no number (NaN) counts as -inf: it is chosen last, and every expert still takes exactly k. Samples of a
micro-step are laid over ranks in the order of their positions, so a pool is a run of consecutive samples: several pools
inside one rank, or one pool over neighbouring ranks.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffmoe_ep.moe.topk.cost import Algorithm, cheapest, link_between
from diffmoe_ep.moe.topk.search import SEARCHES, KthValue, kth_largest
from diffmoe_ep.parallel.collectives import ALONE, Group


@dataclass(frozen=True)
class Pools:
    """How a rank's tokens are cut into pools, and how the ranks of one pool find its top-k."""

    tokens: int | None = None  # tokens P of a pool; None: all tokens of the call, over the group's ranks, are one pool
    group: Group = ALONE  # the ranks that one pool covers; this rank alone when pools lie inside it
    algorithm: Literal["auto", "gather", "owner", "radix"] = (
        "auto"  # all return the same bits; auto: by bytes and rounds
    )

    def size(self, local: int) -> int:
        """Tokens of one pool when this rank has `local` tokens."""
        return local * self.group.size if self.tokens is None else self.tokens


class TopK(NamedTuple):
    """What the experts chose of this rank's tokens."""

    chosen: Tensor  # (S, N) bool; its transpose is contiguous
    kth_value: Tensor | None  # (pools that this rank is part of, M): k-th largest value of each column of `extra`


@torch.no_grad()
def topk_per_expert(scores: Tensor, k: int | Tensor, pools: Pools, extra: Tensor | None = None) -> TopK:
    """Let every expert take its k best tokens of each pool, those that other ranks hold included in the comparison.

    scores (S, N): larger is better; compared as they are, so in float32 or float64.
    k: one number for all experts, or (N,) one for each; 0 allowed, at most P.
    extra (S, M): further columns of which only the k-th largest value is wanted (M = N when k is a tensor); they ride
    in the same search.
    """
    local, num_experts = scores.shape
    columns = scores.T if extra is None else torch.cat([scores.T, extra.T.to(scores.dtype)])
    columns = columns.nan_to_num(float("-inf"), float("inf"), float("-inf")).contiguous()  # (N + M, S)
    if not isinstance(k, int):
        k = k.repeat(len(columns) // len(k))  # the columns of `extra` are ranked like the experts'
    if pools.group.size == 1:
        columns = columns.view(len(columns), -1, pools.size(local))  # (N + M, pools, P)
        found = _search_here(columns, k, num_experts)
    else:
        assert pools.size(local) == local * pools.group.size, "a pool over ranks holds all their tokens"
        found = SEARCHES[_algorithm(columns, num_experts, pools)](columns, k, num_experts, pools.group)
    kth = found.kth_value + 0.0  # one zero
    chosen = _take(columns[:num_experts], kth[:num_experts, ..., None], found.tie_quota[..., None])
    return TopK(
        chosen.view(num_experts, local).T,
        None if extra is None else kth[num_experts:].view(len(columns) - num_experts, -1).T,
    )


def _search_here(columns: Tensor, k: int | Tensor, experts: int) -> KthValue:
    """The k-th values of pools that lie inside this rank, columns (N + M, pools, P)."""
    kth = kth_largest(columns, k)  # (N + M, pools)
    wanted = k if isinstance(k, int) else k[:experts, None]
    return KthValue(kth, wanted - (columns[:experts] > kth[:experts, :, None]).sum(2))


def _take(scores: Tensor, kth: Tensor, tie_quota: Tensor) -> Tensor:
    """Those above the k-th value, and of those equal to it the first `tie_quota` along the last dimension."""
    tied = scores == kth
    return (scores > kth) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= tie_quota))


def _algorithm(columns: Tensor, experts: int, pools: Pools) -> Algorithm:
    if pools.algorithm != "auto":
        return pools.algorithm
    link = link_between(columns.device.type, pools.group.nodes)
    width = columns.element_size()
    return cheapest(columns.shape[1], len(columns), pools.group.size, link, experts=experts, width=width)
