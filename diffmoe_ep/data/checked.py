"""Stored samples read one by one, everything about them checked; DataError names shard and key."""

import numpy as np

from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.codec import Caption, StoredCondition, decode, decode_array, decode_caption, decode_label
from diffmoe_ep.data.manifest import REMEDY, DataError
from diffmoe_ep.data.sources import SampleStore


def read_sample(store: SampleStore, shard: int, sample: int) -> tuple[np.ndarray, StoredCondition]:
    """Stored array and condition of a stored sample; DataError names shard and key."""
    fields = store.read(shard, sample)
    try:
        return decode(fields, store.manifest)
    except ValueError as error:
        raise named(error, store, shard, sample) from error


def read_labelled(store: SampleStore, shard: int, sample: int, finite: bool = True) -> tuple[np.ndarray, int]:
    """As `read_sample`, of a store with labels; `finite`: look at the array's values."""
    fields, manifest = store.read(shard, sample), store.manifest
    try:
        return decode_array(fields, manifest, finite), decode_label(fields, manifest)
    except ValueError as error:
        raise named(error, store, shard, sample) from error


def read_chosen(
    store: SampleStore, shard: int, sample: int, text: CaptionSpec, pick: float, finite: bool = True
) -> tuple[np.ndarray, Caption]:
    """Stored array and one caption, by weight for `pick` from 0 to 1, of a sample; DataError names shard and key.

    finite: look at the array's values; those of the caption's features are looked at in any case.
    """
    manifest = store.manifest
    fields = store.read(shard, sample, text.members(manifest))
    try:
        return decode_array(fields, manifest, finite), decode_caption(fields, manifest, text.stored(manifest), pick)
    except ValueError as error:
        raise named(error, store, shard, sample) from error


def named(error: ValueError, store: SampleStore, shard: int, sample: int) -> DataError:
    """What is wrong with a sample's content, with its shard and key."""
    return DataError(f"{', key '.join(store.address(shard, sample))}: {error}; {REMEDY}")
