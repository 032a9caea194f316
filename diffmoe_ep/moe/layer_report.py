"""What one layer reports of one forward.

Legend: S tokens on this rank, N experts, C capacity.
"""

from dataclasses import dataclass

from torch import Tensor

from diffmoe_ep.moe.capacity import CapacityPredictor
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
    processed, over_threshold = handle_of(routing).processed, routing.over_threshold
    if granularity > 1:
        processed = processed / granularity
        over_threshold = None if over_threshold is None else over_threshold / granularity
    loss = None
    if predictor is not None and logits is not None and routing.quantile is not None:
        loss = predictor.loss(logits, routing.chosen)
    balance = None if routing.pool_choices is None else balance_loss(scores, routing.pool_choices)
    if over_threshold is None:
        over_threshold = processed
    return LayerReport(processed, scores.shape[0], over_threshold, routing.quantile, loss, balance)
