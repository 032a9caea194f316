"""Stored moments to latents by native code (`moments.cpp`): half the time of NumPy and torch, and the same numbers to
the bit.

It is built at first use, which takes a second and a C++ compiler, and kept in ~/.cache/diffmoe_ep.
Without compiler, or on a processor without AVX2, `problem` tells why, and the work is done as `draw.Latents` does it.
"""

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.sample import deviation, expected_header

SOURCE = Path(__file__).with_name("moments.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
)  # no fused multiply-add: it rounds once where NumPy rounds twice
REQUEST = 11  # numbers that say which sample is wanted
AROUND = 1 << 15  # bytes of a sample beside its array, at most; one with more is read in another way
COMPILERS = ("c++", "g++", "clang++")
LONGEST_BUILD = 120  # seconds


class _Facts(ctypes.Structure):
    _fields_ = (
        ("header", ctypes.c_char_p),
        ("header_size", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("flips", ctypes.c_uint64),
        ("deviation", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("classes", ctypes.c_int64),
        ("bytes", ctypes.c_void_p),
        ("room", ctypes.c_int64),
    )


class Moments:
    """Makes latents of the float16 moments of one dataset."""

    def __init__(self, manifest: Manifest) -> None:
        """Where `takes(manifest)`."""
        library = _library()
        assert isinstance(library, ctypes.CDLL), library
        header, _, size = expected_header(manifest.dtype, manifest.stored_shape)
        room, table = ctypes.create_string_buffer(len(header) + size + AROUND), _deviations()
        self._kept = (header, room, table)  # which the facts point to
        self._facts = _Facts(
            header, len(header), math.prod(manifest.shape), manifest.flips, table.ctypes.data, manifest.scale, manifest.shift,
            manifest.num_classes, ctypes.addressof(room), len(room),
        )  # fmt: skip
        self.address = ctypes.addressof(self._facts)
        self._sample = library.sample_latent

    def sample(self, moments: np.ndarray, latent: np.ndarray) -> bool:
        """Make the latent of moments (2C, H, W) in the place of standard normal numbers (C, H, W) float32; False, these
        untouched, where they are not finite.
        """
        assert moments.flags.c_contiguous and latent.flags.c_contiguous
        return bool(self._sample(self.address, moments.ctypes.data, latent.ctypes.data))


def read_latents(requests: Sequence[int], latents: np.ndarray) -> list[int]:
    """Read samples and make their latents in the place of standard normal numbers (samples, C, H, W) float32.

    requests: `REQUEST` numbers for each, one after the other: the address of its dataset's `Moments`, or 0 for what is
    not read; the file's descriptor; whether it is mirrored; where what is read begins, and its length; offset, size and
    crc32 of the label's member and of the array's. Gives the labels, or -1, with the numbers untouched, where anything
    is unusual: the file cannot be read, another header, another checksum, values that are not finite.
    """
    number = len(latents)
    assert len(requests) == REQUEST * number and latents.flags.c_contiguous
    library, labels = _library(), (ctypes.c_int64 * number)()
    assert isinstance(library, ctypes.CDLL), library
    wanted = array("q", requests)
    library.read_latents(wanted.buffer_info()[0], number, latents[0].size, latents.ctypes.data, labels)
    return list(labels)


def takes(manifest: Manifest) -> bool:
    """Whether a dataset's samples are such as `Moments` reads, and it can be had."""
    return manifest.kind == "moments" and manifest.dtype == "float16" and problem() is None


def problem() -> str | None:
    """Why there is no native code here, or None."""
    found = _library()
    return None if isinstance(found, ctypes.CDLL) else found


@cache
def _deviations() -> np.ndarray:
    """The posterior's deviation (65536,) float32 by the bits of its stored log-variance; that of NaN and infinities is
    never used.
    """
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(deviation(np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)))


@cache
def _library() -> ctypes.CDLL | str:
    """The library, built if that was not done before, or why there is none."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no place to keep it, no home, no compiler
        return str(error)
    if not library.usable():
        return "the processor has no AVX2, or is no x86"
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.read_latents.argtypes, library.read_latents.restype = (address, number, number, address, address), None
    library.sample_latent.argtypes = (address, address, address)
    library.checksum.argtypes, library.checksum.restype = (ctypes.c_char_p, ctypes.c_uint64), ctypes.c_uint32
    return library


class _Missing(RuntimeError):
    pass


def _built() -> Path:
    """The library's file, named after all that it depends on; several processes may build it at once, and the last
    one's stays.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise _Missing(f"there is no C++ compiler ({', '.join(COMPILERS[:-1])} or {COMPILERS[-1]})")
    parts = (SOURCE.read_bytes(), *(word.encode() for word in (os.path.realpath(compiler), *FLAGS)))
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path.home() / ".cache/diffmoe_ep"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise RuntimeError(
            f"{folder} is not this user's alone, so others could put code there; chmod 700 it, or remove it"
        )
    path = folder / f"moments-{name}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / path.name
            done = subprocess.run(
                [compiler, *FLAGS, "-o", str(made), str(SOURCE)], capture_output=True, text=True, timeout=LONGEST_BUILD, check=False
            )  # fmt: skip
            if done.returncode:
                raise _Missing(
                    f"{compiler} failed: {(done.stderr.strip() or f'exit status {done.returncode}').splitlines()[0][:200]}"
                )
            made.replace(path)
    return path
