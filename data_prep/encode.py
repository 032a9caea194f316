"""Samples of a source to what is stored: decoded by threads, encoded in batches by a VAE and text encoders, or kept as
pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from data_prep.image import square
from data_prep.shard import Sample
from data_prep.source import BadSample, Raw, Source
from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.codec import Caption, StoredCondition, encode
from diffmoe_ep.data.manifest import Manifest, TextEncoderInfo
from diffmoe_ep.encoders.text import TextEncoder
from diffmoe_ep.encoders.vae import Vae

AHEAD = 2  # batches whose images are decoded while one is encoded


@dataclass(frozen=True)
class Bad:
    """A sample that was left out."""

    place: str  # in the source
    reason: str


@dataclass(frozen=True)
class Encoding:
    """How images and captions are stored."""

    image_size: int  # side of the square crop
    flips: int = 1  # 2: the mirror image is encoded too
    vae: Vae | None = None  # None: pixels are stored
    text: tuple[TextEncoder, ...] = ()  # encoders of the captions
    batch: int = 32  # images encoded together
    readers: int = 8  # threads that read and decode images

    def manifest(self, source: Source, name: str, licence: str, channels: int = 3) -> Manifest:
        """The manifest without shards; ConfigError where the options do not go together."""
        if self.text and source.condition == "class":
            raise ConfigError("this source has labels, no captions; leave --t5 and --clip away")
        if self.vae is None and self.flips == 2:
            raise ConfigError("--flips 2 is for latents (--vae); pixels are mirrored when they are read")
        if self.vae is not None and self.image_size % self.vae.factor:
            raise ConfigError(
                f"--image-size {self.image_size} is not a multiple of {self.vae.factor}, the side that the VAE makes "
                "one of"
            )
        if self.vae is not None and channels != 3:
            raise ConfigError("this source is grey, a VAE needs colours; leave --vae away")
        manifest = Manifest(
            name=name,
            kind="pixels",
            shape=(channels, self.image_size, self.image_size),
            dtype="uint8",
            scale=1 / 127.5,
            shift=-1.0,
            num_classes=len(source.class_names),
            class_names=source.class_names,
            licence=licence,
            flips=self.flips,
            condition=source.condition,
            text=tuple(
                TextEncoderInfo(text.name, text.width, text.max_length, text.precision, text.fingerprint)
                for text in self.text
            ),
            image_size=self.image_size,
            source=source.fingerprint,
        )
        if self.vae is None:
            return manifest
        side = self.image_size // self.vae.factor
        latent = replace(manifest, kind="moments", dtype="float16", shape=(self.vae.channels, side, side))
        return replace(latent, scale=self.vae.scale, shift=self.vae.shift, encoder=self.vae.fingerprint)

    def samples(self, raws: Iterable[Raw], manifest: Manifest, min_side: int) -> Iterator[tuple[Sample | Bad, int]]:
        """For each sample, in order: its key and fields, or why it is left out; and how many of its captions were cut.

        Batches are cut from the first sample on, bad ones included, so the same samples are always encoded in the same
        company.
        """
        iterator = iter(raws)
        ahead: deque[list[tuple[Raw, Future[np.ndarray]]]] = deque()
        with ThreadPoolExecutor(self.readers, thread_name_prefix="decode") as pool:
            while group := list(islice(iterator, self.batch)):
                ahead.append([(raw, pool.submit(self._pixels, raw, min_side)) for raw in group])
                if len(ahead) > AHEAD:
                    yield from self._finish(ahead.popleft(), manifest)
            while ahead:
                yield from self._finish(ahead.popleft(), manifest)

    def _pixels(self, raw: Raw, min_side: int) -> np.ndarray:
        """The square image of a sample, (C, H, W) uint8."""
        if raw.problem or raw.image is None:
            raise BadSample(raw.problem or "no image")
        if isinstance(raw.image, np.ndarray):
            return raw.image
        return square(raw.image(), self.image_size, min_side)

    def _finish(
        self, group: list[tuple[Raw, "Future[np.ndarray]"]], manifest: Manifest
    ) -> Iterator[tuple[Sample | Bad, int]]:
        """Encode one batch."""
        problems: dict[int, str] = {}
        images: dict[int, np.ndarray] = {}
        for number, (_, future) in enumerate(group):
            try:
                images[number] = future.result()
            except BadSample as error:
                problems[number] = str(error)
        arrays = dict(images)
        if self.vae is not None and images:
            moments = self.vae.moments(np.stack(list(images.values())), self.flips)  # (B, flips, 2C, h, w)
            arrays = dict(zip(images, moments, strict=True))
        conditions, cuts = self._conditions({number: group[number][0].condition for number in images})
        for number, (raw, _) in enumerate(group):
            if number in arrays and not np.isfinite(arrays[number]).all():
                problems[number] = "the VAE gave values that are not finite in float16"
            elif number in arrays and any(not np.isfinite(rows).all() for rows in _features(conditions[number])):
                problems[number] = "a text encoder gave values that are not finite in float16"
            if number in problems:
                yield Bad(raw.place, problems[number]), 0
            else:
                yield (raw.key, encode(arrays[number], conditions[number], manifest)), cuts[number]

    def _conditions(
        self, found: dict[int, StoredCondition | None]
    ) -> tuple[dict[int, StoredCondition], dict[int, int]]:
        """The conditions of a batch with the features of their captions, and how many captions of each were cut."""
        conditions: dict[int, StoredCondition] = {
            number: condition for number, condition in found.items() if condition is not None
        }
        cuts = dict.fromkeys(conditions, 0)
        if not self.text:
            return conditions, cuts
        captions = [
            (number, caption) for number, held in conditions.items() if not isinstance(held, int) for caption in held
        ]
        features: list[list[np.ndarray]] = [[] for _ in captions]
        for encoder in self.text:
            for start in range(0, len(captions), self.batch):
                part = captions[start : start + self.batch]
                rows, cut = encoder.features([caption.text for _, caption in part])
                for place, (row, was_cut) in enumerate(zip(rows, cut, strict=True)):
                    features[start + place].append(row)
                    cuts[part[place][0]] += was_cut
        done: dict[int, list[Caption]] = {number: [] for number in conditions}
        for (number, caption), of_caption in zip(captions, features, strict=True):
            done[number].append(replace(caption, features=tuple(of_caption)))
        return {number: tuple(held) for number, held in done.items()}, cuts


def _features(condition: StoredCondition) -> Sequence[np.ndarray]:
    return [] if isinstance(condition, int) else [rows for caption in condition for rows in caption.features]
