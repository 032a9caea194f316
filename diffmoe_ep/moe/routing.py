"""Who takes whom, and with what weight: from scores to an Assignment.

Legend: S tokens on this rank, N experts, R chosen (token, expert) pairs of this rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.moe.pool import Pools, Selection, select


@dataclass(frozen=True)
class Assignment:
    """Which expert takes which of this rank's tokens, and the weight of its answer."""

    chosen: Tensor  # (S, N) bool
    weight: Tensor  # (S, N) at least float32; carries the gradient to the router; only chosen entries are used


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


def choose_by_pool(scores: Tensor, k: int | Tensor, pools: Pools, also: Tensor | None = None) -> tuple[Assignment, Selection]:
    """Let every expert take the k tokens of a pool with its largest scores (Eq. 6); a pool of one sample is expert choice."""
    selection = select(scores, k, pools, also)
    return Assignment(selection.chosen, scores), selection
