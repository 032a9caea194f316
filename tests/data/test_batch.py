"""A batch moves between devices and knows its length."""

import torch

from diffmoe_ep.data.batch import Batch


def test_batch_moves_and_counts() -> None:
    batch = Batch(
        torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.tensor([1, 2]), torch.tensor([8, 9])
    )
    moved = batch.to("meta", non_blocking=True)
    assert len(batch) == len(moved) == 2
    assert {getattr(moved, name).device.type for name in ("latent", "noise", "u", "condition", "position")} == {"meta"}
