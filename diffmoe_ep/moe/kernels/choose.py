"""The expert kernels by name, and which of them `auto` is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffmoe_ep.moe.kernels.fused import fused
from diffmoe_ep.moe.kernels.plain import HOPPER, Weights, batched, cannot_group, do_not_group, grouped, loop

Kernel = Literal["auto", "loop", "batched", "grouped", "fused"]
KERNELS: Mapping[Kernel, Callable[[Tensor, Sequence[int], Weights], Tensor]] = {
    "loop": loop,
    "batched": batched,
    "grouped": grouped,
    "fused": fused,
}


def choose_kernel(
    device: str, dtype: torch.dtype, even_counts: bool, hidden: int, width: int, capability: tuple[int, int] = HOPPER
) -> Kernel:
    """The kernel of `auto` on a type of device, in a compute type, for experts D -> F with even or ragged counts.

    CPU: `fused`, whose bits the exact runs are held to.
    GPU: `batched` for even counts; for ragged ones `grouped` in bfloat16 where torch can and the compute capability is
    Hopper's, else `fused`. Not measured yet.
    """
    if device == "cpu":
        return "fused"
    if even_counts:
        return "batched"
    if dtype == torch.bfloat16 and cannot_group(dtype, hidden, width) is None and do_not_group(capability) is None:
        return "grouped"
    return "fused"
