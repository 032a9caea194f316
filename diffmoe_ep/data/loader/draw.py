"""What is drawn for positions of the stream: every draw has a stream of random numbers of its own, keyed by seed and
position, so none shifts another.
"""

from dataclasses import dataclass

import numpy as np

from diffmoe_ep.config import DataConfig
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.rng import KeyedRng


@dataclass(frozen=True)
class Draws:
    """The draws of B positions."""

    noise: np.ndarray  # (B, C, H, W) float32, standard normal
    posterior: np.ndarray | None  # the same, that moments are sampled with; None for pixels
    u: np.ndarray  # (B,) float32 in [0, 1), which the objective maps to a time
    flip: list[bool]  # whether the sample is mirrored
    drop: list[bool]  # whether its condition is replaced by the null condition
    caption: list[float]  # in [0, 1), which of its captions is taken; 0 where conditions are labels


class Draw:
    """Draws for positions of one stream."""

    def __init__(self, seed: int, data: DataConfig, manifest: Manifest) -> None:
        self._rng = KeyedRng(seed)
        self._data = data
        self._manifest = manifest

    def __call__(self, positions: range) -> Draws:
        """The draws of these positions, a function of seed and position alone."""
        at, data, manifest = self._rng.at, self._data, self._manifest
        shape = (len(positions), *manifest.shape)
        noise, u = np.empty(shape, np.float32), np.empty(len(positions), np.float32)
        posterior = np.empty(shape, np.float32) if manifest.kind == "moments" else None
        flip, drop, caption = [], [], []
        for row, position in enumerate(positions):
            at(position, "noise").standard_normal(out=noise[row], dtype=np.float32)
            if posterior is not None:
                at(position, "posterior").standard_normal(out=posterior[row], dtype=np.float32)
            u[row] = at(position, "time").random(dtype=np.float32)
            flip.append(data.flip and at(position, "flip").random() < 0.5)
            drop.append(data.condition_dropout > 0 and at(position, "drop").random() < data.condition_dropout)
            caption.append(at(position, "caption").random() if manifest.condition == "text" else 0.0)
        return Draws(noise, posterior, u, flip, drop, caption)
