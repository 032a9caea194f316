"""What one stored sample holds, to bytes and back.

A sample has one array as npy: `pixels.npy` (C, H, W), or `moments.npy` (flips, 2C, H, W), the unscaled mean and
log-variance of a VAE's posterior for the image and, if flips is 2, its mirror image; and its condition: `cls`, its
label as decimal text, or `captions.json`, a list of {"text", "weight", "lengths"}. Where text was encoded,
`text.NAME.npy` float16 (sum of lengths, width) holds the features of all captions, one after the other at their true
lengths, one member for each encoder.
"""

import io
import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from diffmoe_ep.config.foreign import parse_json
from diffmoe_ep.data.manifest import NPY_ERRORS, TEXT_DTYPE, Manifest, TextEncoderInfo
from diffmoe_ep.data.sources import Content

LARGEST_WEIGHT = 1e100  # of a caption, so that sums stay finite


@dataclass(frozen=True)
class Caption:
    """One of the texts that describe an image."""

    text: str  # not empty
    weight: float = 1.0  # above 0: how often it is taken, relative to the image's other captions
    features: tuple[np.ndarray, ...] = ()  # of each text encoder in the manifest, (length, width) float16


StoredCondition = int | tuple[Caption, ...]  # the label, or the captions, as the manifest's `condition` says


def encode(array: np.ndarray, condition: StoredCondition, manifest: Manifest) -> dict[str, bytes]:
    """The fields of a sample that `decode` reads; ValueError if array or condition are not what the manifest
    announces.
    """
    if array.shape != manifest.stored_shape or array.dtype != np.dtype(manifest.dtype):
        raise ValueError(
            f"{manifest.name} stores {manifest.dtype} {manifest.stored_shape}, got {array.dtype} {array.shape}"
        )
    if not all_finite(array):
        raise ValueError(f"{manifest.name}: an array to be stored has values that are not finite")
    stored = {f"{manifest.kind}.npy": _encode_npy(array)}
    if manifest.condition == "text":
        if isinstance(condition, int):
            raise ValueError(f"{manifest.name} stores captions, got label {condition}")
        return stored | _encode_captions(condition, manifest)
    if not isinstance(condition, int) or not 0 <= condition < manifest.num_classes:
        raise ValueError(f"{manifest.name} has {manifest.num_classes} classes, got label {condition}")
    return stored | {"cls": str(condition).encode()}


def decode(fields: Mapping[str, Content], manifest: Manifest) -> tuple[np.ndarray, StoredCondition]:
    """The stored array and condition of a sample, checked against the manifest; ValueError, without shard and key, for
    other content.
    """
    array = decode_array(fields, manifest)
    return array, decode_label(fields, manifest) if manifest.condition == "class" else decode_captions(fields, manifest)


def decode_array(fields: Mapping[str, Content], manifest: Manifest, finite: bool = True) -> np.ndarray:
    """The stored array of a sample; ValueError if it is another than announced or, where that is looked at, is not
    finite.
    """
    name = f"{manifest.kind}.npy"
    array = _decode_npy(fields[name], name, manifest.dtype, manifest.stored_shape)
    return check_finite(array, name) if finite else array


def decode_label(fields: Mapping[str, Content], manifest: Manifest) -> int:
    """The label of a sample; ValueError if it is not one."""
    text = bytes(fields["cls"])
    if not text.isdigit() or len(text) > 18 or int(text) >= manifest.num_classes:
        raise ValueError(f"cls: label {text[:20]!r} is not a number below num_classes = {manifest.num_classes}")
    return int(text)


def decode_captions(fields: Mapping[str, Content], manifest: Manifest) -> tuple[Caption, ...]:
    """The captions of a sample, with their features where some are stored; ValueError for any other content."""
    entries = _decode_entries(fields["captions.json"], manifest)
    features = []
    for encoder in manifest.text:
        lengths = [entry["lengths"][encoder.name] for entry in entries]
        rows = check_finite(
            _decode_npy(fields[encoder.field], encoder.field, TEXT_DTYPE, (sum(lengths), encoder.width)), encoder.field
        )
        features.append(np.split(rows, np.cumsum(lengths)[:-1]))
    return tuple(
        Caption(entry["text"], float(entry["weight"]), tuple(of_encoder[number] for of_encoder in features))
        for number, entry in enumerate(entries)
    )


def decode_caption(
    fields: Mapping[str, Content], manifest: Manifest, encoder: TextEncoderInfo | None, pick: float
) -> Caption:
    """One of a sample's captions by weight, for `pick` from 0 to 1, with its features of one encoder; the others are
    not looked at.

    ValueError for content that is not what the manifest announces.
    """
    entries = _decode_entries(fields["captions.json"], manifest)
    limits = list(accumulate(float(entry["weight"]) for entry in entries))
    number = min(bisect_right(limits, pick * limits[-1]), len(entries) - 1)
    text, weight = entries[number]["text"], float(entries[number]["weight"])
    if encoder is None:
        return Caption(text, weight)
    ends = list(accumulate(entry["lengths"][encoder.name] for entry in entries))
    rows = _decode_npy(fields[encoder.field], encoder.field, TEXT_DTYPE, (ends[-1], encoder.width))
    begin = ends[number] - entries[number]["lengths"][encoder.name]
    return Caption(text, weight, (check_finite(rows[begin : ends[number]], encoder.field),))


