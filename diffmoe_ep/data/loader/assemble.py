"""Stored samples and the draws of their positions, made into the Batch that training receives."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from diffmoe_ep.data.captions import CaptionSpec, collate
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.data.loader.draw import AT_ONCE, Draws, Latents
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.sample import Batch, Caption

# What was read of a stored sample: its dataset's manifest; (C, H, W) pixels or (flips, 2C, H, W) moments; its label, or
# the one of its captions that is taken.
Stored = tuple[Manifest, np.ndarray, int | Caption]


class Assembler:
    """Batches from stored samples: every draw has a stream of its own, keyed by seed and position, so none shifts
    another.
    """

    def __init__(self, seed: int, drop_condition: float, flip: bool, text: CaptionSpec | None) -> None:
        """drop_condition: how often a condition is replaced by the null condition; flip: mirror every second sample,
        about.
        """
        self.text = text
        self._drop_condition = drop_condition
        self._flip = flip
        self._draws = Draws(seed)
        self._latents: dict[int, tuple[Manifest, Latents]] = {}  # of each dataset, by the identity of its manifest

    def pick(self, position: int) -> float:
        """From 0 to 1, which of its captions a position takes."""
        return self._draws.at(position, "caption").random()

    def draw(
        self,
        positions: range,
        kind: Literal["pixels", "moments"],
        noise: np.ndarray,
        posterior: np.ndarray,
        u: np.ndarray,
    ) -> tuple[list[bool], list[bool]]:
        """Draw noise and posterior (B, C, H, W) standard normal, the latter for moments only, and u (B,) in [0, 1), of
        these positions.

        Gives whether each is mirrored, and whether its condition is dropped.
        """
        at, flipped, dropped = self._draws.at, [], []
        for row, position in enumerate(positions):
            at(position, "noise").standard_normal(out=noise[row], dtype=np.float32)
            if kind == "moments":
                at(position, "posterior").standard_normal(out=posterior[row], dtype=np.float32)
            u[row] = at(position, "time").random(dtype=np.float32)
            flipped.append(self._flip and at(position, "flip").random() < 0.5)
            dropped.append(self._drop_condition > 0 and at(position, "drop").random() < self._drop_condition)
        return flipped, dropped

    def batch(
        self, positions: range, facts: Manifest, stored: Callable[[int], Stored], other: Callable[[int], Stored] | None = None,
        at_once: Callable[[int, Sequence[bool], np.ndarray], Sequence[int]] | None = None,
    ) -> Batch:  # fmt: skip
        """The Batch of these positions, of samples like `facts`, from the stored samples of the rows, asked for in
        their order.

        A stored array is done with before the next is asked for. other: the sample to take for a row whose values are
        not finite.
        at_once: of rows from this one on, mirrored or not, makes the latents in the place of the draws and gives the
        labels; -1 for those that `stored` has to look at, whose draws it leaves. These are moments with labels.
        """
        shape = (len(positions), *facts.shape)
        noise, latent, u = (
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(len(positions), np.float32),
        )
        conditions: list[int | Caption] = []
        dropped: list[bool] = []
        last, latents = facts, self._of(facts)
        for _, each in self._latents.values():
            each.clear()
        for first in range(0, len(positions), AT_ONCE):
            few = slice(first, first + AT_ONCE)
            flips, drops = self.draw(positions[few], facts.kind, noise[few], latent[few], u[few])
            labels = [-1] * len(flips) if at_once is None else at_once(first, flips, latent[few])
            for row, flipped, label in zip(range(first, first + len(flips)), flips, labels, strict=True):
                if label >= 0:
                    conditions.append(label)
                    continue
                manifest, array, held = stored(row)
                if manifest is not last:
                    last, latents = manifest, self._of(manifest)
                latents.put(row, array, flipped)
                conditions.append(held)
            bad = self._fill(latent)
            for row in bad:
                assert other is not None, "the values of these samples were looked at"
                manifest, array, conditions[row] = other(row)
                self._draws.at(positions[row], "posterior").standard_normal(out=latent[row], dtype=np.float32)
                self._of(manifest).put(row, array, flips[row - first])
            assert not bad or not self._fill(latent), "other samples are looked at before they are taken"
            dropped += drops
        condition, captions = self._condition(conditions, dropped, facts.num_classes)
        position = torch.arange(positions.start, positions.stop)
        return Batch(
            torch.from_numpy(latent), torch.from_numpy(noise), torch.from_numpy(u), condition, position, captions
        )

    def _fill(self, latent: np.ndarray) -> list[int]:
        """Make the latents of what was put; the rows that are not finite, ascending."""
        return sorted(row for _, latents in self._latents.values() for row in latents.fill(latent))

    def _of(self, manifest: Manifest) -> Latents:
        """Where the samples of this dataset go."""
        found = self._latents.get(id(manifest))
        if found is None:
            found = self._latents[id(manifest)] = (manifest, Latents(manifest))
        return found[1]

    def _condition(
        self, conditions: Sequence[int | Caption], dropped: Sequence[bool], num_classes: int
    ) -> tuple[torch.Tensor | CaptionFeatures, tuple[str, ...]]:
        if self.text is not None:
            return collate([caption for caption in conditions if isinstance(caption, Caption)], dropped, self.text)
        labels = [num_classes if drop else label for label, drop in zip(conditions, dropped, strict=True)]
        return torch.from_numpy(np.array(labels, dtype=np.int64)), ()  # three times as fast as torch.tensor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latents": {}}
