"""Matmuls of float32 on a CPU by oneDNN, where it is quicker than torch's own choice: that is MKL, which has no AVX-512
on all processors.

On an AMD EPYC a product with a weight takes 0.9 of MKL's time with many rows, 0.8 to 0.9 with 16 to 64. torch reaches
oneDNN in float32 by the operator behind compiled linear layers alone, which gives a new tensor.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

KNOWN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes(x: Tensor) -> bool:
    """Whether `linear` is the way to multiply rows like these."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _at_hand()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (n, I) times weight (I, O) of any strides, plus bias (O,): (n, O), copied to `out` if that is given. No
    gradient.

    Of stacked ones, (E, n, I), (E, I, O), (E, O), each by itself: (E, n, O).
    """
    if x.dim() == 3:
        biases = [None] * len(x) if bias is None else bias.unbind()
        return torch.stack([linear(*each) for each in zip(x.unbind(), weight.unbind(), biases, strict=True)], out=out)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")
    return found if out is None else out.copy_(found)


@cache
def _at_hand() -> bool:
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and KNOWN


def _flops(x: Sequence[int], weight: Sequence[int], *_others: Any, **_options: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


if KNOWN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(
        _flops
    )  # which torch's counter of FLOPs has not of itself
