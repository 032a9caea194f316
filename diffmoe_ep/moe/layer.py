"""The MoE layer: it takes the place of a block's feed-forward network.

Legend: B samples, T tokens of a sample, S = B * T tokens on this rank, D hidden size, N experts, R rows.

In training every expert takes its k best tokens of a pool that may span all ranks; at inference the capacity predictor says how many.
The layer is written for one device; `model.parallelize` swaps its dispatcher and its pools and slices its experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig, num_tokens, tokens_per_expert
from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.dispatch import Dispatch, LocalDispatch
from diffmoe_ep.moe.experts import Experts
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import Assignment, Router, choose_by_pool


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in one forward, for the loss, the thresholds and the logs; no gradient but in `loss`."""

    processed: Tensor  # (N,) how many of this rank's tokens each expert took
    num_tokens: int  # this rank's tokens S
    wanted: Tensor  # (N,) how many it would take by the dynamic thresholds; in inference the same as processed
    quantile: Tensor | None  # (N,) k-th largest prediction, mean over this rank's pools; training only
    loss: Tensor | None  # the predictor's loss; training only


class MoELayer(nn.Module):
    """Router, capacity predictor and experts."""

    def __init__(self, model: ModelConfig, pool: PoolConfig) -> None:
        super().__init__()
        self.router = Router(model.hidden, model.num_experts)
        self.predictor = CapacityPredictor(model.hidden, model.num_experts, model.threshold_decay)
        self.experts = Experts(model.num_experts, model.hidden, model.kernel)
        self.num_experts = model.num_experts
        self.capacity = pool.capacity
        self.pools = Pools(None if pool.span == "all" else pool.span * num_tokens(model))
        self.rule = InferenceRule()
        self.dispatcher: Dispatch = LocalDispatch()

    def forward(self, x: Tensor) -> tuple[Tensor, LayerReport]:
        """Mix tokens x (B, T, D): each gets the weighted sum of the experts that took it, zero if none did."""
        tokens = x.flatten(0, 1)  # (S, D)
        scores = self.router(tokens)  # (S, N)
        logits = self.predictor(tokens)  # (S, N)
        assignment, kth = self._by_pool(scores, logits) if self.training else (self._by_rule(scores, logits), None)
        rows, handle = self.dispatcher.dispatch(tokens, assignment)  # (R, D), grouped by local expert
        mixed = self.dispatcher.combine(self.experts(rows, handle.counts), handle)  # (S, D)
        return mixed.view_as(x), self._report(logits, assignment, handle.processed, kth)

    def _by_pool(self, scores: Tensor, logits: Tensor) -> tuple[Assignment, Tensor]:
        """In training every expert takes the k best tokens of its pool (Eq. 6); gives the k-th largest logits (pools, N) too."""
        k = tokens_per_expert(self.pools.size(len(scores)), self.capacity, self.num_experts, "pool.capacity")
        assignment, selection = choose_by_pool(scores, k, self.pools, also=logits)
        assert selection.kth is not None
        return assignment, selection.kth

    def _by_rule(self, scores: Tensor, logits: Tensor) -> Assignment:
        """At inference: tokens over the threshold (Eq. 14), as many of the call by score (Algorithm 4), or the training rule."""
        wanted = self.predictor.wanted(logits, self.rule)
        if self.rule.selection == "threshold" or not len(scores):  # a rank without samples still takes part
            return Assignment(wanted, scores)
        if self.rule.selection == "count":
            return choose_by_pool(scores, wanted.sum(0), Pools())[0]
        pools = Pools(self.pools.tokens)  # the training spans; `all` is the call
        if len(scores) % pools.size(len(scores)):
            raise ConfigError(
                f"selection topk: the call's {len(scores)} tokens are no multiple of a pool's {pools.tokens} (pool.span); give a "
                "multiple of pool.span samples (sample.chunk), or choose threshold or count"
            )
        k = tokens_per_expert(pools.size(len(scores)), self.rule.capacity, self.num_experts, "sample.capacity")
        return choose_by_pool(scores, k, pools)[0]

    def _report(self, logits: Tensor, assignment: Assignment, processed: Tensor, kth: Tensor | None) -> LayerReport:
        if kth is None:
            return LayerReport(processed, len(logits), processed, None, None)
        with torch.no_grad():
            wanted = self.predictor.wanted(logits, InferenceRule()).sum(0)
            quantile = torch.sigmoid(kth).mean(0)
        return LayerReport(processed, len(logits), wanted, quantile, self.predictor.loss(logits, assignment.chosen))
