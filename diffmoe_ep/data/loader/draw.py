"""The hot path of the loader: the draws of a position and the final latents of a batch, as `keyed` and `final_latent`
give them.
"""

from typing import Any

import numpy as np
import torch
from numpy.random import Generator, Philox

from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.rng import STREAMS

AT_ONCE = 32  # samples whose latents are made together


class Draws:
    """The generators of `keyed`, one at a time: making one costs ten times as much as setting the state of one that is
    there.
    """

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
        """The generator `generator_for(seed, position, purpose)`; the one given before is void."""
        self._key[1] = position
        self._counter[3] = STREAMS[purpose]
        self._philox.state = self._state
        return self._generator


class Latents:
    """Final latents of a few stored samples of one dataset at a time: `final_latent` of each, equal to the bit.

    What a sample needs of its stored array is copied at once, so that the bytes around it are free for the next one;
    and the memory is used again, so that what lies between stored and final values stays in the processor's cache.
    Arithmetic is torch's, which converts float16 twenty times as fast as NumPy and is faster on rows that do not lie
    together.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        shape = manifest.shape if manifest.kind == "pixels" else manifest.stored_shape[1:]
        self._stored = np.empty((AT_ONCE, *shape), dtype=manifest.dtype)
        self._floats = torch.empty((AT_ONCE, *shape))
        self._rows: list[int] = []  # where each belongs

    def clear(self) -> None:
        """Forget what was put."""
        self._rows = []

    def put(self, row: int, array: np.ndarray, flipped: bool) -> None:
        """Take a stored array, mirrored or not, for the latent in this row; rows ascend, at most `AT_ONCE` before they
        are filled in.
        """
        if self._manifest.kind == "moments":
            self._stored[len(self._rows)] = array[1 if flipped else 0]
        else:
            self._stored[len(self._rows)] = array[:, :, ::-1] if flipped else array
        self._rows.append(row)

    def fill(self, values: np.ndarray) -> list[int]:
        """Make the final latents of what was put, in those rows of `values` (B, C, H, W) float32; gives the rows that
        are not finite.

        Of moments, `values` holds the standard normal numbers that their posteriors are sampled with.
        """
        rows = self._rows
        if not rows:
            return []
        self.clear()
        neighbours = rows[-1] - rows[0] == len(rows) - 1
        few = values[rows[0] : rows[-1] + 1] if neighbours else values[rows]  # (b, C, H, W)
        stored, manifest = self._stored[: len(rows)], self._manifest
        target = torch.from_numpy(few)
        floats = self._floats[: len(rows)] if manifest.kind == "moments" else target
        floats.copy_(torch.from_numpy(stored))
        finite = _finite(floats, stored.dtype)
        if manifest.kind == "moments":
            mean, deviation = floats[:, : few.shape[1]], floats[:, few.shape[1] :]
            deviation.clamp_(-30.0, 20.0).mul_(0.5)  # of the log-variance: the clip of latent-diffusion VAEs
            # By NumPy, as `final_latent`. Between the rows lie the means, so each is a loop of its own, whatever the
            # number of samples.
            np.exp(deviation.numpy(), out=deviation.numpy())
            target.mul_(deviation).add_(mean)
        target.mul_(manifest.scale).add_(manifest.shift)
        if not neighbours:
            values[rows] = few
        return [] if finite.all() else [row for row, sound in zip(rows, finite.tolist(), strict=True) if not sound]


def _finite(floats: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Which samples have no value that is infinite or NaN, (b,); `dtype` is what they were stored as."""
    if dtype.kind != "f":
        return np.ones(len(floats), dtype=bool)
    if dtype == np.float16:  # their sum cannot overflow
        return np.isfinite(floats.flatten(1).sum(1).numpy())
    return np.isfinite(floats.flatten(1).numpy()).all(1)
