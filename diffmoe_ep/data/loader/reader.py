"""From the place of a stored sample to its values and its condition: fast if it is usual, checked if not, another
sample if its bytes are bad.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.checked import named, read_chosen, read_labelled
from diffmoe_ep.data.codec import Caption, check_finite
from diffmoe_ep.data.latent import oriented
from diffmoe_ep.data.loader.fast_reader import FastReader
from diffmoe_ep.data.loader.quarantine import Fault
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.mixture import MixedOrder, Place
from diffmoe_ep.data.remote.fetch import LONGEST_PAUSE, Unavailable
from diffmoe_ep.data.sources import SampleStore


@dataclass(frozen=True)
class RawSample:
    """What was read of a stored sample."""

    manifest: Manifest  # of its dataset
    values: np.ndarray  # as stored, finite: pixels (C, H, W) or moments (2C, H, W), mirrored where that was requested
    condition: int | Caption  # its label, or the one of its captions that is taken
    faults: tuple[Fault, ...] = ()  # bad samples in whose place it stands


class Reader:
    """Reads stored samples for one rank's batches, one at a time."""

    def __init__(
        self, stores: Sequence[SampleStore], order: MixedOrder, text: CaptionSpec | None, retries: int, tolerant: bool
    ) -> None:
        """retries: further attempts at a shard that cannot be had. tolerant: another sample takes the place of a bad
        one.
        """
        self._stores, self._order, self._text = stores, order, text
        self._retries, self._tolerant = retries, tolerant
        self._fast = [FastReader(store) if FastReader.supports(store) else None for store in stores]

    def read(self, place: Place, position: int, flipped: bool, pick: float) -> RawSample:
        """The sample at a place or, if its bytes are bad, the first sound substitute of its position.

        pick: which of its captions is taken, from 0 to 1. DataError if nothing can stand in for it, Unavailable if its
        shard cannot be had.
        """
        try:
            return self._patiently(place, flipped, pick)
        except Unavailable:
            raise
        except DataError as error:
            if not self._tolerant:
                raise
            return self._substitute(place, position, flipped, pick, error)

    def _patiently(self, place: Place, flipped: bool, pick: float, substitute: bool = False) -> RawSample:
        """A stored sample; a shard that cannot be had is requested again, since who passed over it would change the
        order.
        """
        store = self._stores[place.dataset]
        for attempt in itertools.count():
            try:
                return self._once(place, flipped, pick, substitute)
            except Unavailable as error:
                if attempt == self._retries or store.is_remote:  # a remote store has retried already
                    raise
                pause = min(2**attempt, LONGEST_PAUSE)
                message = f"{error}; asking again in {pause:g} s ({attempt + 1} of {self._retries})"
                print(message, file=sys.stderr, flush=True)
            store.close()  # a descriptor may be stale
            time.sleep(pause)
        raise AssertionError  # the count has no end

    def _once(self, place: Place, flipped: bool, pick: float, substitute: bool) -> RawSample:
        """The fast way or, for what it skips, the checked one. Of a substitute all values are looked at, of others
        those that are used.
        """
        store, fast = self._stores[place.dataset], self._fast[place.dataset]
        manifest = store.manifest
        if fast is not None and not substitute and (found := fast.read(place.shard, place.sample, flipped)) is not None:
            return RawSample(manifest, *found)
        condition: int | Caption
        if self._text is None:
            array, condition = read_labelled(store, place.shard, place.sample, finite=substitute)
        else:
            array, condition = read_chosen(store, place.shard, place.sample, self._text, pick, finite=substitute)
        values = oriented(array, manifest, flipped)
        try:
            check_finite(values, f"{manifest.kind}.npy")
        except ValueError as error:
            raise named(error, store, place.shard, place.sample) from error
        return RawSample(manifest, values, condition)

    def _substitute(self, place: Place, position: int, flipped: bool, pick: float, bad: DataError) -> RawSample:
        """The first substitute of a bad sample that is not bad too."""
        tried = 0
        for other in self._order.substitutes(position):
            tried += 1
            try:
                found = self._patiently(other, flipped, pick, substitute=True)
            except Unavailable:
                raise
            except DataError:
                continue
            fault = Fault(*self._address(place), str(bad), position, ", ".join(self._address(other)))
            return RawSample(found.manifest, found.values, found.condition, (fault,))
        raise DataError(
            f"{bad}; and none of {tried} other samples of its shuffle block can stand in for it, they are bad too"
        ) from bad

    def _address(self, place: Place) -> tuple[str, str]:
        return self._stores[place.dataset].address(place.shard, place.sample)
