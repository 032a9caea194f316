"""The hot path of the loader: the draws of a position and the final latents of a batch, as `keyed` and `final_latent` give them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, Philox

from diffmoe_ep.data.keyed import PURPOSES
from diffmoe_ep.data.manifest import Manifest

AT_ONCE = 16  # samples whose latents are made together


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


class Latents:
    """Final latents of stored samples: `final_latent` of each, equal to the bit.

    A few samples are worked on at a time, in memory that is used again, so that what is between the stored and the final values stays
    in the processor's cache and no page of it is asked of the system anew.
    """

    def __init__(self) -> None:
        self._scratch: dict[Any, np.ndarray] = {}

    def fill(self, values: np.ndarray, arrays: Sequence[np.ndarray], manifest: Manifest, flipped: Sequence[bool]) -> None:
        """Make final latents of samples of one dataset, each mirrored or not, in `values` (B, C, H, W) float32.

        Of moments, `values` holds the standard normal numbers that their posteriors are sampled with.
        """
        scale, shift = np.float32(manifest.scale), np.float32(manifest.shift)
        for first in range(0, len(arrays), AT_ONCE):
            chunk = slice(first, first + AT_ONCE)
            few = values[chunk]
            if manifest.kind == "pixels":
                self._as_float32(
                    [pixels[:, :, ::-1] if m else pixels for pixels, m in zip(arrays[chunk], flipped[chunk], strict=True)], few
                )
            else:
                self._sample([moments[int(m)] for moments, m in zip(arrays[chunk], flipped[chunk], strict=True)], few)
            few *= scale
            few += shift

    def _sample(self, moments: Sequence[np.ndarray], values: np.ndarray) -> None:
        """Posteriors (2C, H, W), sampled with the numbers in `values` (b, C, H, W)."""
        stored = self._memory((len(moments), *moments[0].shape), np.float32)  # (b, 2C, H, W)
        self._as_float32(moments, stored)
        mean, deviation = stored[:, : values.shape[1]], stored[:, values.shape[1] :]  # (b, C, H, W) each
        np.clip(deviation, -30.0, 20.0, out=deviation)  # of the log-variance: the clip of latent-diffusion VAEs
        deviation *= np.float32(0.5)
        for row in deviation:
            np.exp(row, out=row)  # sample by sample: its bits must not depend on the size of the batch
        values *= deviation
        values += mean

    def _as_float32(self, arrays: Sequence[np.ndarray], values: np.ndarray) -> None:
        """float16 by torch, which is twenty times as fast as NumPy."""
        joined = values if arrays[0].dtype == values.dtype else self._memory(values.shape, arrays[0].dtype)
        np.concatenate(arrays, out=joined.reshape(-1, *values.shape[2:]))
        if joined.dtype == np.float16:
            torch.from_numpy(values).copy_(torch.from_numpy(joined))
        elif joined is not values:
            values[...] = joined

    def _memory(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Scratch of this shape, with whatever was in it."""
        found = self._scratch.get((shape, dtype))
        if found is None:
            found = self._scratch[shape, dtype] = np.empty(shape, dtype)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_scratch": {}}
