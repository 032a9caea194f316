"""Batches arrive as they were sent: every tensor's bits, types and shapes, in one block of memory."""

import pytest
import torch
from torch import Tensor

from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.data.loader.pack import ALIGNMENT, pack, unpack


def tensors(batch: Batch) -> list[Tensor]:
    condition = batch.condition
    parts = [condition.features, condition.lengths] if isinstance(condition, CaptionFeatures) else [condition]
    return [batch.latent, batch.noise, batch.u, batch.position, *parts]


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("kind", ["labels", "float16", "float32", "bfloat16"])
def test_what_arrives_is_what_was_sent(kind: str, size: int) -> None:
    condition: Tensor | CaptionFeatures = torch.arange(size)
    if kind != "labels":
        condition = CaptionFeatures(torch.randn(size, 5, 7).to(getattr(torch, kind)), torch.arange(size))
    shape = (size, 3, 5, 5)  # no multiple of the alignment
    latent = torch.randn(shape)
    latent[:, 0, 0, 0] = float("nan")
    batch = Batch(
        latent, torch.randn(shape), torch.rand(size), condition, torch.arange(2**40, 2**40 + size), ("words",) * size
    )
    packed = pack(batch)
    found = unpack(packed)
    assert found.captions == batch.captions
    for one, other in zip(tensors(found), tensors(batch), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        assert one.untyped_storage().data_ptr() == packed.block.untyped_storage().data_ptr()
    assert all(first % ALIGNMENT == 0 for first, _, _ in packed.places.values())
