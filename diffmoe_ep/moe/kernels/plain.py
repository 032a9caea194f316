"""Ways to apply N stacked feed-forward networks to rows that are grouped by expert; `loop` is the reference, all others
return its numbers.

Legend: N experts, D hidden size, F width of an expert, R rows.

Each takes rows (R, D), counts (rows of each expert, on the host) and the weights fc1 (N, D, F), bias (N, F), fc2 (N, F,
D), bias (N, D).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.nn.utils.rnn import pad_sequence

from diffmoe_ep.config import ConfigError

HOPPER = (9, 0)  # the compute capability that torch's grouped matmul is right and quick on
Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # (N, D, F), (N, F), (N, F, D), (N, D)


def loop(rows: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
    """One expert after the other. `unbind` has one backward for all; slices W[e] would each fill a whole gradient."""
    parts = [
        torch.addmm(b2, F.gelu(torch.addmm(b1, part, w1), approximate="tanh"), w2)
        for part, w1, b1, w2, b2 in zip(rows.split(list(counts)), *(weight.unbind() for weight in weights), strict=True)
    ]
    return torch.cat(parts)


def batched(rows: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
    """One batched matmul for all experts; where they have unequal numbers of rows, all are padded to the most."""
    w1, b1, w2, b2 = weights
    if even(counts):
        stacked = rows.view(len(counts), counts[0], rows.shape[1])  # (N, n, D)
    else:
        stacked = pad_sequence(rows.split(list(counts)), batch_first=True)
    hidden = F.gelu(torch.baddbmm(b1[:, None], stacked, w1), approximate="tanh")
    out = torch.baddbmm(b2[:, None], hidden, w2)
    if even(counts):
        return out.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(out.unbind(), counts, strict=True)])


def grouped(rows: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
    """One grouped matmul for all experts, however ragged."""
    dtype = compute_type(rows)
    reason = cannot_group(dtype, rows.shape[1], weights[0].shape[2]) or groups_wrongly(rows.device)
    if reason:
        raise ConfigError(f"compute.kernel grouped: {reason}; set compute.kernel=auto")
    w1, b1, w2, b2 = (weight.to(dtype) for weight in weights)  # autocast does not know this matmul
    rows = rows.to(dtype)
    numbers = torch.tensor(counts, dtype=torch.int32, pin_memory=rows.is_cuda).to(rows.device, non_blocking=True)
    ends = numbers.cumsum(0, dtype=torch.int32)
    # Which expert each row belongs to, as a 0/1 matrix: biases by a matmul, so that their gradients are summed in a
    # fixed order.
    mine = torch.arange(len(counts), device=rows.device).repeat_interleave(numbers, output_size=rows.shape[0])
    member = F.one_hot(mine, len(counts)).to(dtype)  # (R, N)
    with torch.autocast(rows.device.type, enabled=False):
        hidden = F.gelu(_contiguous_gradient(grouped_mm(rows, w1, offs=ends)) + member @ b1, approximate="tanh")
        return _contiguous_gradient(grouped_mm(hidden, w2, offs=ends)) + member @ b2


def cannot_group(dtype: torch.dtype, hidden: int, width: int) -> str | None:
    """Why torch's grouped matmul cannot run in this type at these sizes; None when it can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        return f"torch's grouped matmul computes in bfloat16, float16 and float32, not in {name}"
    if hidden * dtype.itemsize % 16 or width * dtype.itemsize % 16:
        sizes = f"rows of {hidden} and {width} numbers of {dtype.itemsize} bytes"
        return f"torch's grouped matmul reads 16 bytes at a time, and {sizes} do not fit"
    return None


def groups_wrongly(device: torch.device) -> str | None:
    """Why torch's grouped matmul must not run on a device; None where it may, if slowly."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER
    return do_not_group(capability) if capability > HOPPER else None


def do_not_group(capability: tuple[int, int]) -> str | None:
    """Why torch's grouped matmul had better not run on a GPU of this compute capability; None on Hopper."""
    if capability == HOPPER:
        return None
    why = (
        "computes one expert after the other and waits for their numbers of rows before 9.0 (Hopper)"
        if capability < HOPPER
        else "may give experts without rows wrong gradients after 9.0 (Hopper; PyTorch's issue 172439)"
    )
    return f"torch's grouped matmul {why}, and this GPU's compute capability is {capability[0]}.{capability[1]}"


def even(counts: Sequence[int]) -> bool:
    """Whether every expert has equally many rows, as in training over one expert group."""
    return len(set(counts)) == 1


def compute_type(rows: Tensor) -> torch.dtype:
    """The type that matmuls of these rows compute in: autocast's where it is on."""
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        return torch.get_autocast_dtype(rows.device.type)
    return rows.dtype


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0].contiguous()


def _contiguous_gradient(x: Tensor) -> Tensor:
    """Hand on x; the gradient that comes back is made contiguous, which grouped_mm's backward insists on."""
    out: Tensor = _ContiguousGradient.apply(x)
    return out
