"""The MoE layer: it takes the place of a block's feed-forward network.

Legend: B samples, T tokens of a sample, S = B * T tokens on this rank, D hidden size, N experts, R rows.

In training every expert takes its k best tokens of a pool that may span all ranks (DiffMoE) or is one sample (EC-DiT), or every token
takes its best experts (TC-DiT); at inference a capacity predictor may say how many tokens an expert takes.
The layer is written for one device; `model.parallelize` swaps its dispatcher and its pools and slices its experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig, has_predictor, num_tokens, tokens_per_expert
from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.dispatch import Dispatch, LocalDispatch
from diffmoe_ep.moe.experts import Experts, FeedForward
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import Assignment, Router, balance_loss, choose_by_pool, choose_by_token


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in one forward, for the losses, the thresholds and the logs; no gradient but in `loss` and `balance`.

    Rows are counted in experts as wide as a dense FFN: at granularity m a row weighs 1/m, so that capacity N * rows / S is compute.
    """

    processed: Tensor  # (N,) how many of this rank's tokens each expert took
    num_tokens: int  # this rank's tokens S
    wanted: Tensor  # (N,) how many it would take by the dynamic thresholds; without predictor, and in inference, the same as processed
    quantile: Tensor | None = None  # (N,) k-th largest prediction, mean over this rank's pools; training with a predictor only
    loss: Tensor | None = None  # the predictor's loss; training with a predictor only
    balance: Tensor | None = None  # the balance loss; training of token choice only


class MoELayer(nn.Module):
    """Router, experts, and what the family adds: a capacity predictor, shared experts."""

    def __init__(self, model: ModelConfig, pool: PoolConfig) -> None:
        super().__init__()
        self.router = Router(model.hidden, model.num_experts)
        self.predictor = CapacityPredictor(model.hidden, model.num_experts, model.threshold_decay) if has_predictor(model) else None
        self.experts = Experts(model.num_experts, model.hidden, model.kernel, model.granularity)
        self.shared = (
            FeedForward(model.hidden, model.shared_experts * 4 * model.hidden // model.granularity) if model.shared_experts else None
        )
        self.num_experts, self.granularity = model.num_experts, model.granularity
        self.top_k = model.top_k if model.family == "tc" else None
        self.capacity = pool.capacity
        span = 1 if model.family == "ec" else pool.span
        self.pools = Pools(None if span == "all" else span * num_tokens(model))
        self.rule = InferenceRule()
        self.dispatcher: Dispatch = LocalDispatch()

    def forward(self, x: Tensor) -> tuple[Tensor, LayerReport]:
        """Mix tokens x (B, T, D): each gets the weighted sum of the experts that took it, zero if none did, plus the shared ones."""
        tokens = x.flatten(0, 1)  # (S, D)
        scores = self.router(tokens)  # (S, N)
        logits = self.predictor(tokens) if self.predictor is not None else None  # (S, N)
        assignment, kth = self._choose(scores, logits)
        rows, handle = self.dispatcher.dispatch(tokens, assignment)  # (R, D), grouped by local expert
        mixed = self.dispatcher.combine(self.experts(rows, handle.counts), handle)  # (S, D)
        if self.shared is not None:
            mixed = mixed + self.shared(tokens)
        return mixed.view_as(x), self._report(scores, logits, assignment, handle.processed, kth)

    def _choose(self, scores: Tensor, logits: Tensor | None) -> tuple[Assignment, Tensor | None]:
        """Who takes whom; in training with a predictor also the k-th largest logits (pools, N)."""
        if self.top_k is not None:
            return choose_by_token(scores, self.top_k), None
        if self.training:
            assignment, selection = choose_by_pool(scores, self._k(scores, self.pools, self.capacity), self.pools, also=logits)
            return assignment, selection.kth
        return self._choose_by_rule(scores, logits), None

    def _choose_by_rule(self, scores: Tensor, logits: Tensor | None) -> Assignment:
        """At inference: tokens over the threshold (Eq. 14), as many of the call by score (Algorithm 4), or the training rule."""
        rule = self.rule.selection if self.rule.selection != "auto" else ("topk" if logits is None else "threshold")
        if not len(scores):  # a rank without samples still takes part
            return Assignment(torch.zeros_like(scores, dtype=torch.bool), scores)
        if rule == "topk":
            pools = Pools(self.pools.tokens)  # the training spans; `all` is the call
            if len(scores) % pools.size(len(scores)):
                raise ConfigError(
                    f"selection topk: the call's {len(scores)} tokens are no multiple of a pool's {pools.tokens} (pool.span); give a "
                    "multiple of pool.span samples (sample.chunk), or choose threshold or count"
                )
            return choose_by_pool(scores, self._k(scores, pools, self.rule.capacity, "sample.capacity"), pools)[0]
        if self.predictor is None or logits is None:
            raise ConfigError(f"selection {rule} needs a capacity predictor, which this model has not; choose auto or topk")
        wanted = self.predictor.wanted(logits, self.rule)
        return Assignment(wanted, scores) if rule == "threshold" else choose_by_pool(scores, wanted.sum(0), Pools())[0]

    def _k(self, scores: Tensor, pools: Pools, capacity: float, key: str = "pool.capacity") -> int:
        return tokens_per_expert(pools.size(len(scores)), capacity, self.num_experts, key, self.granularity)

    def _report(self, scores: Tensor, logits: Tensor | None, chosen: Assignment, rows: Tensor, kth: Tensor | None) -> LayerReport:
        processed = rows if self.granularity == 1 else rows / self.granularity
        if not self.training:
            return LayerReport(processed, len(scores), processed)
        if self.top_k is not None:
            return LayerReport(processed, len(scores), processed, balance=balance_loss(scores, chosen.chosen, self.pools))
        if self.predictor is None or logits is None or kth is None:
            return LayerReport(processed, len(scores), processed)
        with torch.no_grad():
            wanted = self.predictor.wanted(logits, InferenceRule()).sum(0) / self.granularity
            quantile = torch.sigmoid(kth).mean(0)
        return LayerReport(processed, len(scores), wanted, quantile, self.predictor.loss(logits, chosen.chosen))
