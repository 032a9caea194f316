"""Who takes whom, and with what weight: from scores to an Assignment.

Expert choice and pool choice are one top-k over tokens, in pools of one sample or of many; token choice is a top-k over
experts.

Legend: S tokens on this rank, N experts, R chosen (token, expert) pairs of this rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.moe.pool import Pools, TopK, topk_per_expert
from diffmoe_ep.parallel.collectives import all_sum


@dataclass(frozen=True)
class Assignment:
    """Which expert takes which of this rank's tokens, and the weight of its answer."""

    chosen: Tensor  # (S, N) bool
    weight: Tensor  # (S, N) at least float32; carries the gradient to the router; only chosen entries are used
    taken: int | None = (
        None  # rows that every expert takes of the tokens of `ranks` neighbouring ranks, if all ranks know it alike
    )
    ranks: int = 1


class Router(nn.Module):
    """Scores of tokens for experts: softmax over experts of a linear map without bias (Eq. 1), in at least float32."""

    def __init__(self, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))  # (N, D)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (S, D) to scores (S, N) that sum to one over experts."""
        with torch.autocast(tokens.device.type, enabled=False):
            wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            return torch.softmax(wide @ self.weight.to(wide.dtype).T, dim=-1)


def choose_by_pool(
    scores: Tensor, k: int | Tensor, pools: Pools, extra: Tensor | None = None
) -> tuple[Assignment, TopK]:
    """Let every expert take the k tokens of a pool with its largest scores (Eq. 6); a pool of one sample is expert
    choice.
    """
    selection = topk_per_expert(scores, k, pools, extra)
    return Assignment(selection.chosen, scores), selection


def choose_by_token(scores: Tensor, top_k: int) -> Assignment:
    """Let every token take the top_k experts of its largest scores (Eq. 2), the first of equal ones; nothing is dropped
    or renormalised.
    """
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]  # (S, K)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    return Assignment(chosen, scores)


def choices(chosen: Tensor, pools: Pools) -> Tensor:
    """How many choices of each pool fall on each expert, summed over the ranks of the pool: (pools, N) float32. No
    gradient.
    """
    tokens, num_experts = chosen.shape
    here = min(pools.size(tokens), tokens)  # tokens of a pool on this rank
    return all_sum(chosen.view(-1, here, num_experts).sum(1).float(), pools.group)


def balance_loss(scores: Tensor, counts: Tensor) -> Tensor:
    """The balance loss sum_e N f_e P_e of token choice, mean over this rank's pools, from scores (S, N) and `choices`
    (pools, N).

    f_e is the share of the pool's choices that fall on expert e, P_e its mean score. Over ranks f is summed and P stays
    this rank's own
    mean: the mean of the ranks' losses, which data parallelism takes, is the pool's, and so are its gradients.
    """
    num_pools, num_experts = counts.shape
    counts = counts.to(scores.dtype)
    share = counts / counts.sum(1, keepdim=True)
    mean = scores.view(num_pools, -1, num_experts).mean(1)
    return num_experts * (share * mean).sum(1).mean()
