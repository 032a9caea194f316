"""What one layer reports of one forward.

Legend: S tokens on this rank, N experts, C capacity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.dispatch import handle_of
from diffmoe_ep.moe.routing import Routing, balance_loss


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in one forward, for the losses, the thresholds and the logs; no gradient but in `loss` and
    `balance`.

    Routed tokens are counted in experts as wide as a dense FFN: at granularity m one weighs 1/m, so that
    C = N * processed / S is compute.
    """

    processed: Tensor  # (N,) how many of this rank's tokens each expert took
    num_tokens: int  # this rank's tokens S
    over_threshold: Tensor  # (N,) how many were over the dynamic thresholds; inference, or no predictor: as processed
    quantile: Tensor | None = None  # (N,) k-th largest prediction, mean over this rank's pools; training, predictor
    loss: Tensor | None = None  # the predictor's loss; training with a predictor only
    balance: Tensor | None = None  # the balance loss; training of token choice only


def report_layer(
    scores: Tensor, logits: Tensor | None, routing: Routing, predictor: CapacityPredictor | None, granularity: int
) -> LayerReport:
    """Report a routing by scores (S, N) and the predictor's logits (S, N); nothing here waits for another rank."""
    processed = _by_width(handle_of(routing).processed, granularity)
    if routing.pool_choices is not None:
        return LayerReport(processed, scores.shape[0], processed, balance=balance_loss(scores, routing.pool_choices))
    if predictor is None or logits is None or routing.kth_logit is None:
        return LayerReport(processed, scores.shape[0], processed)
    over_threshold = predictor.over_threshold(logits.detach(), InferenceRule()).sum(0)
    return LayerReport(
        processed, scores.shape[0], _by_width(over_threshold, granularity),
        quantile=torch.sigmoid(routing.kth_logit).mean(0), loss=predictor.loss(logits, routing.chosen),
    )  # fmt: skip


def _by_width(counts: Tensor, granularity: int) -> Tensor:
    return counts if granularity == 1 else counts / granularity
