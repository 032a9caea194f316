"""Captions on their way into a Batch: what a run asks of them, whether its datasets have that, and the one of a sample
that it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffmoe_ep.config import ConfigError, ModelConfig
from diffmoe_ep.config.schema import TextConfig
from diffmoe_ep.data.codec import Caption
from diffmoe_ep.data.condition import CaptionFeatures, padded
from diffmoe_ep.data.manifest import Manifest, TextEncoderInfo
from diffmoe_ep.data.sources import BatchSource


@dataclass(frozen=True)
class CaptionSpec:
    """What a model wants of captions."""

    encoder: str  # whose features: t5 or clip
    places: int  # tokens that the model sees; what is longer is cut, what is shorter filled up
    width: int  # of a token's features
    online: bool = False  # captions are given as words, to be encoded while training

    @classmethod
    def of(cls, model: ModelConfig, text: TextConfig) -> "CaptionSpec | None":
        """As the config says; None where the condition is a label."""
        return (
            cls(text.encoder, model.text_length, model.text_width, text.online) if model.condition == "text" else None
        )

    def stored(self, manifest: Manifest) -> TextEncoderInfo | None:
        """The stored features to be read; None where captions are encoded while training, or where there are none."""
        return (
            None
            if self.online
            else next((features for features in manifest.text if features.name == self.encoder), None)
        )

    def members(self, manifest: Manifest) -> tuple[str, ...]:
        """The members of a sample to be read: of the features of several encoders, only the wanted ones."""
        kept = {feature.field for feature in [self.stored(manifest)] if feature is not None}
        return tuple(field for field in manifest.fields if not field.startswith("text.") or field in kept)


def check_text(source: BatchSource, text: CaptionSpec | None) -> None:
    """Raise ConfigError unless the datasets hold the condition that the model takes: labels, or captions with the
    features it wants.
    """
    first: tuple[str, TextEncoderInfo] | None = None
    for name, manifest in zip(source.names, source.manifests, strict=True):
        if manifest.condition == "class":
            if text is None:
                continue
            raise ConfigError(
                f"{name} holds labels, but model.condition is text; set model.condition=class, or give a dataset with "
                "captions"
            )
        if text is None:
            raise ConfigError(
                f"{name} holds captions, but model.condition is class; set model.condition=text, or give a dataset "
                "with labels"
            )
        if text.online:
            continue
        features = text.stored(manifest)
        if features is None:
            held = ", ".join(f"{each.name} (width {each.width})" for each in manifest.text) or "none at all"
            raise ConfigError(
                f"text.encoder is {text.encoder}, but {name} holds no features of it: it has {held}; prepare the "
                "dataset with "
                f"--{text.encoder} FOLDER, choose an encoder that it has, or set text.folder=FOLDER text.online=true"
            )
        if features.width != text.width:
            raise ConfigError(
                f"the {text.encoder} features in {name} are {features.width} wide, but model.text_width is "
                f"{text.width}; "
                f"set model.text_width={features.width}, or prepare the dataset with the encoder that the model is for"
            )
        first = first or (name, features)
        if features.fingerprint != first[1].fingerprint:
            raise ConfigError(
                f"data.mixture: the {text.encoder} features in {name} were made by an encoder with fingerprint "
                f"{features.fingerprint}, "
                f"those in {first[0]} by one with {first[1].fingerprint}; prepare one anew with the other's encoder, "
                "or leave it out"
            )


def collate(
    captions: Sequence[Caption], dropped: Sequence[bool], text: CaptionSpec
) -> tuple[CaptionFeatures, tuple[str, ...]]:
    """The condition of a batch, and the words of its captions where they are still to be encoded; what is dropped is
    the null caption.
    """
    if text.online:
        words = tuple("" if drop else caption.text for caption, drop in zip(captions, dropped, strict=True))
        return CaptionFeatures(
            torch.zeros(len(words), text.places, 0), torch.zeros(len(words), dtype=torch.int64)
        ), words
    rows = [caption.features[0][: 0 if drop else text.places] for caption, drop in zip(captions, dropped, strict=True)]
    joined = torch.from_numpy(np.concatenate(rows)).float()  # (sum of lengths, E), converted once for all
    return padded(joined.split([len(row) for row in rows]), text.places, text.width), ()
