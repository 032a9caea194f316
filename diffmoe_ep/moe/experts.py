"""The experts of one layer: N feed-forward networks in stacked tensors, computed on rows that are grouped by expert.

Legend: N experts (E of them on this rank), B samples, T tokens, D hidden size, F = 4D/m an expert's width at
granularity m, R routed tokens at these experts, one row each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ep.moe.kernels.choose import KERNELS, Kernel, choose_kernel
from diffmoe_ep.moe.kernels.plain import HOPPER, compute_type, even


class Experts(nn.Module):
    """Stacked FFNs: Linear(D, F), GELU (tanh form), Linear(F, D), both with bias.

    Weights are stored (N, in, out): that is what the batched matmul reads without a transposed copy. A rank of an
    expert group holds a slice of dimension 0, of which `first` is the first expert's global number.
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
        """Apply expert e to its counts[e] rows of rows (R, D), which are grouped by expert: (R, D).

        counts (E,) may be ragged and zero.
        """
        kernel = self.kernel
        if kernel == "auto":
            _, hidden, width = self.fc1_weight.shape
            capability = torch.cuda.get_device_capability(rows.device) if rows.is_cuda else HOPPER
            kernel = choose_kernel(rows.device.type, compute_type(rows), even(counts), hidden, width, capability)
        return KERNELS[kernel](rows, counts, (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias))


class FeedForward(nn.Module):
    """One FFN for all tokens, of a dense block (F = 4D) or for the shared experts: Linear(D, F), GELU (tanh form),
    Linear(F, D).
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, width)
        self.fc2 = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
