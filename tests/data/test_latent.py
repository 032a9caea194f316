"""Final latents: mirrored, sampled from their posterior, scaled and shifted; equal to plain NumPy to the bit."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffmoe_ep.data.latent import final_latent, oriented
from diffmoe_ep.data.manifest import Manifest

PIXELS = Manifest("tiny", "pixels", (1, 3, 4), "uint8", 1 / 8, -1.0, 10, (), "made up")
MOMENTS = Manifest("tiny", "moments", (2, 4, 4), "float16", 0.18215, 0.0, 10, (), "made up", flips=2)


def stored(manifest: Manifest) -> np.ndarray:
    return (np.random.default_rng(1).normal(size=manifest.stored_shape) * 40).astype(manifest.dtype)


def normal(manifest: Manifest, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(manifest.shape, dtype=np.float32)


def latent(array: np.ndarray, manifest: Manifest, flipped: bool = False, seed: int = 0) -> np.ndarray:
    return final_latent(oriented(array, manifest, flipped), manifest, normal(manifest, seed))


def test_pixels_are_mirrored_and_scaled() -> None:
    array = stored(PIXELS)
    plain = latent(array, PIXELS)
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(plain, array.astype(np.float32) / 8 - 1)
    np.testing.assert_array_equal(latent(array, PIXELS, flipped=True), plain[:, :, ::-1])


@pytest.mark.parametrize("flipped", [False, True])
def test_moments_are_sampled_with_the_given_numbers_and_scaled(flipped: bool) -> None:
    array = np.random.default_rng(0).normal(size=MOMENTS.stored_shape).astype(np.float16)
    mean, log_variance = array[int(flipped), :2].astype(np.float64), array[int(flipped), 2:].astype(np.float64)
    expected = (mean + np.sqrt(np.exp(log_variance)) * normal(MOMENTS, 9)) * 0.18215
    found = latent(array, MOMENTS, flipped, seed=9)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    shifted = latent(array, replace(MOMENTS, shift=0.25), flipped, seed=9)
    np.testing.assert_allclose(shifted, expected + 0.25, rtol=1e-5, atol=1e-6)


def test_extreme_log_variances_stay_finite() -> None:
    assert np.isfinite(latent(np.full(MOMENTS.stored_shape, 60000, dtype=np.float16), MOMENTS)).all()


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 32, 32)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("pixels", "uint8"), ("pixels", "float16"), ("pixels", "float32"), ("moments", "float16"), ("moments", "float32")],
)
@pytest.mark.parametrize("flipped", [False, True])
def test_they_are_those_of_plain_numpy_to_the_bit(kind: Any, dtype: str, flipped: bool, shape: Any) -> None:
    """What runs were trained on: each operation rounded to float32, in this order."""
    manifest = Manifest(
        "tiny", kind, shape, dtype, 0.18215, -0.125, 4, (), "made up", flips=2 if kind == "moments" else 1
    )
    array = stored(manifest)
    if kind == "pixels":
        values = (array[:, :, ::-1] if flipped else array).astype(np.float32)
    else:
        mean, log_variance = np.split(array[int(flipped)].astype(np.float32), 2)
        deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
        values = mean + deviation * normal(manifest)
    np.testing.assert_array_equal(latent(array, manifest, flipped), values * np.float32(0.18215) + np.float32(-0.125))
