"""From the final latents of a VAE to pictures, by its decoder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError, SampleConfig
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.parallel.mesh import Mesh

Decode = Callable[[Tensor], Tensor]  # final latents (n, C, h, w) to pixels (n, 3, H, W) uint8 on the CPU


def load_decoder(sample: SampleConfig, data_info: DataInfo, mesh: Mesh) -> Decode | None:
    """The decoder of sample.vae, on every rank's device; None where it is not set, or the data are pixels, which need
    none.

    Each picture is decoded by itself, so that it does not depend on how samples are laid over ranks. ConfigError, on
    all ranks, for a VAE other than the one that made the data's latents.
    """
    if sample.vae is None or data_info.kind != "moments":
        return None
    found, problem = None, None
    try:
        found = _load(sample, data_info, mesh.device)
    except ConfigError as error:
        problem = str(error)
    mesh.agree(problem)
    return found


def _load(sample: SampleConfig, data_info: DataInfo, device: torch.device) -> Decode:
    from diffmoe_ep.encoders.vae import load_vae

    vae = load_vae(Path(str(sample.vae)), device)
    remedy = f"set sample.vae to the folder of the VAE that made the latents of {data_info.name}"
    if data_info.scale is not None and (vae.scale, vae.shift) != (data_info.scale, data_info.shift):
        here, there = (
            f"(scale {scale:g}, shift {shift:g})"
            for scale, shift in ((vae.scale, vae.shift), (data_info.scale, data_info.shift))
        )
        raise ConfigError(
            f"sample.vae {sample.vae} scales its latents otherwise {here} than the model's are {there}; {remedy}"
        )
    if data_info.shape and vae.channels != data_info.shape[0]:
        raise ConfigError(
            f"sample.vae {sample.vae} has latents of {vae.channels} channels, the model of {data_info.shape[0]}; "
            f"{remedy}"
        )
    if data_info.encoder and vae.fingerprint != data_info.encoder:
        prints = f"fingerprint {vae.fingerprint[:12]}..., not {data_info.encoder[:12]}..."
        raise ConfigError(
            f"sample.vae {sample.vae} is another VAE than the one that made the model's latents ({prints}); {remedy}"
        )

    def decode(latents: Tensor) -> Tensor:
        pictures = [vae.images(latent[None]).cpu() for latent in latents]
        shown = (
            torch.cat(pictures)
            if pictures
            else torch.zeros(0, 3, vae.factor * latents.shape[2], vae.factor * latents.shape[3])
        )
        return ((shown.double() + 1) * 127.5).round().to(torch.uint8)

    return decode
