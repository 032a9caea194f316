"""The VAE: moments as diffusers gives them, mirror images too, and folders that are no VAE."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.encoders.vae import load_vae
from encoders.tiny import save_vae

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16)).astype(np.uint8)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    return save_vae(tmp_path_factory.mktemp("vae"), scaling_factor=0.5, shift_factor=0.25)


def test_moments_are_those_of_diffusers(vae: Path) -> None:
    encoder = load_vae(vae)
    assert (encoder.channels, encoder.factor, encoder.scale, encoder.shift) == (4, 2, 0.5, -0.125)
    found = encoder.moments(IMAGES, 2)
    assert (found.shape, found.dtype) == ((3, 2, 8, 8, 8), np.float16)
    pixels = torch.from_numpy(IMAGES).float() / 127.5 - 1
    for flip, images in enumerate((pixels, pixels.flip(-1))):
        with torch.no_grad():
            posterior = encoder.model.encode(images).latent_dist
        expected = torch.cat(
            [posterior.mean, posterior.logvar], dim=1
        )  # no value of these weights reaches the clamp of logvar
        torch.testing.assert_close(torch.from_numpy(found[:, flip]).float(), expected, rtol=2e-3, atol=1e-3)
    assert np.abs(found[:, 0].astype(float) - found[:, 1]).max() > 1e-2
    np.testing.assert_array_equal(encoder.moments(IMAGES, 1)[:, 0], found[:, 0])


def test_latents_come_back_as_images(vae: Path) -> None:
    encoder = load_vae(vae)
    samples = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = encoder.model.decode(samples).sample.clamp(-1, 1)
    torch.testing.assert_close(encoder.images(samples * 0.5 - 0.125), expected, rtol=1e-4, atol=1e-4)


def test_the_fingerprint_is_that_of_config_and_weights(vae: Path, tmp_path: Path) -> None:
    first = load_vae(vae).fingerprint
    same, other = (
        save_vae(tmp_path / "same", scaling_factor=0.5, shift_factor=0.25),
        save_vae(tmp_path / "other", seed=1),
    )
    (same / "README.md").write_text("does not count")
    assert load_vae(same).fingerprint == first
    assert load_vae(other).fingerprint != first
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.7}))
    assert load_vae(same).fingerprint != first


def test_pickled_weights_are_not_read(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vae / "config.json").read_bytes())
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        ConfigError, match=r"lacks diffusion_pytorch_model.safetensors; save the model once .* are never read"
    ):
        load_vae(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="does not load as an AutoencoderKL"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"holds no config.json .*; give the local folder of a diffusers AutoencoderKL"),
        ("{", "not a JSON file"),
        ("[]", "is a list, expected an object"),
        ('{"_class_name": "UNet2DModel"}', "holds a UNet2DModel, expected an AutoencoderKL"),
        ('{"_class_name": "AutoencoderKL", "latents_mean": [0.1]}', "scales each latent channel by itself"),
        ('{"_class_name": "AutoencoderKL"}', "lacks diffusion_pytorch_model.safetensors"),
    ],
)
def test_folders_that_are_no_vae(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        load_vae(tmp_path)
    with pytest.raises(ConfigError, match="absent is not a folder"):
        load_vae(tmp_path / "absent")
