"""Feature spaces in which sets of samples are compared."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float64]  # (n, F)


def pixel_features(pixels: Tensor) -> Features:
    """The data's own feature space: flattened pixels in their stored units, (n, C, H, W) -> (n, C*H*W) float64."""
    return pixels.flatten(1).cpu().numpy().astype(np.float64)
