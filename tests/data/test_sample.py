"""Stored bytes to arrays and final latents: what is written comes back, and nothing else is accepted."""

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmoe_ep.data.keyed import keyed
from diffmoe_ep.data.sample import Batch, decode, encode, final_latent
from diffmoe_ep.data.shards import Manifest

PIXELS = Manifest("tiny", "pixels", (3, 4, 5), "uint8", 1 / 8, -1.0, 10, (), "made up")
FLOATS = replace(PIXELS, dtype="float32", scale=2.0, shift=0.5)
MOMENTS = Manifest("tiny", "moments", (2, 4, 4), "float16", 0.18215, 0.0, 1000, (), "made up", flips=2)


def array_for(manifest: Manifest, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=manifest.stored_shape)
    return np.abs(values * 5).astype(np.uint8) if manifest.dtype == "uint8" else values.astype(manifest.dtype)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


@pytest.mark.parametrize("manifest", [PIXELS, FLOATS, MOMENTS])
def test_a_sample_comes_back(manifest: Manifest) -> None:
    array = array_for(manifest)
    fields = encode(array, 7, manifest)
    assert tuple(sorted(fields)) == manifest.fields
    found, label = decode(fields, manifest)
    assert label == 7
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(decode({"cls": b"7", manifest.fields[1]: npy(array)}, manifest)[0], array)  # numpy's own writer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels.npy": b""}, "not an npy file"),
        ({"pixels.npy": b"\x93NUMPY\x01\x00\xff\xff{"}, "not an npy file"),
        ({"pixels.npy": b"\x93NUMPY\x02\x00" + bytes(100)}, "not an npy file"),
        ({"pixels.npy": pickle.dumps([1])}, "not an npy file"),
        ({"pixels.npy": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)}, "holds object"),
        ({"pixels.npy": npy(np.zeros((3, 4, 6), np.uint8))}, r"holds uint8 \(3, 4, 6\)"),
        ({"pixels.npy": npy(np.zeros((3, 4, 5), np.float32))}, "holds float32"),
        ({"pixels.npy": npy(np.asfortranarray(np.zeros((3, 4, 5), np.uint8)))}, "Fortran"),
        ({"pixels.npy": npy(np.zeros((3, 4, 5), np.uint8))[:-1]}, "59 bytes"),
        ({"pixels.npy": npy(np.zeros((3, 4, 5), np.uint8)) + b"!"}, "61 bytes"),
        ({"cls": b"10"}, "label b'10'"),
        ({"cls": b"-1"}, "label b'-1'"),
        ({"cls": b"1.0"}, "label"),
        ({"cls": b""}, "label"),
        ({"cls": b"9" * 5000}, "label"),
        ({"cls": "\u0663".encode()}, "label"),
    ],
)
def test_other_content_is_refused(change: dict[str, bytes], message: str) -> None:
    fields = encode(array_for(PIXELS), 3, PIXELS)
    with pytest.raises(ValueError, match=message):
        decode(fields | change, PIXELS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("manifest", [FLOATS, MOMENTS])
def test_values_that_are_not_finite_are_refused(manifest: Manifest, bad: float) -> None:
    array = array_for(manifest)
    array.flat[5] = bad
    with pytest.raises(ValueError, match="not finite"):
        decode({"cls": b"1", manifest.fields[1]: npy(array)}, manifest)
    with pytest.raises(ValueError, match="not finite"):
        encode(array, 1, manifest)


def test_encode_refuses_what_the_manifest_does_not_announce() -> None:
    with pytest.raises(ValueError, match="stores uint8"):
        encode(array_for(FLOATS), 1, PIXELS)
    with pytest.raises(ValueError, match="label 10"):
        encode(array_for(PIXELS), 10, PIXELS)


def test_pixels_are_mirrored_and_scaled() -> None:
    array = array_for(PIXELS)
    plain = final_latent(array, PIXELS, False, seed=0, position=0)
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(plain, array.astype(np.float32) / 8 - 1)
    np.testing.assert_array_equal(final_latent(array, PIXELS, True, 0, 0), plain[:, :, ::-1])


@pytest.mark.parametrize("flipped", [False, True])
def test_moments_are_sampled_with_the_position_s_noise_and_scaled(flipped: bool) -> None:
    array = array_for(MOMENTS)
    mean, log_variance = array[int(flipped), :2].astype(np.float64), array[int(flipped), 2:].astype(np.float64)
    noise = keyed(9, 41, "posterior").standard_normal((2, 4, 4), dtype=np.float32)
    expected = (mean + np.sqrt(np.exp(log_variance)) * noise) * 0.18215
    found = final_latent(array, MOMENTS, flipped, seed=9, position=41)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(found, final_latent(array, MOMENTS, flipped, seed=9, position=42))
    shifted = final_latent(array, replace(MOMENTS, shift=0.25), flipped, seed=9, position=41)
    np.testing.assert_allclose(shifted, expected + 0.25, rtol=1e-5, atol=1e-6)


def test_extreme_log_variances_stay_finite() -> None:
    array = np.full(MOMENTS.stored_shape, 60000, dtype=np.float16)
    assert np.isfinite(final_latent(array, MOMENTS, False, 0, 0)).all()


def test_batch_moves_and_counts() -> None:
    batch = Batch(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.tensor([1, 2]), torch.tensor([8, 9]))
    moved = batch.to("meta", non_blocking=True)
    assert len(batch) == len(moved) == 2
    assert {getattr(moved, name).device.type for name in ("latent", "noise", "u", "condition", "position")} == {"meta"}
