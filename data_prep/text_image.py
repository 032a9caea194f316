"""Source: images with captions, as img2dataset's tars (KEY.jpg, KEY.txt, KEY.json), taken as they are, or as a folder
of such files.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath

from data_prep import archive
from data_prep.files import archives, image_files, keys, read_file, shuffled
from data_prep.source import IMAGE_ENDINGS, BadSample, Raw, Source, chunks, fingerprint_of
from diffmoe_ep.data.codec import Caption

LICENCE = "images and captions from the web: the rights lie with their authors"


def source(folder: Path, shard_size: int, min_side: int) -> Source:
    """Images and captions: each tar a unit, or the files of a folder, shuffled and cut into shards."""
    tars = archives(folder, archive.ENDINGS)
    return _of_archives(tars, min_side) if tars else _of_files(folder, shard_size, min_side)


def _of_archives(tars: list[Path], min_side: int) -> Source:
    return Source(
        num_units=len(tars),
        read=lambda unit: _read_archive(tars[unit], unit),
        fingerprint=fingerprint_of((path.name, path.stat().st_size) for path in tars),
        condition="text",
        cut=True,
        min_side=min_side,
    )


def _read_archive(path: Path, unit: int) -> Iterator[Raw]:
    """The samples of a tar: neighbouring files whose names are the same up to the first dot."""
    damage: list[str] = []

    def files() -> Iterator[tuple[str, str, bytes | None]]:
        try:
            for name, content in archive.stream(path):
                head, _, ending = PurePosixPath(name).name.partition(".")
                yield f"{PurePosixPath(name).parent}/{head}", ending.lower(), content
        except archive.DamagedArchive as error:
            damage.append(str(error))

    number = 0
    for number, (stem, group) in enumerate(groupby(files(), key=lambda file: file[0]), start=1):
        members = {ending: content for _, ending, content in group}
        place = f"{path.name}:{stem.removeprefix('./')}"
        key = f"{unit:06d}-{number - 1:06d}"
        image = next((members[ending[1:]] for ending in IMAGE_ENDINGS if members.get(ending[1:]) is not None), None)
        try:
            if image is None:
                raise BadSample("no image")
            captions = (
                Caption(caption_of({ending: content for ending, content in members.items() if content is not None})),
            )
        except BadSample as error:
            yield Raw(place, key, None, None, str(error))
        else:
            yield Raw(place, key, lambda image=image: image, captions)  # type: ignore[misc]
    if damage:
        yield Raw(path.name, f"{unit:06d}-{number:06d}", None, None, damage[0])


def caption_of(members: Mapping[str, bytes]) -> str:
    """The caption of a sample, from its txt or else the `caption` of its json; BadSample if there is none."""
    text: object = None
    try:
        if "txt" in members:
            text = members["txt"].decode()
        elif "json" in members:
            content = json.loads(members["json"])
            text = content.get("caption") if isinstance(content, dict) else None
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the caption does not decode ({error})") from error
    return fit_caption(text)


def fit_caption(text: object) -> str:
    """A caption without white space around it; BadSample if it is none."""
    if not isinstance(text, str) or not text.strip():
        raise BadSample("no caption")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadSample("the caption is no Unicode text")
    return text.strip()


def _of_files(folder: Path, shard_size: int, min_side: int) -> Source:
    files = image_files(folder)
    order, runs, key = shuffled(len(files)), chunks(len(files), shard_size), keys([file.name for file in files])

    def read(unit: int) -> Iterator[Raw]:
        for place in runs[unit]:
            number = int(order[place])
            file = files[number]
            beside = {ending: file.path.with_suffix(f".{ending}") for ending in ("txt", "json")}
            members = {ending: read_file(path) for ending, path in beside.items() if path.exists()}
            try:
                captions = (Caption(caption_of(members)),)
            except BadSample as error:
                yield Raw(file.place, key[number], None, None, str(error))
            else:
                yield Raw(file.place, key[number], file.read, captions)

    return Source(
        num_units=len(runs),
        read=read,
        fingerprint=fingerprint_of((file.place, file.size) for file in files),
        condition="text",
        num_samples=len(files),
        min_side=min_side,
    )
