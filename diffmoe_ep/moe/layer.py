"""The MoE layer: it takes the place of a block's feed-forward network.

Legend: B samples, T tokens of a sample, S = B * T tokens on this rank, D hidden size, N experts, R rows.

In training every expert takes its k best tokens of a pool that may span all ranks; at inference the capacity predictor says how many.
The layer is written for one device; `model.parallelize` swaps its dispatcher and its pools and slices its experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ModelConfig, PoolConfig, num_tokens, tokens_per_expert
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
        assignment, report = self._train(scores, logits) if self.training else self._infer(scores, logits)
        rows, handle = self.dispatcher.dispatch(tokens, assignment)  # (R, D), grouped by local expert
        mixed = self.dispatcher.combine(self.experts(rows, handle.counts), handle)  # (S, D)
        return mixed.view_as(x), report

    def _train(self, scores: Tensor, logits: Tensor) -> tuple[Assignment, LayerReport]:
        """Every expert takes the k best tokens of its pool (Eq. 6)."""
        k = tokens_per_expert(self.pools.size(len(scores)), self.capacity, self.num_experts, "pool.capacity")
        assignment, selection = choose_by_pool(scores, k, self.pools, also=logits)
        assert selection.kth is not None
        with torch.no_grad():
            wanted = self.predictor.wanted(logits, InferenceRule()).sum(0)
            quantile = torch.sigmoid(selection.kth).mean(0)
        return assignment, LayerReport(
            selection.chosen.sum(0), len(scores), wanted, quantile, self.predictor.loss(logits, selection.chosen)
        )

    def _infer(self, scores: Tensor, logits: Tensor) -> tuple[Assignment, LayerReport]:
        """Tokens over the threshold (Eq. 14), as many by score (Algorithm 4), or the training rule; the call's tokens are one pool."""
        wanted = self.predictor.wanted(logits, self.rule)
        if self.rule.selection == "threshold" or not len(scores):  # a rank without samples still takes part
            assignment = Assignment(wanted, scores)
        elif self.rule.selection == "count":
            assignment, _ = choose_by_pool(scores, wanted.sum(0), Pools())
        else:
            k = tokens_per_expert(len(scores), self.rule.capacity, self.num_experts, "sample.capacity")
            assignment, _ = choose_by_pool(scores, k, Pools())
        processed = assignment.chosen.sum(0)
        return assignment, LayerReport(processed, len(scores), processed, None, None)
