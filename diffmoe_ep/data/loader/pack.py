"""Batches on their way from a worker process: all tensors in one block of memory, so that one handle is passed on
instead of one for each.

Whoever receives a tensor asks the sender for its memory, and waits until that process has time to answer: on a busy
host milliseconds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.condition import CaptionFeatures

ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Packed:
    """A Batch whose tensors lie in one block."""

    block: Tensor  # (bytes,) uint8
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]  # of each tensor: its first byte, type, shape
    captions: tuple[str, ...]


def pack(batch: Batch) -> Packed:
    """Copy a batch into one block, of memory that processes share: so it is copied once, as it would be without."""
    tensors = {"latent": batch.latent, "noise": batch.noise, "u": batch.u, "position": batch.position}
    condition = batch.condition
    tensors |= (
        {"features": condition.features, "lengths": condition.lengths}
        if isinstance(condition, CaptionFeatures)
        else {"labels": condition}
    )
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = (end, tensor.dtype, tuple(tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    memory = torch.UntypedStorage._new_shared(end)  # as torch's own collate does
    packed = Packed(torch.empty(0, dtype=torch.uint8).set_(memory), places, batch.captions)
    for name, tensor in tensors.items():
        _part(packed, name).copy_(tensor)
    return packed


def unpack(packed: Packed) -> Batch:
    """The batch, whose tensors are parts of the block."""
    found = {name: _part(packed, name) for name in packed.places}
    condition = found["labels"] if "labels" in found else CaptionFeatures(found["features"], found["lengths"])
    return Batch(found["latent"], found["noise"], found["u"], condition, found["position"], packed.captions)


def _part(packed: Packed, name: str) -> Tensor:
    first, dtype, shape = packed.places[name]
    return packed.block[first : first + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
