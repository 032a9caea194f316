"""What a stream reads from: stores of single samples, and sources that batches are made of."""

from collections.abc import Sequence
from typing import Protocol

from diffmoe_ep.data.manifest import Manifest

Content = bytes | memoryview  # of a member


class SampleStore(Protocol):
    """Stored samples, read one by one by shard and number: `shards.Dataset`, or samples made up for a check."""

    @property
    def name(self) -> str:
        """What it is called in logs and messages."""

    @property
    def manifest(self) -> Manifest:
        """What its samples are."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard, in storage order."""

    @property
    def fingerprint(self) -> str:
        """Hash of what is stored."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Damage that was seen and tolerated when it was opened."""

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read; the store itself then asks again for what fails."""

    def read(self, shard: int, sample: int, fields: Sequence[str] | None = None) -> dict[str, Content]:
        """The bytes of a sample's fields, of all or of some; DataError when they are damaged, Unavailable when the file
        cannot be had.
        """

    def address(self, shard: int, sample: int) -> tuple[str, str]:
        """Path or URL of the shard, and the sample's key, for messages."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background, in this order, if they are remote."""

    def close(self) -> None:
        """Close what is held open; reading opens it again."""


class BatchSource(Protocol):
    """What `mixture.Mixture` (indexed datasets) and `loader.resampled.PlainTars` have in common; a `Stream` reads these
    two.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """What each dataset is called in logs and messages."""

    @property
    def manifest(self) -> Manifest:
        """What all samples have in common, as the first dataset's manifest says it."""

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Of each dataset."""

    @property
    def fingerprint(self) -> str:
        """Hash of what is stored and how it is mixed."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Damage that was seen and tolerated when the datasets were opened."""

    def close(self) -> None:
        """Close what is held open; reading opens it again."""
