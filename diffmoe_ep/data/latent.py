"""From a stored array to the final latent that a model trains on."""

import numpy as np
import torch

from diffmoe_ep.data.manifest import Manifest


def oriented(array: np.ndarray, manifest: Manifest, flipped: bool) -> np.ndarray:
    """What a sample needs of its stored array: pixels (C, H, W) or moments (2C, H, W), of the image or of its mirror
    image.
    """
    if manifest.kind == "pixels":
        return array[:, :, ::-1] if flipped else array
    return array[int(flipped)]


def final_latent(values: np.ndarray, manifest: Manifest, posterior: np.ndarray | None) -> np.ndarray:
    """The (C, H, W) float32 latent of `oriented` values: of moments, a sample of their posterior; scaled and shifted.

    posterior: (C, H, W) float32 standard normal numbers, for moments.
    """
    floats = torch.from_numpy(np.array(values)).float().numpy()  # torch converts float16 twenty times as fast as NumPy
    if manifest.kind == "moments":
        assert posterior is not None
        mean, log_variance = floats[: manifest.shape[0]], floats[manifest.shape[0] :]
        floats = mean + deviation_of(log_variance) * posterior
    latent: np.ndarray = floats * np.float32(manifest.scale) + np.float32(manifest.shift)
    return latent


def deviation_of(log_variance: np.ndarray) -> np.ndarray:
    """The standard deviation of a posterior."""
    deviation: np.ndarray = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))  # the clip of latent-diffusion VAEs
    return deviation
