"""Source: ImageNet, or any images sorted into a folder per class, as folders or as uncompressed tars (of the classes,
or of it all).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from data_prep import archive
from data_prep.files import ImageFile, archives, image_files, keys, shuffled
from data_prep.source import IMAGE_ENDINGS, Raw, Source, chunks, fingerprint_of
from diffmoe_ep.data.manifest import DataError

LICENCE = "ImageNet: for non-commercial research and education, under the terms of access of image-net.org"


def source(folder: Path, shard_size: int, min_side: int = 1) -> Source:
    """Images and their classes; a class is the folder an image lies in, or the tar, where that has no folders.

    Classes are numbered in the order of their names. Every image of the list is known at once, so that the images can
    be shuffled over all classes before they are cut into shards.
    """
    tars = archives(folder, (".tar",))
    files: Sequence[ImageFile | archive.Member]
    classes: list[str]
    if tars:
        found = [
            member for tar in tars for member in archive.members(tar) if member.name.lower().endswith(IMAGE_ENDINGS)
        ]
        files, classes = found, [PurePosixPath(member.name).parent.name or member.holder for member in found]
    else:
        files = image_files(folder)
        classes = [PurePosixPath(file.name).parent.name for file in files]
    if not files:
        raise DataError(
            f"the tars in {folder} hold no images ({', '.join(IMAGE_ENDINGS)}); give another folder with --source"
        )
    if "" in classes:
        loose = files[classes.index("")].place
        raise DataError(
            f"{folder}: {loose} lies in no class's folder; give a folder of folders, one per class, with --source"
        )
    names = sorted(set(classes))
    labels = {name: label for label, name in enumerate(names)}
    order, runs, key = shuffled(len(files)), chunks(len(files), shard_size), keys([file.name for file in files])

    def read(unit: int) -> Iterator[Raw]:
        for place in runs[unit]:
            number = int(order[place])
            yield Raw(files[number].place, key[number], files[number].read, labels[classes[number]])

    return Source(
        num_units=len(runs),
        read=read,
        fingerprint=fingerprint_of((file.place, file.size) for file in files),
        condition="class",
        num_samples=len(files),
        class_names=tuple(names),
        min_side=min_side,
    )
