"""Source: scikit-learn's 1,797 handwritten digits, 8x8 grey values 0 to 16, with a fixed stratified held-out split."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from data_prep.shard import Sample
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.rng import generator_for, permutation

NUM_HELDOUT = 297  # of 1,797; 1,500 train
SPLIT_SEED = 1797
LICENCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0"
)


def manifest_of(split: Literal["train", "heldout"]) -> Manifest:
    """What a split's manifest says but for its shards; values / 8 - 1 puts the final latents into [-1, 1]."""
    return Manifest(
        name=f"digits-{split}",
        kind="pixels",
        shape=(1, 8, 8),
        dtype="uint8",
        scale=1 / 8,
        shift=-1.0,
        num_classes=10,
        class_names=tuple("0123456789"),
        licence=LICENCE,
        image_size=8,
    )


def load() -> tuple[np.ndarray, np.ndarray]:
    """All images (1797, 1, 8, 8) uint8 and labels (1797,); DataError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"the digits come with scikit-learn, which is missing ({error}); pip install 'diffmoe_ep[prep]'"
        ) from error
    bunch = load_digits()
    return bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)


def heldout_mask(labels: np.ndarray, num_heldout: int = NUM_HELDOUT) -> np.ndarray:
    """Which samples are held out, (n,) bool: each class in proportion (largest remainders first), chosen by a fixed
    seed.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas = counts * num_heldout / len(labels)
    chosen = np.floor(quotas).astype(int)
    remainders = np.argsort(chosen - quotas, kind="stable")  # largest remainder first, lower class first among equals
    chosen[remainders[: num_heldout - chosen.sum()]] += 1
    mask = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, chosen, strict=True):
        members = np.flatnonzero(labels == label)
        mask[members[permutation(generator_for(SPLIT_SEED, int(label), "order"), len(members))[:count]]] = True
    return mask


def samples(split: Literal["train", "heldout"]) -> Iterator[Sample]:
    """Key and fields of a split's samples, in the source's order; a key is the place in the source."""
    images, labels = load()
    manifest = manifest_of(split)
    for place in np.flatnonzero(heldout_mask(labels) == (split == "heldout")):
        yield f"{place:06d}", encode(images[place], int(labels[place]), manifest)
