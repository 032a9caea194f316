"""What a sample is conditioned on, as the model takes it: labels, or the features of captions.

Legend: B samples, M places for a caption's tokens, E width of their features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CaptionFeatures:
    """Captions as features of their tokens. What stands in places behind a caption's length has no effect whatever."""

    features: Tensor  # (B, M, E) floating point
    lengths: Tensor  # (B,) int64, tokens of each caption; 0 is the null caption

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice) -> "CaptionFeatures":
        return CaptionFeatures(self.features[rows], self.lengths[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CaptionFeatures":
        """The captions on another device."""
        return CaptionFeatures(
            self.features.to(device, non_blocking=non_blocking), self.lengths.to(device, non_blocking=non_blocking)
        )


Condition = Tensor | CaptionFeatures  # labels (B,) int64, the number of classes being the null class; or captions


def joined(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one kind, and captions of as many places, one after the other."""
    texts = [condition for condition in conditions if isinstance(condition, CaptionFeatures)]
    labels = [condition for condition in conditions if isinstance(condition, Tensor)]
    assert not (texts and labels), "labels and captions do not mix"
    if texts:
        return CaptionFeatures(
            torch.cat([text.features for text in texts]), torch.cat([text.lengths for text in texts])
        )
    return torch.cat(labels)


def padded(rows: Sequence[Tensor], places: int, width: int) -> CaptionFeatures:
    """Captions from the features (length, E) of each, cut to `places` and filled up with zeros; no rows: the null
    caption.
    """
    features = torch.zeros(len(rows), places, width, dtype=rows[0].dtype if rows else torch.float32)
    lengths = torch.zeros(len(rows), dtype=torch.int64)
    for number, row in enumerate(rows):
        lengths[number] = min(len(row), places)
        features[number, : lengths[number]] = row[:places]
    return CaptionFeatures(features, lengths)
