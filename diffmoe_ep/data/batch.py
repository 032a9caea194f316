"""The Batch that training receives."""

from dataclasses import dataclass

import torch

from diffmoe_ep.data.condition import Condition


@dataclass(frozen=True)
class Batch:
    """Everything that training needs of B samples, drawn by their positions."""

    latent: torch.Tensor  # (B, C, H, W) float32, final: scaled and shifted
    noise: torch.Tensor  # (B, C, H, W) float32, standard normal
    u: torch.Tensor  # (B,) float32 in [0, 1), which the objective maps to a time
    condition: Condition  # labels, the null class num_classes where it was dropped; or captions, then of length 0
    position: torch.Tensor  # (B,) int64 place in the endless stream
    captions: tuple[str, ...] = ()  # words that are still to be encoded, nothing where it was dropped

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        latent, noise, u, position = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.latent, self.noise, self.u, self.position)
        )
        return Batch(latent, noise, u, self.condition.to(device, non_blocking=non_blocking), position, self.captions)
