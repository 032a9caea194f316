"""The shortest way from a stored sample with a label to its array: for sound bytes in the usual form, which nearly all
are.
"""

import os
from typing import TypeGuard

import numpy as np

from diffmoe_ep.data.codec import all_finite, decode_label, expected_header
from diffmoe_ep.data.latent import oriented
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.remote.fetch import Unavailable
from diffmoe_ep.data.shards import Dataset, fastest_crc32
from diffmoe_ep.data.sources import SampleStore


class FastReader:
    """Reads what `checked.read_labelled` reads, faster; skips whatever is unusual, which is looked at there."""

    def __init__(self, dataset: Dataset) -> None:
        """dataset: one that is supported."""
        manifest = dataset.manifest
        self._dataset, self._manifest = dataset, manifest
        self._shape = manifest.stored_shape
        self._header, self._dtype, size = expected_header(manifest.dtype, self._shape)
        self._size = len(self._header) + size  # of the array's member
        self._crc32 = fastest_crc32()
        self._labels: dict[bytes, tuple[int, int]] = {}  # those met so far, and the checksum of their bytes

    @staticmethod
    def supports(store: SampleStore) -> TypeGuard[Dataset]:
        """Whether a store's samples are such as it reads: of tars with an index, with labels."""
        return isinstance(store, Dataset) and store.manifest.condition == "class"

    def read(self, shard: int, sample: int, flipped: bool) -> tuple[np.ndarray, int] | None:
        """The `oriented` array and the label; None for bytes that are damaged or spelt in another way, or values that
        are not finite. Unavailable if the shard cannot be had.
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
        if text not in self._labels:
            try:
                self._labels[text] = decode_label({"cls": text}, self._manifest), self._crc32(text)
            except ValueError:
                return None
        label, label_crc32 = self._labels[text]
        if label_crc32 != crc32 or self._crc32(memoryview(block)[start : start + array_size]) != array_crc32:
            return None
        array: np.ndarray = np.ndarray(self._shape, self._dtype, block, start + len(self._header))
        values = oriented(array, self._manifest, flipped)
        return (values, label) if all_finite(values) else None
