"""What each expert kernel keeps for the backward: the planner asks here."""

import torch

from diffmoe_ep.moe.kernels.fused import keeps_all


def saved_elements(kernel: str, rows: int, width: int, experts: int, device: str, dtype: torch.dtype) -> int:
    """Elements of the compute type that a kernel keeps between its two matmuls, for `rows` rows of `experts` experts.

    All keep (R, F) before and after GELU, but for `fused`, which computes the second again where it is not small;
    `grouped` also keeps which expert each row is of, (R, E).
    """
    if kernel == "fused" and not keeps_all(rows, width, device, dtype):
        return rows * width
    return 2 * rows * width + (rows * experts if kernel == "grouped" else 0)


def keeps_cast_weights(kernel: str) -> bool:
    """Whether the backward finds the weights' copies in the compute type; `fused` casts them again."""
    return kernel != "fused"
