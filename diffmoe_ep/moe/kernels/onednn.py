"""Matmuls of float32 on a CPU by oneDNN, where it is quicker than torch's own choice: that is MKL, which has no AVX-512
on all processors.

Legend: E experts, n rows of one expert, I and O widths of its input and output.

On an AMD EPYC a product with a weight takes 0.9 of MKL's time with many rows, 0.8 to 0.9 with 16 to 64. torch reaches
oneDNN in float32 by the operator behind compiled linear layers alone, which returns a new tensor.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def supports(x: Tensor) -> bool:
    """Whether `linear` is the way to multiply rows like these."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (n, I) times weight (I, O) of any strides, plus bias (O,): (n, O), copied to `out` if that is given. No
    gradient.

    Stacked ones, (E, n, I), (E, I, O), (E, O), are multiplied one by one: (E, n, O).
    """
    if x.dim() == 3:
        biases = [None] * x.shape[0] if bias is None else bias.unbind()
        return torch.stack([linear(*each) for each in zip(x.unbind(), weight.unbind(), biases, strict=True)], out=out)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")
    return product if out is None else out.copy_(product)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """What torch's counter of FLOPs does not know of itself: `FlopCounterMode(custom_mapping=flop_formulas())`."""
    return {torch.ops.mkldnn._linear_pointwise: _flops} if _has_operator() else {}


def _flops(x: Sequence[int], weight: Sequence[int], *_others: Any, **_options: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _has_operator() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _available() -> bool:
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and _has_operator()
