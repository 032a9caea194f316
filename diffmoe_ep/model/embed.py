"""From pixels, time, labels and captions to vectors, and back from tokens to pixels.

Legend: B samples, C channels, T tokens, D hidden size, M places for a caption's tokens, E width of their features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ep.data.condition import CaptionFeatures


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each to a token, row by row: a convolution, computed as the matmul that it is.

    (A GPU's convolutions may use TF32, and their backward adds in no fixed order.)
    """

    def __init__(self, in_channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(in_channels, hidden, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        batch, channels, height, width = x.shape
        patch, rows, columns = self.patch, height // self.patch, width // self.patch
        cut = x.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, C, p, p)
        flat = cut.reshape(batch, rows * columns, channels * patch * patch)
        return F.linear(flat, self.projection.weight.flatten(1), self.projection.bias)  # (B, T, D)


def sine_positions(hidden: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (side * side, D): the first half of D codes the column, the second the row."""
    frequency = 10000.0 ** (-torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))  # (D/4,)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, D/4)
    half = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D/2)
    rows, columns = half[:, None].expand(-1, side, -1), half[None].expand(side, -1, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


class TimeEmbed(nn.Module):
    """Embed a time as it is (flow: 0 to 1) by 256 sinusoids and a small network."""

    def __init__(self, hidden: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        half = self.features // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
        angle = t[:, None] * frequency  # (B, 128)
        embedded: Tensor = self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=1))))
        return embedded


class LabelEmbed(nn.Module):
    """A row for each class, and a last one for the null class."""

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, hidden)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        embedded: Tensor = self.table(label)
        return embedded


class CaptionEmbed(nn.Module):
    """Map the features of a caption's tokens to the hidden size; a trained row stands for the null caption. One for all
    blocks.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.empty(width))
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, text: CaptionFeatures) -> tuple[Tensor, Tensor]:
        """Captions -> (B, M, D), and (B, M) bool, true where a token stands; the null caption is one token long."""
        place = torch.arange(text.features.shape[1], device=text.features.device)
        mask = place < text.lengths.clamp(min=1)[:, None]  # (B, M)
        features = torch.where((text.lengths == 0)[:, None, None], self.null, text.features.to(self.null.dtype))
        features = torch.where(mask[:, :, None], features, 0.0)  # what stands behind may be anything, NaN too
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh")), mask


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Put tokens (B, T, patch * patch * C), features ordered (row, column, channel), back into images (B, C, H, W)."""
    batch, count, _ = tokens.shape
    side = math.isqrt(count)
    image = tokens.view(batch, side, side, patch, patch, channels)
    return image.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)
