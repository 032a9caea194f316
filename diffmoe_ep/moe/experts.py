"""The experts of one layer: N feed-forward networks in stacked tensors, computed on rows that are grouped by expert.

Legend: N experts (E of them on this rank), D hidden size, F = 4D/m their width at granularity m, R rows.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = Literal["auto", "loop"]


class Experts(nn.Module):
    """Stacked FFNs: Linear(D, 4D), GELU (tanh form), Linear(4D, D), both with bias.

    Weights are stored (N, in, out): that is what the batched matmul reads without a transposed copy. A rank of an expert group holds a
    slice of dimension 0, of which `first` is the first expert's global number.
    """

    def __init__(self, num_experts: int, hidden: int, kernel: Kernel = "auto", granularity: int = 1) -> None:
        super().__init__()
        width = 4 * hidden // granularity
        self.kernel: Kernel = kernel
        self.first = 0
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, width))  # (N, D, F)
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, width))  # (N, F)
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, hidden))  # (N, F, D)
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, hidden))  # (N, D)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its counts[e] rows of rows (R, D), which are grouped by expert; counts may be ragged and zero."""
        even = len(set(counts)) == 1  # as in training, where every expert takes k tokens
        return self._batched(rows, counts) if even and self.kernel == "auto" else self._loop(rows, counts)

    def _loop(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The reference: one expert after the other. `unbind` has one backward for all; slices W[e] would each fill a whole gradient."""
        weights = zip(self.fc1_weight.unbind(), self.fc1_bias.unbind(), self.fc2_weight.unbind(), self.fc2_bias.unbind(), strict=True)
        parts = [
            torch.addmm(b2, F.gelu(torch.addmm(b1, part, w1), approximate="tanh"), w2)
            for part, (w1, b1, w2, b2) in zip(rows.split(list(counts)), weights, strict=True)
        ]
        return torch.cat(parts)

    def _batched(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """One batched matmul for all experts, when each has equally many rows."""
        stacked = rows.view(len(counts), counts[0], rows.shape[1])  # (E, R/E, D)
        hidden = F.gelu(torch.baddbmm(self.fc1_bias[:, None], stacked, self.fc1_weight), approximate="tanh")
        return torch.baddbmm(self.fc2_bias[:, None], hidden, self.fc2_weight).flatten(0, 1)


class FeedForward(nn.Module):
    """One FFN for all tokens, of a dense block (F = 4D) or for the shared experts: Linear(D, F), GELU (tanh form), Linear(F, D)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, width)
        self.fc2 = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
