"""The experts of one layer: N feed-forward networks in stacked tensors, computed on rows that are grouped by expert.

Legend: N experts (E of them on this rank), D hidden size, F = 4D/m their width at granularity m, R rows.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ep.moe.kernels.fused import fused
from diffmoe_ep.moe.kernels.plain import batched, cannot_group, compute_type, even, grouped, loop

Kernel = Literal["auto", "loop", "batched", "grouped", "fused"]
KERNELS = {"loop": loop, "batched": batched, "grouped": grouped}


class Experts(nn.Module):
    """Stacked FFNs: Linear(D, 4D), GELU (tanh form), Linear(4D, D), both with bias.

    Weights are stored (N, in, out): that is what the batched matmul reads without a transposed copy. A rank of an
    expert group holds a slice of dimension 0, of which `first` is the first expert's global number.
    """

    def __init__(self, num_experts: int, hidden: int, kernel: Kernel = "auto", granularity: int = 1) -> None:
        super().__init__()
        width = 4 * hidden // granularity
        self.kernel: Kernel = kernel
        self.compiled = False  # whether `fused` may use torch.compile
        self.first = 0
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, width))  # (N, D, F)
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, width))  # (N, F)
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, hidden))  # (N, F, D)
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, hidden))  # (N, D)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its counts[e] rows of rows (R, D), which are grouped by expert; counts may be ragged and
        zero.
        """
        kernel = self.kernel
        if kernel == "auto":
            _, hidden, width = self.fc1_weight.shape
            kernel = choose_kernel(rows.device.type, compute_type(rows), even(counts), hidden, width)
        weights = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return (
            fused(rows, counts, weights, self.compiled) if kernel == "fused" else KERNELS[kernel](rows, counts, weights)
        )


def choose_kernel(device: str, kind: torch.dtype, even_counts: bool, hidden: int, width: int) -> Kernel:
    """The kernel of `auto` on a type of device, in a compute type, for experts of D -> F with even or ragged counts.

    CPU: `fused`; `diffmoe bench layer` measures it against the matmuls alone.
    GPU: `batched` for even counts; for ragged ones `grouped` in bfloat16 where torch can, else `fused`. Not measured
    yet.
    """
    if device == "cpu":
        return "fused"
    if even_counts:
        return "batched"
    return "grouped" if kind == torch.bfloat16 and cannot_group(kind, hidden, width) is None else "fused"


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
