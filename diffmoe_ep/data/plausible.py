"""Which samples' values are beyond what the others make plausible: a thousand deviations away.

Means and deviations are medians over samples, so that a few monstrous ones do not hide themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffmoe_ep.data.latent import deviation_of
from diffmoe_ep.data.manifest import Manifest

FAR = 1000.0  # deviations; those of a normal distribution, and of pictures, lie within ten


class Spread(NamedTuple):
    """Where the values of a sample lie."""

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Of values in any shape."""
        floats = values.astype(np.float64)
        with np.errstate(all="ignore"):  # what is not finite stays so
            return cls(float(floats.mean()), float(floats.std()), float(floats.min()), float(floats.max()))

    @classmethod
    def of_stored(cls, array: np.ndarray, manifest: Manifest) -> "Spread":
        """Of a stored array; of moments, of what is drawn from them, to one deviation on either side."""
        if manifest.kind == "pixels":
            return cls.of(array)
        floats = array.astype(np.float64)
        mean, deviation = floats[:, : manifest.shape[0]], deviation_of(floats[:, manifest.shape[0] :])
        total = float(np.sqrt(mean.var() + np.square(deviation).mean()))
        return cls(float(mean.mean()), total, float((mean - deviation).min()), float((mean + deviation).max()))


@dataclass(frozen=True)
class Usual:
    """Where the values of samples usually lie."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, spreads: Sequence[Spread] | np.ndarray) -> "Usual":
        """Of samples, a `Spread` a row; those that are not finite do not count."""
        spreads = np.asarray(spreads, dtype=np.float64).reshape(-1, 4)
        finite = spreads[np.isfinite(spreads).all(1), :2]
        return cls(*np.median(finite, axis=0).tolist()) if len(finite) else cls(0.0, 0.0)

    def distance(self, spread: Spread) -> float:
        """How many deviations a sample's farthest value is away; infinite if it is none, 0 where nobody can say."""
        if not np.isfinite([spread.low, spread.high]).all():
            return float("inf")
        if self.deviation == 0:
            return 0.0
        return max(abs(spread.low - self.mean), abs(spread.high - self.mean)) / self.deviation
