"""The MoE layer: it takes the place of a block's feed-forward network.

Legend: B samples, T tokens of a sample, S = B * T tokens on this rank, D hidden size, N experts, R routed tokens at
this rank's experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from diffmoe_ep.config import ModelConfig, PoolConfig, has_predictor, num_tokens, tokens_per_expert
from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.dispatch import Dispatcher, LocalDispatch, handle_of, overlapped
from diffmoe_ep.moe.experts import Experts, FeedForward
from diffmoe_ep.moe.layer_report import LayerReport, report_layer
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import Router, Routing, choices_per_pool, route_by_pool, route_by_rule, route_by_token


class MoELayer(nn.Module):
    """N experts, of which each processes only some tokens, in four steps:

    1. route: each expert takes its k best tokens of a pool that may span all ranks (DiffMoE) or is one sample (EC-DiT),
       or each token takes its best experts (TC-DiT); at inference a capacity predictor may say how many (Eq. 14).
    2. dispatch: every chosen token is copied to the rank of its expert, as a row.
    3. experts: each computes its rows.
    4. combine: the answers come back and are added up by token, weighed by the scores.

    Shared experts, if any, process every token besides. The layer is written for one device; `model.parallelize` swaps
    its dispatcher and its pools and slices its experts.
    """

    def __init__(self, model: ModelConfig, pool: PoolConfig) -> None:
        super().__init__()
        hidden, num_experts = model.hidden_size, model.num_experts
        self.router = Router(hidden, num_experts)
        self.predictor = CapacityPredictor(hidden, num_experts, model.threshold_decay) if has_predictor(model) else None
        self.experts = Experts(num_experts, hidden, granularity=model.granularity)
        shared_width = model.shared_experts * 4 * hidden // model.granularity
        self.shared = FeedForward(hidden, shared_width) if model.shared_experts else None
        self.num_experts, self.granularity = num_experts, model.granularity
        self.top_k = model.top_k if model.family == "tc" else None
        self.capacity = pool.capacity
        span = 1 if model.family == "ec" else pool.span
        self.pools = Pools(None if span == "all" else span * num_tokens(model))
        self.rule = InferenceRule()
        self.dispatcher: Dispatcher = LocalDispatch()
        self._saved: list[Routing] | None = None  # see `reuse_routing`

    # fmt: off
    def forward(self, x: Tensor) -> tuple[Tensor, LayerReport]:
        """Tokens x (B, T, D) -> (B, T, D), the weighted sum of each token's experts, and what was done."""
        tokens = x.flatten(0, 1)                                                  # (S, D)
        scores = self.router(tokens)                                              # (S, N)
        logits = None if self.predictor is None else self.predictor(tokens)       # (S, N)

        routing = self.route(scores, logits)                                      # 1. which tokens each expert takes
        report = report_layer(scores, logits, routing, self.predictor, self.granularity)
        shared = None if self.shared is None else self.shared(tokens)             # (S, D), while row counts travel
        if handle_of(routing).num_chunks > 1:
            mixed = overlapped(self.experts, tokens, handle_of(routing), scores)  # 2. to 4. in chunks that overlap
        else:
            rows, handle = self.dispatcher.dispatch(tokens, routing)              # 2. (R, D), grouped by expert
            answers = self.experts(rows, handle.counts)                           # 3. (R, D)
            mixed = self.dispatcher.combine(answers, handle, scores)              # 4. (S, D)
        return (mixed if shared is None else mixed + shared).view_as(x), report
    # fmt: on

    def route(self, scores: Tensor, logits: Tensor | None) -> Routing:
        """Choose from scores and the predictor's logits, both (S, N), and start the exchange of row counts."""
        if self._saved:
            return self._saved[0]
        routing = self.dispatcher.prepare(self._choose(scores, logits))
        if self.top_k is not None and self.training:
            routing = replace(routing, pool_choices=choices_per_pool(routing.chosen, self.pools))
        if self._saved is not None:
            self._saved.append(routing)
        return routing

    def _choose(self, scores: Tensor, logits: Tensor | None) -> Routing:
        if self.top_k is not None:
            return route_by_token(scores, self.top_k)
        if not self.training:
            return route_by_rule(scores, logits, self.rule, self.predictor, self.pools.tokens, self.granularity)
        pool_size = self.pools.size(scores.shape[0])
        k = tokens_per_expert(pool_size, self.capacity, self.num_experts, "pool.capacity", self.granularity)
        return route_by_pool(scores, k, self.pools, logits)

    @contextmanager
    def reuse_routing(self, saved: list[Routing]) -> Iterator[None]:
        """While this lasts, a forward saves its routing in `saved`, or goes by the one that is there.

        Activation recomputation (`model.parallelize.apply_recompute`) wraps both forwards of a layer in it.
        """
        self._saved = saved
        try:
            yield
        finally:
            self._saved = None
