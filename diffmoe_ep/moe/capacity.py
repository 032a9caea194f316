"""How many tokens an expert gets at inference: the capacity predictor, its loss, the dynamic thresholds and the rules
that use them.

Legend: S tokens on this rank, D hidden size, N experts, P tokens in a pool.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class InferenceRule:
    """How experts choose tokens at inference."""

    selection: Literal["auto", "threshold", "count", "topk"] = (
        "auto"  # Eq. 14 or else topk; Eq. 14; Algorithm 4; the training rule
    )
    threshold: float | Literal["dynamic", "raw"] = "dynamic"  # moving average (bias-corrected or raw), or one constant
    capacity: float = 1.0  # capacity factor of `topk`


class CapacityPredictor(nn.Module):
    """Predicts from a token which experts would take it (Eq. 10), and keeps the threshold of each expert (Eq. 17)."""

    threshold: Tensor
    updates: Tensor

    def __init__(self, hidden: int, num_experts: int, decay: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc2 = nn.Linear(hidden, num_experts)
        self.decay = decay
        self.register_buffer("threshold", torch.empty(num_experts))  # (N,) moving average tau, starts at 0
        self.register_buffer("updates", torch.empty((), dtype=torch.int64))  # how often it was moved
        self.reset()

    def reset(self) -> None:
        """Let the thresholds start anew."""
        self.threshold.zero_()
        self.updates.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (S, D), detached here so that the predictor cannot steer the network, to logits (S, N) in at least
        float32.
        """
        logits = self.fc2(F.silu(self.fc1(tokens.detach())))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Binary cross-entropy against the choice that was made (Eq. 11), mean over tokens and experts."""
        return F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype))

    def threshold_for(self, rule: InferenceRule) -> Tensor:
        """The threshold tau (N,) that a rule compares with. The moving average starts at 0, so `dynamic` divides by 1 -
        decay^updates.
        """
        if not isinstance(rule.threshold, str):
            return torch.full_like(self.threshold, rule.threshold)
        if rule.threshold == "raw":
            return self.threshold
        return self.threshold / (1 - self.decay ** self.updates.clamp(min=1))

    def over_threshold(self, logits: Tensor, rule: InferenceRule) -> Tensor:
        """Which tokens are strictly over the experts' thresholds (Eq. 14): (S, N) bool."""
        return torch.sigmoid(logits) > self.threshold_for(rule)

    def update(self, quantile: Tensor) -> None:
        """Move the thresholds towards the k-th largest prediction of a step (N,) (Eq. 17); once per optimiser step."""
        self.threshold.lerp_(quantile.to(self.threshold.dtype), 1 - self.decay)
        self.updates.add_(1)
