"""The MoE layer: it takes the place of a block's feed-forward network.

Legend: B samples, T tokens of a sample, S = B * T tokens on this rank, D hidden size, N experts, R rows.

In training every expert takes its k best tokens of a pool that may span all ranks (DiffMoE) or is one sample (EC-DiT),
or every token takes its best experts (TC-DiT); at inference a capacity predictor may say how many tokens an expert
takes. The layer is written for one device; `model.parallelize` swaps its dispatcher and its pools and slices its
experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig, has_predictor, num_tokens, tokens_per_expert
from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.dispatch import Dispatch, LocalDispatch, Route, overlapped
from diffmoe_ep.moe.experts import Experts, FeedForward
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import Assignment, Router, balance_loss, choices, choose_by_pool, choose_by_token


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in one forward, for the losses, the thresholds and the logs; no gradient but in `loss` and
    `balance`.

    Rows are counted in experts as wide as a dense FFN: at granularity m a row weighs 1/m, so that capacity N * rows / S
    is compute.
    """

    processed: Tensor  # (N,) how many of this rank's tokens each expert took
    num_tokens: int  # this rank's tokens S
    # (N,) how many it would take by the dynamic thresholds; without predictor, and in inference, the same as processed
    over_threshold: Tensor
    quantile: Tensor | None = (
        None  # (N,) k-th largest prediction, mean over this rank's pools; training with a predictor only
    )
    loss: Tensor | None = None  # the predictor's loss; training with a predictor only
    balance: Tensor | None = None  # the balance loss; training of token choice only


@dataclass(frozen=True)
class Choice:
    """Who takes whom in one forward, and what follows from it without gradient."""

    route: Route  # where the chosen rows go
    wanted: Tensor | None = None  # (N,) tokens over the dynamic thresholds; training with a predictor only
    quantile: Tensor | None = (
        None  # (N,) k-th largest prediction, mean over this rank's pools; training with a predictor only
    )
    counts: Tensor | None = None  # (pools, N) choices of each pool by expert; training of token choice only


class SavedRouting:
    """The choice of a layer's first forward. Activation recomputation hands it to the second, so that nothing is chosen
    or asked twice.
    """

    def __init__(self) -> None:
        self.choice: Choice | None = None

    def once(self, choose: Callable[[], Choice]) -> Choice:
        """The choice made before, or, the first time, a new one."""
        if self.choice is None:
            self.choice = choose()
        return self.choice


class MoELayer(nn.Module):
    """Router, experts, and what the family adds: a capacity predictor, shared experts."""

    def __init__(self, model: ModelConfig, pool: PoolConfig) -> None:
        super().__init__()
        self.router = Router(model.hidden_size, model.num_experts)
        self.predictor = (
            CapacityPredictor(model.hidden_size, model.num_experts, model.threshold_decay)
            if has_predictor(model)
            else None
        )
        self.experts = Experts(model.num_experts, model.hidden_size, granularity=model.granularity)
        self.shared = (
            FeedForward(model.hidden_size, model.shared_experts * 4 * model.hidden_size // model.granularity)
            if model.shared_experts
            else None
        )
        self.num_experts, self.granularity = model.num_experts, model.granularity
        self.top_k = model.top_k if model.family == "tc" else None
        self.capacity = pool.capacity
        span = 1 if model.family == "ec" else pool.span
        self.pools = Pools(None if span == "all" else span * num_tokens(model))
        self.rule = InferenceRule()
        self.dispatcher: Dispatch = LocalDispatch()

    def compile_parts(self) -> None:
        """Let torch.compile fuse what needs no other rank: the predictor and, on a CPU, GELU between matmuls and the
        answers' backward.
        """
        self.experts.compiled = self.dispatcher.compiled = True
        if self.predictor is not None:
            self.predictor.forward = torch.compile(self.predictor.forward)  # type: ignore[method-assign]

    def forward(self, x: Tensor, kept: SavedRouting | None = None) -> tuple[Tensor, LayerReport]:
        """Mix tokens x (B, T, D): each gets the weighted sum of the experts that took it, zero if none did, plus the
        shared ones.

        kept: an empty one keeps this forward's choice; one that holds a choice repeats it.
        """
        tokens = x.flatten(0, 1)  # (S, D)
        scores = self.router(tokens)  # (S, N)
        logits = self.predictor(tokens) if self.predictor is not None else None  # (S, N)
        choice = (kept or SavedRouting()).once(
            lambda: self._choose(scores, logits)
        )  # who takes whom; asks the other ranks what comes
        report = self._report(scores, logits, choice)  # meanwhile
        shared = self.shared(tokens) if self.shared is not None else None
        if choice.route.chunks > 1:  # the same verbs in parts, of which some travel while others compute
            mixed = overlapped(self.experts, tokens, choice.route, scores)
        else:
            rows = self.dispatcher.dispatch(tokens, choice.route)  # (R, D), grouped by local expert
            mixed = self.dispatcher.combine(self.experts(rows, choice.route.counts), choice.route, scores)  # (S, D)
        return (mixed if shared is None else mixed + shared).view_as(x), report

    def _choose(self, scores: Tensor, logits: Tensor | None) -> Choice:
        """Choose and, in training, measure what the thresholds and the balance loss need; nothing here has a
        gradient.
        """
        route = self.dispatcher.route
        if self.top_k is not None:
            assignment = choose_by_token(scores, self.top_k)
            return Choice(route(assignment), counts=choices(assignment.chosen, self.pools) if self.training else None)
        if not self.training:
            return Choice(route(self._choose_by_rule(scores, logits)))
        k = self._k(scores, self.pools, self.capacity)
        assignment, selection = choose_by_pool(scores, k, self.pools, extra=logits)
        ranks = self.pools.group.size
        chosen = route(
            replace(assignment, taken=k * (len(scores) * ranks // self.pools.size(len(scores))), ranks=ranks)
        )
        if self.predictor is None or logits is None or selection.kth_value is None:
            return Choice(chosen)
        with torch.no_grad():
            wanted = self.predictor.over_threshold(logits, InferenceRule()).sum(0)
            return Choice(chosen, wanted, quantile=torch.sigmoid(selection.kth_value).mean(0))

    def _choose_by_rule(self, scores: Tensor, logits: Tensor | None) -> Assignment:
        """At inference: tokens over the threshold (Eq. 14), as many of the call by score (Algorithm 4), or the training
        rule.
        """
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
            raise ConfigError(
                f"selection {rule} needs a capacity predictor, which this model has not; choose auto or topk"
            )
        wanted = self.predictor.over_threshold(logits, self.rule)
        return Assignment(wanted, scores) if rule == "threshold" else choose_by_pool(scores, wanted.sum(0), Pools())[0]

    def _k(self, scores: Tensor, pools: Pools, capacity: float, key: str = "pool.capacity") -> int:
        return tokens_per_expert(pools.size(len(scores)), capacity, self.num_experts, key, self.granularity)

    def _report(self, scores: Tensor, logits: Tensor | None, choice: Choice) -> LayerReport:
        processed, wanted = choice.route.processed, choice.wanted
        if self.granularity > 1:
            processed, wanted = processed / self.granularity, None if wanted is None else wanted / self.granularity
        balance = None if choice.counts is None else balance_loss(scores, choice.counts)
        if self.predictor is None or logits is None or wanted is None:
            return LayerReport(processed, len(scores), processed, balance=balance)
        return LayerReport(
            processed, len(scores), wanted, choice.quantile, self.predictor.loss(logits, choice.route.chosen)
        )
