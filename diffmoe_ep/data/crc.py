"""The checksum of stored members: zlib's crc32, from whichever library computes it fastest."""

import zlib
from collections.abc import Callable
from functools import cache


@cache
def fastest_crc32() -> Callable[[bytes | memoryview], int]:
    """isal's crc32 where that is installed, which takes a tenth of the time; else zlib's. The numbers are the same."""
    try:
        from isal import isal_zlib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return zlib.crc32
    crc32: Callable[[bytes | memoryview], int] = isal_zlib.crc32
    return crc32
