"""GELU in its tanh form, and its derivative, as `fused` needs them.

On a CPU in float32 or float64 it is computed as x * sigmoid(z) with z = x (SLOPE + BEND x^2), the same function: a
CPU's tanh costs four times its sigmoid. In half precision each pass would round, and a GPU has one pass of its own.
"""

from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 2 * sqrt(2 / pi)
BEND = SLOPE * 0.044715


def gelu(x: Tensor) -> Tensor:
    """GELU of x, elementwise."""
    if not _by_sigmoid(x):
        return F.gelu(x, approximate="tanh")
    return _exponent(x).sigmoid_().mul_(x)


def gelu_and_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of x, and the gradient by x from that by GELU; no graph.

    With s = sigmoid(z) the derivative is s + s (1 - s) x dz/dx.
    """
    if not _by_sigmoid(x):
        by_x = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return F.gelu(x, approximate="tanh"), by_x
    z = _exponent(x)
    s = torch.sigmoid(z)
    z.sub_(x, alpha=2 / 3 * SLOPE)  # x dz/dx = 3 z - 2 SLOPE x; here a third of it
    derivative = torch.add(s, torch.ops.aten.sigmoid_backward(z, s), alpha=3)
    return s.mul_(x), derivative.mul_(gradient)


def _exponent(x: Tensor) -> Tensor:
    return torch.addcmul(x.new_tensor(SLOPE), x, x, value=BEND).mul_(x)


def _by_sigmoid(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
