"""From samples to a table of scores, each beside the same score of held-out real data."""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.evaluate.features import Features, pixel_features
from diffmoe_ep.evaluate.scores import classifier_accuracy, frechet_distance, nearest_distance
from diffmoe_ep.sampling.capacity_record import CapacityRecord
from diffmoe_ep.tables import table

Images = tuple[Tensor, Tensor]  # uint8 (n, C, H, W), int64 labels (n,)


@dataclass(frozen=True)
class Scores:
    """How good samples are; distances are in stored pixel units."""

    num_samples: int  # generated samples
    num_train: int  # training images, the reference of every score
    num_heldout: int  # held-out images
    num_equal: int  # images on each side of the comparable pair of Fréchet distances
    accuracy: float  # share of samples that the classifier puts into the requested class
    accuracy_heldout: float  # the same classifier on held-out images: the best that can be hoped for
    frechet: float  # all samples against the training images
    frechet_equal: float  # num_equal samples against the training images
    frechet_equal_heldout: float  # num_equal held-out images against the training images
    nearest: float  # median distance from a sample to its nearest training image
    nearest_heldout: float  # the same for held-out images
    # share of samples nearer to a training image than the closest 1% of held-out images; near 0.01 is no copier
    closest_share: float
    capacity: float  # C_infer^avg; 1 is the compute of a dense model
    capacity_per_step: tuple[float, ...]  # C of each sampling step, from noise to data; empty for a dense model

    def lines(self) -> list[str]:
        """A table for the terminal."""
        equal = f"Fréchet distance, {self.num_equal} each"
        rows = [
            (f"scores of {self.num_samples} samples", "samples", "held-out", ""),
            (
                "classifier accuracy",
                f"{self.accuracy:.3f}",
                f"{self.accuracy_heldout:.3f}",
                "requested class; classifier trained on real data",
            ),
            (
                equal,
                f"{self.frechet_equal:.2f}",
                f"{self.frechet_equal_heldout:.2f}",
                f"to {self.num_train} training images",
            ),
            (
                f"Fréchet distance, {self.num_samples} samples",
                f"{self.frechet:.2f}",
                "",
                "falls with the count: compare equal counts",
            ),
            (
                "nearest training image",
                f"{self.nearest:.2f}",
                f"{self.nearest_heldout:.2f}",
                "median; far below held-out: a copier",
            ),
            (
                "nearer than closest 1%",
                f"{self.closest_share:.1%}",
                "1.0%",
                "of held-out images; far above 1%: a copier",
            ),
            ("inference capacity", f"{self.capacity:.3f}", "", self._capacity_note()),
        ]
        return table(rows, align="<>><", rule=False)

    def as_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return {**asdict(self), "capacity_per_step": list(self.capacity_per_step)}

    def _capacity_note(self) -> str:
        if not self.capacity_per_step:
            return "dense model"
        lowest, largest = min(self.capacity_per_step), max(self.capacity_per_step)
        return f"1 = compute of a dense model; by step {lowest:.2f} to {largest:.2f}"


def load_images(folder: str | Path) -> Images:
    """All images and labels of a prepared dataset, in its storage order; DataError if it does not hold uint8 pixels."""
    dataset = Dataset.open(folder)
    manifest = dataset.manifest
    if manifest.kind != "pixels" or manifest.dtype != "uint8":
        raise DataError(
            f"data folder {folder} stores {manifest.dtype} {manifest.kind}, scoring reads uint8 pixels; name such a "
            "dataset"
        )
    places = [(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]
    decoded = [read_sample(dataset, *place) for place in places]
    dataset.close()
    images, labels = zip(*decoded, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64)


def score(samples: Tensor, labels: Tensor, train: Images, heldout: Images, capacity: CapacityRecord) -> Scores:
    """Compare generated images uint8 (n, C, H, W), requested as classes labels (n,), with real ones.

    A Fréchet distance depends on how many samples stand behind it, so the pair to compare uses as many generated as
    held-out images, drawn from all of them by a fixed permutation. Raises ConfigError without scikit-learn and
    ValueError when images differ in shape or a side has fewer than 2.
    """
    _check(samples, labels, train, heldout)
    generated, real, unseen = pixel_features(samples), pixel_features(train[0]), pixel_features(heldout[0])
    requested, known, true = labels.cpu().numpy(), train[1].numpy(), heldout[1].numpy()
    num_equal = min(len(generated), len(unseen))
    nearest, nearest_unseen = nearest_distance(generated, real), nearest_distance(unseen, real)
    return Scores(
        num_samples=len(generated),
        num_train=len(real),
        num_heldout=len(unseen),
        num_equal=num_equal,
        accuracy=classifier_accuracy(real, known, generated, requested),
        accuracy_heldout=classifier_accuracy(real, known, unseen, true),
        frechet=frechet_distance(generated, real),
        frechet_equal=frechet_distance(_subset(generated, num_equal), real),
        frechet_equal_heldout=frechet_distance(_subset(unseen, num_equal), real),
        nearest=float(np.median(nearest)),
        nearest_heldout=float(np.median(nearest_unseen)),
        closest_share=float((nearest < np.quantile(nearest_unseen, 0.01)).mean()),
        capacity=capacity.average(),
        capacity_per_step=() if capacity.is_empty else tuple(capacity.per_step().tolist()),
    )


def _subset(features: Features, count: int) -> Features:
    """`count` of the rows, spread evenly by chance whatever their order by class; always the same ones."""
    return features[np.sort(np.random.default_rng(0).permutation(len(features))[:count])]


def check_real(num_samples: int, shape: tuple[int, ...], sides: dict[str, Images]) -> None:
    """Raise ConfigError, before anything is sampled, unless samples of this number and shape can be scored against
    these real images.
    """
    if find_spec("sklearn") is None:
        raise ConfigError("scores need scikit-learn, which is not installed: pip install 'diffmoe_ep[eval]'")
    for name, (images, _) in sides.items():
        if tuple(images.shape[1:]) != shape:
            raise ConfigError(
                f"{name} holds images of shape {tuple(images.shape[1:])}, the model draws {shape}; name the data it "
                "was trained on"
            )
        if len(images) < 2:
            raise ConfigError(f"{name} holds {len(images)} images; scores need at least 2")
    if num_samples < 2:
        raise ConfigError(f"--samples is {num_samples}; scores need at least 2")


def _check(samples: Tensor, labels: Tensor, train: Images, heldout: Images) -> None:
    sides = {"samples": (samples, labels), "training": train, "held-out": heldout}
    for name, (images, classes) in sides.items():
        if len(images) < 2 or len(images) != len(classes):
            raise ValueError(
                f"{name} images: {len(images)} with {len(classes)} labels; scoring needs at least 2, each with its "
                "label"
            )
        if images.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"{name} images are {tuple(images.shape[1:])} but samples {tuple(samples.shape[1:])}: name the "
                "trained data"
            )
