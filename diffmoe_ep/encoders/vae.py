"""The VAE: images to the moments of their posterior, and latents back to images."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.encoders.local_folder import fingerprint, read_config, weight_files

SOURCE = (
    "the local folder of a diffusers AutoencoderKL, such as stabilityai/sd-vae-ft-mse (config.json, "
    "diffusion_pytorch_model.safetensors)"
)


@dataclass(frozen=True)
class Vae:
    """A frozen diffusers AutoencoderKL on a device, in float32."""

    model: Any  # the AutoencoderKL
    device: torch.device
    channels: int  # C of a latent
    factor: int  # side of an image = factor * side of its latent
    scale: float  # final latent = posterior sample * scale + shift
    shift: float  # see scale
    fingerprint: str  # sha256 over config and weights

    @torch.no_grad()
    def moments(self, images: np.ndarray, flips: int) -> np.ndarray:
        """Mean and log-variance, unscaled, of images (B, 3, H, W) uint8, and of their mirror images if `flips` is 2.

        (B, flips, 2C, h, w) float16. What overflows float16 comes back as infinity: the caller decides what to do with
        it.
        """
        pixels = torch.from_numpy(images).to(self.device).float() / 127.5 - 1.0  # (B, 3, H, W) in [-1, 1]
        sides = [pixels, pixels.flip(3)][:flips]
        found = [self.model.encode(side).latent_dist.parameters for side in sides]  # each (B, 2C, h, w)
        return torch.stack(found, dim=1).half().cpu().numpy()

    @torch.no_grad()
    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents (B, C, h, w) to images (B, 3, H, W) float32 in [-1, 1]."""
        samples = (latents.to(self.device, torch.float32) - self.shift) / self.scale
        decoded: torch.Tensor = self.model.decode(samples).sample
        return decoded.clamp(-1.0, 1.0)


def load_vae(folder: Path, device: torch.device | str = "cpu") -> Vae:
    """Load a VAE from a local folder; ConfigError when diffusers or the folder are missing, or it is another kind of
    model.
    """
    config = read_config(folder, "the VAE folder", SOURCE)
    if config.get("_class_name") != "AutoencoderKL":
        raise ConfigError(f"{folder} holds a {config.get('_class_name')}, expected an AutoencoderKL; give {SOURCE}")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ConfigError(
            f"{folder} scales each latent channel by itself (latents_mean, latents_std); use a VAE with one "
            "scaling_factor"
        )
    weights = weight_files(folder, "diffusion_pytorch_model")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            f"a VAE needs diffusers, which is missing ({error}); pip install 'diffmoe_ep[encode]'"
        ) from error
    try:
        model = AutoencoderKL.from_pretrained(
            str(folder), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} does not load as an AutoencoderKL ({error}); give {SOURCE}") from error
    scale, shift = float(model.config.scaling_factor), float(model.config.shift_factor or 0.0)
    if not math.isfinite(scale) or scale == 0 or not math.isfinite(shift):
        raise ConfigError(
            f"{folder}/config.json: scaling_factor {scale}, shift_factor {shift} are no scale; use a VAE with a sound "
            "config"
        )
    return Vae(
        model=model.to(device).eval().requires_grad_(False),
        device=torch.device(device),
        channels=int(model.config.latent_channels),
        factor=2 ** (len(model.config.block_out_channels) - 1),
        scale=scale,
        shift=-shift * scale,  # diffusers: (sample - shift_factor) * scaling_factor
        fingerprint=fingerprint([folder / "config.json", *weights]),
    )
