"""What one stored sample holds, to bytes and back, and the Batch that training receives.

A sample has two fields: `cls`, its label as decimal text, and one array as npy: `pixels.npy` (C, H, W), or `moments.npy`
(flips, 2C, H, W), the unscaled mean and log-variance of a VAE's posterior for the image and, if flips is 2, its mirror image.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from tokenize import TokenError

import numpy as np
import torch

from diffmoe_ep.data.keyed import keyed
from diffmoe_ep.data.shards import REMEDY, DataError, Dataset, Manifest


@dataclass(frozen=True)
class Batch:
    """Everything that training needs of B samples, drawn by their positions."""

    latent: torch.Tensor  # (B, C, H, W) float32, final: scaled and shifted
    noise: torch.Tensor  # (B, C, H, W) float32, standard normal
    u: torch.Tensor  # (B,) float32 in [0, 1), which the objective maps to a time
    condition: torch.Tensor  # (B,) int64 label; num_classes, the null class, where it was dropped
    position: torch.Tensor  # (B,) int64 place in the endless stream

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        tensors = (self.latent, self.noise, self.u, self.condition, self.position)
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))


def encode(array: np.ndarray, label: int, manifest: Manifest) -> dict[str, bytes]:
    """The fields of a sample that `decode` gives back; ValueError if array or label are not what the manifest announces."""
    if array.shape != manifest.stored_shape or array.dtype != np.dtype(manifest.dtype):
        raise ValueError(f"{manifest.name} stores {manifest.dtype} {manifest.stored_shape}, got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{manifest.name}: an array to be stored has values that are not finite")
    if not 0 <= label < manifest.num_classes:
        raise ValueError(f"{manifest.name} has {manifest.num_classes} classes, got label {label}")
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return {"cls": str(label).encode(), f"{manifest.kind}.npy": file.getvalue()}


def decode(fields: Mapping[str, bytes], manifest: Manifest) -> tuple[np.ndarray, int]:
    """The stored array and label of a sample, checked against the manifest; ValueError, without shard and key, for any other content."""
    array, text = _decode_npy(fields[f"{manifest.kind}.npy"], manifest), fields["cls"]
    if not text.isdigit() or len(text) > 18 or int(text) >= manifest.num_classes:
        raise ValueError(f"cls: label {text[:20]!r} is not a number below num_classes = {manifest.num_classes}")
    return array, int(text)


def read_sample(dataset: Dataset, shard: int, sample: int) -> tuple[np.ndarray, int]:
    """Stored array and label of a sample of a dataset; DataError names shard and key."""
    try:
        return decode(dataset.read(shard, sample), dataset.manifest)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{dataset.where(shard, sample)}: {error}; {REMEDY}") from error


def _decode_npy(content: bytes, manifest: Manifest) -> np.ndarray:
    name, expected = f"{manifest.kind}.npy", f"{manifest.dtype} {manifest.stored_shape}"
    start = 10 + int.from_bytes(content[8:10], "little")  # the size of a version 1.0 header stands in bytes 8 and 9
    try:
        shape, fortran_order, dtype = _parse_header(content[:start])
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
        raise ValueError(f"{name} is not an npy file of version 1.0 ({error})") from error
    if shape != manifest.stored_shape or dtype != np.dtype(manifest.dtype) or fortran_order:
        raise ValueError(f"{name} holds {dtype} {shape}{' in Fortran order' if fortran_order else ''}, the manifest says {expected}")
    size = dtype.itemsize * math.prod(shape)
    if len(content) - start != size:
        raise ValueError(f"{name} has {len(content) - start} bytes of values, {expected} needs {size}")
    array = np.frombuffer(content, dtype=dtype, offset=start).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


@lru_cache(maxsize=16)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an npy header (which all samples share); a pickled array is its dtype `object`, never loaded."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version[0]}.{version[1]}")
    return np.lib.format.read_array_header_1_0(file)


def final_latent(array: np.ndarray, manifest: Manifest, flipped: bool, seed: int, position: int) -> np.ndarray:
    """The (C, H, W) float32 latent that the model trains on: mirrored if asked, sampled from its posterior, scaled and shifted."""
    if manifest.kind == "pixels":
        values = (array[:, :, ::-1] if flipped else array).astype(np.float32)
    else:
        mean, log_variance = np.split(array[int(flipped)].astype(np.float32), 2)
        deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))  # the clip of latent-diffusion VAEs
        values = mean + deviation * keyed(seed, position, "posterior").standard_normal(mean.shape, dtype=np.float32)
    return values * np.float32(manifest.scale) + np.float32(manifest.shift)
