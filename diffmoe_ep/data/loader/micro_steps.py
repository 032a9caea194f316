"""The work behind a stream, done in its worker processes: from the number of a micro-step to a rank's Batch of it."""

import itertools
import sys
import time
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from diffmoe_ep.data import native
from diffmoe_ep.data.captions import read_chosen
from diffmoe_ep.data.loader.assemble import Assembler, Stored
from diffmoe_ep.data.loader.fast_reader import NOTHING, FastReader
from diffmoe_ep.data.loader.quarantine import Fault
from diffmoe_ep.data.manifest import REMEDY, DataError
from diffmoe_ep.data.mixture import MixedOrder, Mixture, Place
from diffmoe_ep.data.remote.fetch import LONGEST_PAUSE, Unavailable
from diffmoe_ep.data.sample import Batch, read_labelled
from diffmoe_ep.data.shards import Dataset

Result = tuple[Batch, tuple[Fault, ...]] | DataError


class MicroSteps(TorchDataset["Result"]):
    """Micro-step number -> this rank's Batch and the bad samples met; or a DataError, which would arrive as a traceback
    if raised.
    """

    def __init__(
        self,
        mixture: Mixture,
        order: MixedOrder,
        assembler: Assembler,
        micro_step_size: int,
        rows: range,
        retries: int,
        substitute: bool,
    ) -> None:
        """micro_step_size: samples of a micro-step over all ranks; rows: this rank's of them; retries: for shards that
        cannot be had.

        substitute: whether another sample takes the place of one whose bytes are bad.
        """
        self._mixture = mixture
        self.order = order
        self._assembler = assembler
        self._micro_step_size = micro_step_size
        self._rows = rows
        self._retries = retries
        self._substitute = substitute
        self._quick: dict[int, FastReader] = {}  # for datasets with labels
        if assembler.text is None:
            self._quick = {
                number: FastReader(part) for number, part in enumerate(mixture.parts) if isinstance(part, Dataset)
            }
        self._makes_latents = len(self._quick) == len(mixture.parts) and all(
            quick.makes_latents for quick in self._quick.values()
        )
        latents = [part.manifest.kind == "moments" for part in mixture.parts] if self._quick else []
        self.slow = native.problem() if any(latents) else None  # why latents are not made by native code
        self._ahead: dict[
            int, dict[int, tuple[int, list[int]]]
        ] = {}  # dataset -> lane -> its latest block and the shards to be fetched

    def __getitem__(self, micro_step: int) -> Result:
        first = micro_step * self._micro_step_size
        positions = range(first + self._rows.start, first + self._rows.stop)
        self._fetch_ahead(positions)
        faults: list[Fault] = []
        places = self.order.places(positions)

        def other(row: int) -> Stored:
            part, place = self._mixture.parts[places[row].dataset], places[row]
            where, field = part.where(place.shard, place.sample), f"{part.manifest.kind}.npy"
            return self._other(
                place, positions[row], faults, DataError(f"{where}: {field} holds values that are not finite; {REMEDY}")
            )

        failed: dict[int, Unavailable] = {}  # rows that could not be had at the first attempt

        def stored(row: int) -> Stored:
            place, error = places[row], failed.pop(row, None)
            quick, found = self._quick.get(place.dataset), None
            try:
                found = None if quick is None or error is not None else quick(place.shard, place.sample)
            except Unavailable as first_error:
                error = first_error
            return found or self._stored(place, positions[row], faults, error)

        def at_once(first: int, mirrored: Sequence[bool], latents: np.ndarray) -> list[int]:
            requests: list[int] = []
            before = [quick.released for quick in self._quick.values()]
            for row, flip in enumerate(mirrored, first):
                place = places[row]
                try:
                    requests += self._quick[place.dataset].request(place.shard, place.sample, flip)
                except Unavailable as error:
                    failed[row] = error
                    requests += NOTHING
            if [
                quick.released for quick in self._quick.values()
            ] != before:  # a descriptor may be closed again, or another file's
                return [-1] * len(mirrored)
            return native.read_latents(requests, latents)

        quickly = at_once if self._makes_latents else None
        try:
            return self._assembler.batch(positions, self._mixture.manifest, stored, other, quickly), tuple(faults)
        except DataError as error:
            return error

    def _fetch_ahead(self, positions: range) -> None:
        """Have the shards of the positions' blocks and of the blocks that follow fetched, if they are remote and not
        those of before.
        """
        if all(part.remote is None for part in self._mixture.parts):
            return
        for dataset, blocks in self.order.shards_ahead(positions).items():
            if self._mixture.parts[dataset].remote is None:
                continue
            known = self._ahead.setdefault(dataset, {})
            latest = {lane: (first, shards) for (lane, first), shards in blocks.items()}
            if any(known.get(lane) != block for lane, block in latest.items()):
                known.update(latest)
                wanted = [*blocks.values(), *(shards for _, shards in known.values())]
                self._mixture.parts[dataset].prefetch(
                    list(dict.fromkeys(shard for shards in wanted for shard in shards))
                )

    def _stored(self, place: Place, position: int, faults: list[Fault], failed: Unavailable | None) -> Stored:
        """The stored sample of a position or, if its bytes are bad, another; failed: why it could not be had at the
        first attempt.
        """
        try:
            return self._read(place, position, failed=failed)
        except Unavailable:
            raise
        except DataError as error:
            return self._other(place, position, faults, error)

    def _other(self, place: Place, position: int, faults: list[Fault], bad: DataError) -> Stored:
        """The first substitute of a bad sample that is not bad too."""
        if not self._substitute:
            raise bad
        tried = 0
        for other in self.order.substitutes(position):
            tried += 1
            try:
                stored = self._read(other, position, finite=True)
            except Unavailable:
                raise
            except DataError:
                continue
            faults.append(Fault(*self._names(place), str(bad), position, ", ".join(self._names(other))))
            return stored
        raise DataError(
            f"{bad}; and none of {tried} other samples of its shuffle block can stand in for it, they are bad too"
        ) from bad

    def _read(self, place: Place, position: int, finite: bool = False, failed: Unavailable | None = None) -> Stored:
        """A stored sample; a shard that cannot be had is asked for again, since who passed over it would change the
        order.
        """
        part, text = self._mixture.parts[place.dataset], self._assembler.text
        for attempt in itertools.count():
            try:
                if failed is not None and attempt == 0:
                    raise failed
                if text is None:
                    return part.manifest, *read_labelled(part, place.shard, place.sample, finite)
                return part.manifest, *read_chosen(
                    part, place.shard, place.sample, text, self._assembler.pick(position), finite
                )
            except Unavailable as error:
                if (
                    attempt == self._retries or part.remote is not None
                ):  # a remote shard has been asked for again already
                    raise
                pause = min(2**attempt, LONGEST_PAUSE)
                print(
                    f"{error}; asking again in {pause:g} s ({attempt + 1} of {self._retries})",
                    file=sys.stderr,
                    flush=True,
                )
            part.close()  # a descriptor may be stale
            time.sleep(pause)
        raise AssertionError  # the count has no end

    def _names(self, place: Place) -> tuple[str, str]:
        """Shard and key of a stored sample; its number, if the index is bad as well."""
        part = self._mixture.parts[place.dataset]
        try:
            key = part.key(place.shard, place.sample)
        except DataError:
            key = f"number {place.sample}"
        return part.place(part.manifest.shards[place.shard].name), key
