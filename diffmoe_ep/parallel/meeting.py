"""Where ranks meet before they have a process group: a store at the first rank (or at torchrun), where each says what
the others shall know.

A process group joins every rank with every other, and a pair that cannot reach each other keeps all waiting. Here each
only has to reach the store, and who does not come in time is known by number.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, Self

import torch.distributed as dist

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.joining import open_store
from diffmoe_ep.parallel.mesh import launched_place, launched_rank, launched_world

GRACE_SECONDS = 5.0  # what the first rank gets to tell the others who is missing


class Meeting:
    """All launched ranks at one store. Calls are made by every rank, in the same order."""

    def __init__(self, store: dist.Store, rank: int, world: int, seconds: float) -> None:
        self.store, self.rank, self.world, self.seconds = store, rank, world, seconds
        self.calls = 0
        self.expected = list(range(world))  # who once did not come is not waited for again

    @classmethod
    def join(cls, seconds: float) -> Self:
        """Come to MASTER_ADDR:MASTER_PORT; ConfigError, on this rank alone, where that cannot be done in some
        seconds.
        """
        world, rank = launched_world(), launched_rank()
        if world == 1:
            return cls(dist.HashStore(), 0, 1, seconds)
        patience = f"{seconds:g} seconds (--timeout-seconds)"
        store = open_store(launched_place(), world, rank, seconds, patience)
        number = store.add(f"meetings/{rank}", 1)  # a later meeting at the same store is another one
        return cls(dist.PrefixStore(f"meeting/{number}", store), rank, world, seconds)

    def gather(self, value: Any, seconds: float | None = None) -> dict[int, Any]:
        """Give every rank what each rank says, by rank; who has not come after some seconds is missing. Values are what
        JSON holds.
        """
        key = self._say(value)
        if self.rank == 0:
            found = self._collected(key, seconds or self.seconds)
            self.store.set(key, json.dumps(sorted(found.items())))
        else:
            self._wait([key], (seconds or self.seconds) + GRACE_SECONDS)
            found = dict(json.loads(self.store.get(key)))
            if self.rank not in found:
                raise ConfigError(f"rank {self.rank} came later than the others waited; see what rank 0 says")
        return found

    def collect(self, value: Any, seconds: float | None = None) -> dict[int, Any]:
        """Give the first rank what each rank says, as `gather`; the others nothing."""
        key = self._say(value)
        return self._collected(key, seconds or self.seconds) if self.rank == 0 else {}

    def peek(self) -> dict[int, Any]:
        """What the others have said already in the call that this rank has not come to."""
        keys = {rank: f"{self.calls + 1}/{rank}" for rank in self.expected}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def part(self) -> None:
        """Leave, the first rank last: the store is its own."""
        self.collect(None)

    def _say(self, value: Any) -> str:
        self.calls += 1
        self.store.set(f"{self.calls}/{self.rank}", json.dumps(value))
        return str(self.calls)

    def _collected(self, key: str, seconds: float) -> dict[int, Any]:
        keys = {rank: f"{key}/{rank}" for rank in self.expected}
        if not self._came(list(keys.values()), seconds):
            keys = {rank: one for rank, one in keys.items() if self.store.check([one])}
        self.expected = list(keys)
        return {rank: json.loads(self.store.get(one)) for rank, one in keys.items()}

    def _came(self, keys: Sequence[str], seconds: float) -> bool:
        """Whether all of these are there in time. By asking again and again: a store that is told to wait for them
        warns of each that does not come.
        """
        deadline, pause = time.monotonic() + seconds, 0.01
        while not self.store.check(list(keys)):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(1.5 * pause, 0.25)
        return True

    def _wait(self, keys: Sequence[str], seconds: float) -> None:
        try:
            came = self._came(keys, seconds)
        except dist.DistNetworkError as error:
            raise ConfigError(f"rank {self.rank} lost rank 0, which has ended; see what rank 0 says") from error
        if not came:
            raise ConfigError(f"rank {self.rank} heard nothing of rank 0 in {seconds:g} s; see what rank 0 says")
