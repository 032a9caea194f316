"""Stored samples and the draws of their positions, made into the Batch that training receives."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffmoe_ep.data.captions import TextFields, collate
from diffmoe_ep.data.condition import Text
from diffmoe_ep.data.draw import Draws, Latents
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.sample import Batch, Caption


class Stored(NamedTuple):
    """What was read of a stored sample."""

    manifest: Manifest  # of its dataset
    array: np.ndarray  # (C, H, W) pixels or (flips, 2C, H, W) moments
    condition: int | Caption  # its label, or the one of its captions that is taken


class Drawn(NamedTuple):
    """All random numbers of a batch."""

    noise: np.ndarray  # (B, C, H, W) float32, standard normal
    posterior: np.ndarray  # (B, C, H, W) float32, standard normal where moments are stored, else anything
    u: np.ndarray  # (B,) float32 in [0, 1)
    flipped: list[bool]  # whether each sample is mirrored
    dropped: list[bool]  # whether its condition is replaced by the null condition


class Assembler:
    """Batches from stored samples: every draw has a stream of its own, keyed by seed and position, so none shifts another."""

    def __init__(self, seed: int, drop_condition: float, flip: bool, text: TextFields | None) -> None:
        """drop_condition: how often a condition is replaced by the null condition; flip: mirror every second sample, about."""
        self.text = text
        self._drop_condition = drop_condition
        self._flip = flip
        self._draws = Draws(seed)
        self._latents = Latents()

    def pick(self, position: int) -> float:
        """From 0 to 1, which of its captions a position takes."""
        return self._draws.at(position, "caption").random()

    def draw(self, positions: range, manifest: Manifest) -> Drawn:
        """The random numbers of these positions, for samples of this kind."""
        shape, at = (len(positions), *manifest.shape), self._draws.at
        noise, posterior = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
        drawn = Drawn(noise, posterior, np.empty(len(positions), dtype=np.float32), [], [])
        for row, position in enumerate(positions):
            at(position, "noise").standard_normal(out=noise[row], dtype=np.float32)
            if manifest.kind == "moments":
                at(position, "posterior").standard_normal(out=posterior[row], dtype=np.float32)
            drawn.u[row] = at(position, "time").random(dtype=np.float32)
            drawn.flipped.append(self._flip and at(position, "flip").random() < 0.5)
            drawn.dropped.append(self._drop_condition > 0 and at(position, "drop").random() < self._drop_condition)
        return drawn

    def batch(self, positions: range, stored: Sequence[Stored]) -> Batch:
        """The Batch of these positions."""
        drawn = self.draw(positions, stored[0].manifest)
        self._fill(drawn.posterior, stored, drawn.flipped)
        condition, captions = self._condition(stored, drawn.dropped)
        return Batch(
            latent=torch.from_numpy(drawn.posterior),
            noise=torch.from_numpy(drawn.noise),
            u=torch.from_numpy(drawn.u),
            condition=condition,
            position=torch.arange(positions.start, positions.stop),
            captions=captions,
        )

    def _fill(self, values: np.ndarray, stored: Sequence[Stored], flipped: Sequence[bool]) -> None:
        """Make the final latents in `values`, (B, C, H, W), those of each dataset together."""
        manifests = {id(each.manifest): each.manifest for each in stored}
        if len(manifests) == 1:
            self._latents.fill(values, [each.array for each in stored], stored[0].manifest, flipped)
            return
        for name, manifest in manifests.items():
            rows = [row for row, each in enumerate(stored) if id(each.manifest) == name]
            few = values[rows]
            self._latents.fill(few, [stored[row].array for row in rows], manifest, [flipped[row] for row in rows])
            values[rows] = few

    def _condition(self, stored: Sequence[Stored], dropped: Sequence[bool]) -> tuple[torch.Tensor | Text, tuple[str, ...]]:
        if self.text is not None:
            return collate([each.condition for each in stored if isinstance(each.condition, Caption)], dropped, self.text)
        labels = [each.manifest.num_classes if drop else each.condition for each, drop in zip(stored, dropped, strict=True)]
        return torch.tensor(labels, dtype=torch.int64), ()
