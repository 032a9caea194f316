"""Stored samples and the draws of their positions, made into the Batch that training receives."""

from collections.abc import Sequence

import numpy as np
import torch

from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.captions import CaptionSpec, collate
from diffmoe_ep.data.codec import Caption
from diffmoe_ep.data.condition import Condition
from diffmoe_ep.data.latent import final_latent
from diffmoe_ep.data.loader.draw import Draws
from diffmoe_ep.data.loader.reader import RawSample


def assemble(
    positions: range, stored: Sequence[RawSample], draws: Draws, num_classes: int, text: CaptionSpec | None
) -> Batch:
    """The Batch of these positions; text: what the model wants of captions, None where conditions are labels."""
    latent = np.empty_like(draws.noise)
    for row, sample in enumerate(stored):
        posterior = None if draws.posterior is None else draws.posterior[row]
        latent[row] = final_latent(sample.values, sample.manifest, posterior)
    condition: Condition
    captions: tuple[str, ...] = ()
    if text is None:
        labels = [num_classes if drop else sample.condition for sample, drop in zip(stored, draws.drop, strict=True)]
        condition = torch.from_numpy(np.array(labels, dtype=np.int64))
    else:
        chosen = [sample.condition for sample in stored if isinstance(sample.condition, Caption)]
        condition, captions = collate(chosen, draws.drop, text)
    position = torch.arange(positions.start, positions.stop)
    noise, u = torch.from_numpy(draws.noise), torch.from_numpy(draws.u)
    return Batch(torch.from_numpy(latent), noise, u, condition, position, captions)
