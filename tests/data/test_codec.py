"""Stored bytes to arrays and final latents: what is written comes back, and nothing else is accepted."""

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from diffmoe_ep.data.codec import Caption, StoredCondition, decode, encode
from diffmoe_ep.data.manifest import Manifest, TextEncoderInfo

PIXELS = Manifest("tiny", "pixels", (3, 4, 5), "uint8", 1 / 8, -1.0, 10, (), "made up")
FLOATS = replace(PIXELS, dtype="float32", scale=2.0, shift=0.5)
MOMENTS = Manifest("tiny", "moments", (2, 4, 4), "float16", 0.18215, 0.0, 1000, (), "made up", flips=2)


def array_for(manifest: Manifest, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=manifest.stored_shape)
    return np.abs(values * 5).astype(np.uint8) if manifest.dtype == "uint8" else values.astype(manifest.dtype)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


@pytest.mark.parametrize("manifest", [PIXELS, FLOATS, MOMENTS])
def test_a_sample_comes_back(manifest: Manifest) -> None:
    array = array_for(manifest)
    fields = encode(array, 7, manifest)
    assert tuple(sorted(fields)) == manifest.fields
    found, label = decode(fields, manifest)
    assert label == 7
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(
        decode({"cls": b"7", manifest.fields[1]: npy(array)}, manifest)[0], array
    )  # numpy's own writer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels.npy": b""}, "not an npy file"),
        ({"pixels.npy": b"\x93NUMPY\x01\x00\xff\xff{"}, "not an npy file"),
        ({"pixels.npy": b"\x93NUMPY\x02\x00" + bytes(100)}, "not an npy file"),
        ({"pixels.npy": pickle.dumps([1])}, "not an npy file"),
        ({"pixels.npy": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)}, "holds object"),
        ({"pixels.npy": npy(np.zeros((3, 4, 6), np.uint8))}, r"holds uint8 \(3, 4, 6\)"),
        ({"pixels.npy": npy(np.zeros((3, 4, 5), np.float32))}, "holds float32"),
        ({"pixels.npy": npy(np.asfortranarray(np.zeros((3, 4, 5), np.uint8)))}, "Fortran"),
        ({"pixels.npy": npy(np.zeros((3, 4, 5), np.uint8))[:-1]}, "59 bytes"),
        ({"pixels.npy": npy(np.zeros((3, 4, 5), np.uint8)) + b"!"}, "61 bytes"),
        ({"cls": b"10"}, "label b'10'"),
        ({"cls": b"-1"}, "label b'-1'"),
        ({"cls": b"1.0"}, "label"),
        ({"cls": b""}, "label"),
        ({"cls": b"9" * 5000}, "label"),
        ({"cls": "\u0663".encode()}, "label"),
    ],
)
def test_other_content_is_refused(change: dict[str, bytes], message: str) -> None:
    fields = encode(array_for(PIXELS), 3, PIXELS)
    with pytest.raises(ValueError, match=message):
        decode(fields | change, PIXELS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("manifest", [FLOATS, MOMENTS])
def test_values_that_are_not_finite_are_refused(manifest: Manifest, bad: float) -> None:
    array = array_for(manifest)
    array.flat[5] = bad
    with pytest.raises(ValueError, match="not finite"):
        decode({"cls": b"1", manifest.fields[1]: npy(array)}, manifest)
    with pytest.raises(ValueError, match="not finite"):
        encode(array, 1, manifest)


def test_encode_refuses_what_the_manifest_does_not_announce() -> None:
    with pytest.raises(ValueError, match="stores uint8"):
        encode(array_for(FLOATS), 1, PIXELS)
    with pytest.raises(ValueError, match="label 10"):
        encode(array_for(PIXELS), 10, PIXELS)


TEXT = replace(
    PIXELS,
    num_classes=0,
    condition="text",
    text=(TextEncoderInfo("t5", 4, 5, "float32", "a" * 64), TextEncoderInfo("clip", 2, 7, "float32", "b" * 64)),
)


def captions(seed: int = 0) -> tuple[Caption, ...]:
    generator = np.random.default_rng(seed)

    def rows(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float16)

    return (Caption("eine Katze, 猫", 0.25, (rows(3, 4), rows(7, 2))), Caption("a cat", 2.0, (rows(5, 4), rows(1, 2))))


def test_captions_come_back_with_their_features() -> None:
    fields = encode(array_for(TEXT), captions(), TEXT)
    assert tuple(sorted(fields)) == TEXT.fields == ("captions.json", "pixels.npy", "text.clip.npy", "text.t5.npy")
    assert np.load(io.BytesIO(fields["text.t5.npy"])).shape == (8, 4)
    array, found = decode(fields, TEXT)
    np.testing.assert_array_equal(array, array_for(TEXT))
    assert isinstance(found, tuple)
    for caption, expected in zip(found, captions(), strict=True):
        assert (caption.text, caption.weight) == (expected.text, expected.weight)
        for rows, stored in zip(caption.features, expected.features, strict=True):
            assert rows.dtype == np.float16
            np.testing.assert_array_equal(rows, stored)


def test_captions_without_features_come_back() -> None:
    plain = replace(TEXT, text=())
    assert plain.fields == ("captions.json", "pixels.npy")
    stored = (Caption("one"), Caption("two", 0.5))
    assert decode(encode(array_for(plain), stored, plain), plain)[1] == stored


def entries(**change: object) -> bytes:
    entry = {"text": "a", "weight": 1.0, "lengths": {"t5": 5, "clip": 1}} | change
    return json.dumps([{key: value for key, value in entry.items() if value is not None}]).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions.json": b"{"}, "captions.json is not JSON"),
        ({"captions.json": b"\xff"}, "captions.json is not JSON"),
        ({"captions.json": b"[" * 100_000}, "captions.json is not JSON"),
        ({"captions.json": b"[]"}, "is not a list of captions"),
        ({"captions.json": b'{"text": "a"}'}, "is not a list of captions"),
        ({"captions.json": b"[7]"}, "has no text"),
        ({"captions.json": entries(text="")}, "has no text"),
        ({"captions.json": entries(text=7)}, "has no text"),
        ({"captions.json": entries(weight=0)}, "weight 0 is not a number above 0"),
        ({"captions.json": entries(weight=True)}, "weight True"),
        ({"captions.json": entries(weight=float("inf"))}, "weight inf"),
        ({"captions.json": entries(weight=float("nan"))}, "weight nan"),
        ({"captions.json": entries(weight=None)}, "weight None"),
        ({"captions.json": entries(lengths=None)}, "lengths None are not those of"),
        ({"captions.json": entries(lengths={"t5": 5})}, "lengths .* are not those of"),
        ({"captions.json": entries(lengths={"t5": 6, "clip": 1})}, "t5 has length 6, expected 1 to 5"),
        ({"captions.json": entries(lengths={"t5": 0, "clip": 1})}, "t5 has length 0"),
        ({"captions.json": entries(lengths={"t5": True, "clip": 1})}, "t5 has length True"),
        (
            {"captions.json": entries(lengths={"t5": 4, "clip": 1})},
            r"text.t5.npy holds float16 \(8, 4\), the manifest says float16 \(4, 4\)",
        ),
        ({"text.t5.npy": npy(np.zeros((8, 4), np.float32))}, "text.t5.npy holds float32"),
        ({"text.clip.npy": npy(np.full((8, 2), np.nan, np.float16))}, "text.clip.npy holds values that are not finite"),
        ({"text.clip.npy": pickle.dumps([1])}, "text.clip.npy is not an npy file"),
    ],
)
def test_other_captions_are_refused(change: dict[str, bytes], message: str) -> None:
    fields = encode(array_for(TEXT), captions(), TEXT) | change
    with pytest.raises(ValueError, match=message):
        decode(fields, TEXT)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (3, "stores captions, got label 3"),
        ((), "is not a list of captions"),
        ((Caption("", 1.0, captions()[0].features),), "has no text"),
        ((Caption("a", 1.0, (np.zeros((6, 4), np.float16), np.zeros((1, 2), np.float16))),), "t5 has length 6"),
        (
            (Caption("a", 1.0, (np.zeros((5, 3), np.float16), np.zeros((1, 2), np.float16))),),
            "expected finite float16 of width 4",
        ),
        ((Caption("a", 1.0, (np.zeros((5, 4)), np.zeros((1, 2), np.float16))),), "expected finite float16 of width 4"),
        ((Caption("a", 1.0, (np.full((5, 4), np.inf, np.float16), np.zeros((1, 2), np.float16))),), "expected finite"),
    ],
)
def test_captions_that_cannot_be_stored(condition: StoredCondition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(array_for(TEXT), condition, TEXT)
    with pytest.raises(ValueError, match="10 classes, got label"):
        encode(array_for(PIXELS), captions(), PIXELS)
