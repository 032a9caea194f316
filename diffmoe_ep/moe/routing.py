"""Who takes whom: from scores to a Routing.

In training every expert takes its best tokens of a pool, of one sample (expert choice) or of many; or every token takes
its best experts (token choice). At inference a rule decides.

Legend: S tokens on this rank, N experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ConfigError, tokens_per_expert
from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.handle import DispatchHandle
from diffmoe_ep.moe.pool import Pools, topk_per_expert
from diffmoe_ep.parallel.collectives import all_sum


@dataclass(frozen=True)
class Routing:
    """Which expert takes which of this rank's tokens in one forward, and what the same search found with it.

    Without gradient: it is what activation recomputation saves, so that nothing is chosen or exchanged twice. The gates
    that weigh the answers are the scores, and recomputed with their gradient.
    """

    chosen: Tensor  # (S, N) bool
    tokens_per_expert: int | None = None  # that each expert takes on `ranks` neighboring ranks, where all know it alike
    ranks: int = 1
    kth_logit: Tensor | None = None  # (pools, N) k-th largest logit of the predictor; training with a predictor only
    pool_choices: Tensor | None = None  # (pools, N) choices of each pool by expert; training of token choice only
    handle: DispatchHandle | None = None  # where the chosen rows go; `Dispatcher.prepare` sets it


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


@torch.no_grad()
def route_by_pool(scores: Tensor, k: int, pools: Pools, logits: Tensor | None = None) -> Routing:
    """Training: let every expert take the k tokens of a pool with its largest scores (Eq. 6); a pool of one sample is
    expert choice.

    logits (S, N) of the predictor, if there is one: their k-th largest per pool and expert are what thresholds follow.
    """
    topk = topk_per_expert(scores, k, pools, extra=logits)
    tokens, ranks = scores.shape[0], pools.group.size
    return Routing(topk.chosen, k * (tokens * ranks // pools.size(tokens)), ranks, topk.kth_value)


@torch.no_grad()
def route_by_token(scores: Tensor, top_k: int) -> Routing:
    """Let every token take the top_k experts of its largest scores (Eq. 2), the first of equal ones; nothing is dropped
    or renormalized.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]  # (S, K)
    return Routing(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True))


@torch.no_grad()
def route_by_rule(
    scores: Tensor,
    logits: Tensor | None,
    rule: InferenceRule,
    predictor: CapacityPredictor | None,
    span: int | None,
    granularity: int,
) -> Routing:
    """Inference: tokens over the threshold (Eq. 14), as many of the call by score (Algorithm 4), or the training rule.

    span: tokens of a training pool; None: the whole call. Raises ConfigError for a rule that does not fit.
    """
    tokens, num_experts = scores.shape
    selection = rule.selection if rule.selection != "auto" else ("topk" if logits is None else "threshold")
    if tokens == 0:  # a rank without samples still takes part
        return Routing(torch.zeros_like(scores, dtype=torch.bool))
    if selection == "topk":
        pools = Pools(span)
        if tokens % pools.size(tokens):
            raise ConfigError(
                f"selection topk: the call's {tokens} tokens are no multiple of a pool's {span} (pool.span); give a "
                "multiple of pool.span samples (sample.chunk), or choose threshold or count"
            )
        k = tokens_per_expert(pools.size(tokens), rule.capacity, num_experts, "sample.capacity", granularity)
        return Routing(topk_per_expert(scores, k, pools).chosen)
    if predictor is None or logits is None:
        raise ConfigError(
            f"selection {selection} needs a capacity predictor, which this model has not; choose auto or topk"
        )
    over_threshold = predictor.over_threshold(logits, rule)  # (S, N)
    if selection == "threshold":
        return Routing(over_threshold)
    return Routing(topk_per_expert(scores, over_threshold.sum(0), Pools()).chosen)


def choices_per_pool(chosen: Tensor, pools: Pools) -> Tensor:
    """How many choices of each pool fall on each expert, summed over the ranks of the pool: (pools, N) float32. No
    gradient.
    """
    tokens, num_experts = chosen.shape
    here = min(pools.size(tokens), tokens)  # tokens of a pool on this rank
    return all_sum(chosen.view(-1, here, num_experts).sum(1).float(), pools.group)


def balance_loss(scores: Tensor, choices: Tensor) -> Tensor:
    """The balance loss sum_e N f_e P_e of token choice, mean over this rank's pools, from scores (S, N) and
    `choices_per_pool` (pools, N).

    f_e is the share of the pool's choices that fall on expert e, P_e its mean score. Over ranks f is summed and P stays
    this rank's own mean: the mean of the ranks' losses, which data parallelism takes, is the pool's, and so are its
    gradients.
    """
    num_pools, num_experts = choices.shape
    choices = choices.to(scores.dtype)
    fraction = choices / choices.sum(1, keepdim=True)
    mean = scores.view(num_pools, -1, num_experts).mean(1)
    return num_experts * (fraction * mean).sum(1).mean()