def _encode_captions(captions: tuple[Caption, ...], manifest: Manifest) -> dict[str, bytes]:
    """The members of the captions: captions.json, and the features that each text encoder of the manifest made."""
    entries = []
    for caption in captions:
        lengths = {encoder.name: len(found) for encoder, found in zip(manifest.text, caption.features, strict=True)}
        entries.append({"text": caption.text, "weight": caption.weight, "lengths": lengths})
    content = json.dumps(entries, ensure_ascii=False).encode()
    _decode_entries(content, manifest)  # what is written must be readable
    fields = {"captions.json": content}
    for number, encoder in enumerate(manifest.text):
        rows = np.concatenate([caption.features[number] for caption in captions])  # (sum of lengths, width)
        if rows.dtype != np.dtype(TEXT_DTYPE) or rows.shape[1:] != (encoder.width,) or not all_finite(rows):
            raise ValueError(
                f"{encoder.field}: expected finite {TEXT_DTYPE} of width {encoder.width}, got {rows.dtype} {rows.shape}"
            )
        fields[encoder.field] = _encode_npy(rows)
    return fields


def _decode_entries(content: Content, manifest: Manifest) -> list[dict[str, Any]]:
    """The list in captions.json, checked: text, weight, and the length of its features for every text encoder."""
    try:
        entries = parse_json(bytes(content))
    except ValueError as error:
        raise ValueError(f"captions.json is not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError("captions.json is not a list of captions")
    for entry in entries:
        known: dict[str, Any] = entry if isinstance(entry, dict) else {}
        text, weight, lengths = known.get("text"), known.get("weight"), known.get("lengths")
        if not isinstance(text, str) or not text:
            raise ValueError(f"captions.json: {str(entry)[:60]!r} has no text")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < LARGEST_WEIGHT:
            raise ValueError(f"captions.json: weight {str(weight)[:20]} is not a number above 0")
        if not isinstance(lengths, dict) or list(lengths) != [encoder.name for encoder in manifest.text]:
            raise ValueError(
                f"captions.json: lengths {str(lengths)[:60]} are not those of "
                f"{[encoder.name for encoder in manifest.text]}"
            )
        for encoder in manifest.text:
            if type(lengths[encoder.name]) is not int or not 0 < lengths[encoder.name] <= encoder.max_length:
                raise ValueError(
                    f"captions.json: {encoder.name} has length {lengths[encoder.name]!r}, expected 1 to "
                    f"{encoder.max_length}"
                )
    return entries


def _encode_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _decode_npy(content: Content, name: str, dtype_name: str, stored_shape: tuple[int, ...]) -> np.ndarray:
    header, dtype, size = expected_header(dtype_name, stored_shape)
    start = len(header)
    if content[:start] != header:  # of another shape, or of another writer, who spaces it otherwise
        start = 10 + int.from_bytes(content[8:10], "little")  # the size of a version 1.0 header stands in bytes 8 and 9
        try:
            shape, fortran_order, found = _parse_header(bytes(content[:start]))
        except NPY_ERRORS as error:
            raise ValueError(f"{name} is not an npy file of version 1.0 ({error})") from error
        if shape != stored_shape or found != dtype or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(f"{name} holds {found} {shape}{order}, the manifest says {dtype_name} {stored_shape}")
    if len(content) - start != size:
        raise ValueError(f"{name} has {len(content) - start} bytes of values, {dtype_name} {stored_shape} needs {size}")
    return np.frombuffer(content, dtype, offset=start).reshape(stored_shape)


@lru_cache(maxsize=1024)
def expected_header(dtype_name: str, shape: tuple[int, ...]) -> tuple[bytes, np.dtype, int]:
    """The npy header that NumPy writes for such an array, its dtype, and the bytes of its values."""
    file, dtype = io.BytesIO(), np.dtype(dtype_name)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file.getvalue(), dtype, dtype.itemsize * math.prod(shape)


def check_finite(array: np.ndarray, name: str) -> np.ndarray:
    """The array; ValueError if some of its values are not finite. `name`: of its member."""
    if not all_finite(array):
        raise ValueError(f"{name} holds values that are not finite")
    return array


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or NaN; for float16, whose bits order as numbers do, ten times as fast as NumPy's
    own test.
    """
    if array.dtype.kind != "f":
        return True
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    flat = array.reshape(-1)
    # As unsigned numbers the largest are negative and not finite, as signed ones the largest are positive and not
    # finite.
    return not flat.size or bool(
        np.maximum.reduce(flat.view(np.uint16)) < 0xFC00 and np.maximum.reduce(flat.view(np.int16)) < 0x7C00
    )


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an npy header (which many samples share); a pickled array is its dtype
    `object`, never loaded.
    """
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version[0]}.{version[1]}")
    return np.lib.format.read_array_header_1_0(file)
