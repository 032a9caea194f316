"""The hot path of the loader: the draws of a position and the final latents of a batch, as `keyed` and `final_latent` give them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, Philox

from diffmoe_ep.data.keyed import PURPOSES
from diffmoe_ep.data.manifest import Manifest


class Draws:
    """The generators of `keyed`, one at a time: making one costs ten times as much as setting the state of one that is there."""

    def __init__(self, seed: int) -> None:
        self._philox = Philox(0)
        self._generator = Generator(self._philox)
        self._key = np.array([seed, 0], dtype=np.uint64)
        self._counter = np.zeros(4, dtype=np.uint64)
        self._state: Any = {
            "bit_generator": "Philox", "state": {"counter": self._counter, "key": self._key}, "buffer": np.zeros(4, dtype=np.uint64),
            "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
        }  # fmt: skip

    def at(self, position: int, purpose: str) -> Generator:
        """The generator `keyed(seed, position, purpose)`; the one given before is void."""
        self._key[1] = position
        self._counter[3] = PURPOSES[purpose]
        self._philox.state = self._state
        return self._generator


def final_latents(
    arrays: Sequence[np.ndarray], manifest: Manifest, flipped: Sequence[bool], positions: Sequence[int], draws: Draws
) -> np.ndarray:
    """`final_latent` of samples of one dataset, (B, C, H, W) float32; equal to the bit, and converted once for all."""
    if manifest.kind == "pixels":
        values = _float32(np.stack([array[:, :, ::-1] if mirrored else array for array, mirrored in zip(arrays, flipped, strict=True)]))
    else:
        stored = _float32(np.stack([array[int(mirrored)] for array, mirrored in zip(arrays, flipped, strict=True)]))  # (B, 2C, H, W)
        mean, log_variance = np.split(stored, 2, axis=1)  # (B, C, H, W) each
        deviation = np.multiply(np.clip(log_variance, -30.0, 20.0), np.float32(0.5))
        values = np.empty_like(deviation)
        for row, position in enumerate(positions):
            np.exp(deviation[row], out=deviation[row])  # sample by sample: its bits must not depend on the size of the batch
            draws.at(position, "posterior").standard_normal(out=values[row], dtype=np.float32)
        values *= deviation
        values += mean
    values *= np.float32(manifest.scale)
    values += np.float32(manifest.shift)
    return values


def _float32(stored: np.ndarray) -> np.ndarray:
    """As float32, a new array; float16 by torch, which is twenty times as fast as NumPy."""
    return torch.from_numpy(stored).float().numpy() if stored.dtype == np.float16 else stored.astype(np.float32)
