"""Source: JourneyDB, as it is published: archives of images (000.tgz, 001.tgz, ...) and one file with a JSON line for
each image.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data_prep import archive
from data_prep.files import archives
from data_prep.source import IMAGE_ENDINGS, BadSample, Raw, Source, fingerprint_of
from data_prep.text_image import fit_caption
from diffmoe_ep.data.codec import Caption
from diffmoe_ep.data.manifest import DataError

LICENCE = "JourneyDB: for non-commercial research, under its terms of use and those of Midjourney; journeydb.github.io"
Texts = tuple[str | None, str | None]  # prompt, caption


def source(
    folder: Path,
    annotations: Path,
    rank: int,
    world: int,
    prompt_weight: float = 1.0,
    caption_weight: float = 1.0,
    min_side: int = 1,
) -> Source:
    """Images with the prompt that made them and a caption; each archive is a unit.

    The lines of this rank's archives are held in memory from the first unit on (a few hundred bytes for each image).
    """
    if min(prompt_weight, caption_weight) < 0 or max(prompt_weight, caption_weight) == 0:
        raise DataError(
            f"weights {prompt_weight} and {caption_weight}: expected 0 or more, and not both 0; --prompt-weight, "
            "--caption-weight"
        )
    tars = archives(folder, archive.ENDINGS)
    if not tars:
        raise DataError(
            f"{folder} holds no archives ({', '.join(archive.ENDINGS)}); give JourneyDB's folder of image archives "
            "with --source"
        )
    if not annotations.is_file():
        raise DataError(
            f"{annotations} is not a file; give JourneyDB's file of JSON lines with --annotations, unpacked"
        )
    own = {archive.stem_of(tar.name) for tar in tars[rank::world]}
    held: list[dict[str, Texts]] = []

    def read(unit: int) -> Iterator[Raw]:
        if not held:
            held.append(read_annotations(annotations, own))
        return _read_archive(tars[unit], unit, held[0], (prompt_weight, caption_weight))

    files = [annotations, *tars]
    return Source(
        num_units=len(tars),
        read=read,
        fingerprint=fingerprint_of(
            [
                *((path.name, path.stat().st_size) for path in files),
                (f"{float(prompt_weight)} {float(caption_weight)}", 0),
            ]
        ),
        condition="text",
        cut=True,
        min_side=min_side,
    )


def read_annotations(path: Path, holders: Collection[str]) -> dict[str, Texts]:
    """Prompt and caption of the images in some archives, by ARCHIVE/IMAGE; DataError names a line that is not as it
    should be.
    """
    try:
        with path.open("rb") as file:
            return dict(_parsed(path, file, holders))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a readable file with --annotations"
        ) from error


def _parsed(path: Path, file: BinaryIO, holders: Collection[str]) -> Iterator[tuple[str, Texts]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            image = content["img_path"]
            task = content.get("Task2") or {}
            texts = (content.get("prompt"), task.get("Caption"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: is no annotation with an img_path ({error!r}); fetch the file again"
            ) from error
        if not isinstance(image, str):
            raise DataError(f"{path}, line {number}: img_path is {image!r}, expected a text; fetch the file again")
        place = PurePosixPath(image)
        if place.parent.name in holders:
            yield f"{place.parent.name}/{place.name}", texts


def _read_archive(path: Path, unit: int, annotations: dict[str, Texts], weights: tuple[float, float]) -> Iterator[Raw]:
    number = 0
    try:
        for name, content in archive.stream(path):
            image = PurePosixPath(name)
            if not image.name.lower().endswith(IMAGE_ENDINGS):
                continue
            place, key = f"{path.name}:{name}", f"{unit:06d}-{number:06d}"
            number += 1
            try:
                if content is None:
                    raise BadSample(f"more than {archive.MAX_MEMBER:,} bytes")
                texts = annotations.get(f"{archive.stem_of(path.name)}/{image.name}")
                if texts is None:
                    raise BadSample("no annotation line")
                captions = _captions(texts, weights)
            except BadSample as error:
                yield Raw(place, key, None, None, str(error))
            else:
                yield Raw(place, key, lambda content=content: content, captions)  # type: ignore[misc]
    except archive.DamagedArchive as error:
        yield Raw(path.name, f"{unit:06d}-{number:06d}", None, None, str(error))


def _captions(texts: Texts, weights: tuple[float, float]) -> tuple[Caption, ...]:
    """Prompt and caption with their weights, those that are there; BadSample if neither is."""
    found = []
    for text, weight in zip(texts, weights, strict=True):
        if weight > 0 and isinstance(text, str) and text.strip():
            found.append(Caption(fit_caption(text), weight))
    if not found:
        raise BadSample("neither prompt nor caption")
    return tuple(found)
