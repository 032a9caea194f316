"""The shortest way from a stored sample with a label to its array: for sound bytes in the usual form, which nearly all
are.
"""

import os
from typing import Any

import numpy as np

from diffmoe_ep.data import native
from diffmoe_ep.data.crc import fastest_crc32
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.remote.fetch import Unavailable
from diffmoe_ep.data.sample import decode_label, expected_header
from diffmoe_ep.data.shards import Dataset

NOTHING = [0] * native.REQUEST  # for a sample that shall not be read


class FastReader:
    """Reads as `read_labelled` does, without looking at the values; gives None for whatever is unusual, so that it is
    looked at there.
    """

    def __init__(self, dataset: Dataset) -> None:
        """A dataset with labels."""
        manifest = dataset.manifest
        self._dataset, self._manifest = dataset, manifest
        self._shape = manifest.stored_shape
        self._header, self._dtype, size = expected_header(manifest.dtype, self._shape)
        self._size = len(self._header) + size  # of the array's member
        self._crc32 = fastest_crc32()
        self._labels: dict[bytes, tuple[int, int]] = {}  # those met so far, and the checksum of their bytes
        self._moments: native.Moments | None = None  # made at first use
        self.makes_latents = native.takes(manifest)
        assert manifest.fields == ("cls", f"{manifest.kind}.npy")

    def __call__(self, shard: int, sample: int) -> tuple[Manifest, np.ndarray, int] | None:
        """Manifest, array, label; None where the bytes are bad or spelt in another way; Unavailable if the shard cannot
        be had.
        """
        try:
            opened = self._dataset.opened(shard)
            begin, length, offset, size, crc32, array_offset, array_size, array_crc32 = opened.members[sample].tolist()
            block = os.pread(opened.descriptor, length, begin)
        except Unavailable:
            raise
        except (DataError, OSError):
            return None
        start = array_offset - begin
        if length == 0 or len(block) != length or array_size != self._size or not block.startswith(self._header, start):
            return None
        text = block[offset - begin : offset - begin + size]
        known = self._labels.get(text)
        if known is None:
            try:
                known = self._labels[text] = decode_label({"cls": text}, self._manifest), self._crc32(text)
            except ValueError:
                return None
        if known[1] != crc32 or self._crc32(memoryview(block)[start : start + array_size]) != array_crc32:
            return None
        return self._manifest, np.ndarray(self._shape, self._dtype, block, start + len(self._header)), known[0]

    def request(self, shard: int, sample: int, mirrored: bool) -> list[int]:
        """How `native.read_latents` is asked for a sample, where `makes_latents`; Unavailable if the shard cannot be
        had.
        """
        try:
            opened = self._dataset.opened(shard)
        except Unavailable:
            raise
        except DataError:
            return NOTHING
        if self._moments is None:
            self._moments = native.Moments(self._manifest)
        return [self._moments.address, opened.descriptor, mirrored, *opened.members[sample].tolist()]

    @property
    def released(self) -> int:
        """How many shards were closed so far: as long as it stays the same, descriptors are those of their shards."""
        return self._dataset.released

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_moments": None}
