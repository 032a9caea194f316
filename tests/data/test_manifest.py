"""Manifests of both formats: what is written comes back, format 1 stays readable, and nothing that makes no sense is
accepted.
"""

import json
from dataclasses import replace
from typing import Any

import pytest

from diffmoe_ep.data.manifest import DataError, Manifest, Shard, TextEncoderInfo, parse_manifest

SHARD = Shard("tiny-000000.tar", 10240, 3, "0" * 64, "1" * 64)
LABELS = Manifest(
    "tiny",
    "pixels",
    (3, 4, 5),
    "uint8",
    1 / 8,
    -1.0,
    2,
    ("a", "b"),
    "made up",
    num_samples=3,
    shards=(SHARD,),
    image_size=8,
)
TEXT = replace(
    LABELS,
    kind="moments",
    dtype="float16",
    flips=2,
    num_classes=0,
    class_names=(),
    condition="text",
    encoder="e" * 64,
    source="f" * 64,
    text=(
        TextEncoderInfo("t5", 4096, 120, "bfloat16", "a" * 64),
        TextEncoderInfo("clip", 768, 77, "float32", "b" * 64),
    ),
)
FORMAT_1 = {
    "format": 1,
    "name": "tiny",
    "kind": "pixels",
    "shape": [1, 8, 8],
    "dtype": "uint8",
    "scale": 0.125,
    "shift": -1.0,
    "num_classes": 2,
    "class_names": [],
    "licence": "made up",
    "flips": 1,
    "num_samples": 3,
    "shards": [
        {"name": "tiny-000000.tar", "bytes": 10240, "num_samples": 3, "sha256": "0" * 64, "index_sha256": "1" * 64}
    ],
}


@pytest.mark.parametrize("manifest", [LABELS, TEXT])
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert json.loads(text)["format"] == 2
    assert parse_manifest(json.loads(text), "here") == manifest


def test_members_follow_from_the_condition() -> None:
    assert LABELS.fields == ("cls", "pixels.npy")
    assert TEXT.fields == ("captions.json", "moments.npy", "text.clip.npy", "text.t5.npy")
    assert TEXT.stored_shape == (2, 6, 4, 5)


def test_format_1_is_read_and_keeps_its_bytes() -> None:
    """Fingerprints of older datasets, which runs carry, must not change."""
    text = json.dumps(FORMAT_1, indent=2, ensure_ascii=False) + "\n"
    manifest = parse_manifest(json.loads(text), "here")
    assert (manifest.condition, manifest.fields, manifest.text, manifest.image_size) == (
        "class",
        ("cls", "pixels.npy"),
        (),
        0,
    )
    assert manifest.to_json() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format is 3, expected 2 or 1"),
        ({"format": 0}, "format is 0"),
        ({"condition": "image"}, "condition is 'image', expected class or text"),
        ({"condition": "class"}, "num_classes is 0, expected a number above 0"),
        ({"condition": "class", "num_classes": 5}, "text is .* expected no text features"),
        ({"num_classes": 5}, "num_classes is 5, expected 0 where the condition is text"),
        ({"class_names": ["a"]}, "class_names is .*expected 0 names"),
        ({"encoder": "abc"}, "encoder is 'abc', expected a sha256, or nothing"),
        ({"source": "E" * 64}, "source is"),
        ({"image_size": -1}, "image_size is -1"),
        ({"text": [7]}, r"text\[0\]: is a int"),
        ({"text": [{"name": "t5"}]}, r"text\[0\]: wrong keys \(missing: width, max_length, precision, fingerprint"),
        ({"text": [json.loads(TEXT.to_json())["text"][0]] * 2}, "expected encoders of different names"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_manifest(json.loads(TEXT.to_json()) | change, "here")


@pytest.mark.parametrize(
    "change",
    [{"name": "../t5"}, {"name": "t5.npy"}, {"name": ""}, {"width": 0}, {"max_length": 0}, {"fingerprint": "x"}],
)
def test_wrong_text_encoders_are_refused(change: dict[str, Any]) -> None:
    content = json.loads(TEXT.to_json())
    content["text"][0] |= change
    with pytest.raises(DataError, match="expected encoders with name, width, max_length, fingerprint"):
        parse_manifest(content, "here")


def test_keys_of_the_other_format_are_refused() -> None:
    with pytest.raises(DataError, match="unknown: condition"):
        parse_manifest(FORMAT_1 | {"condition": "class"}, "here")
    with pytest.raises(DataError, match="missing: condition, text, image_size, encoder, source"):
        parse_manifest(FORMAT_1 | {"format": 2}, "here")
    with pytest.raises(DataError, match=r"shards\[0\]: bytes is 'many' \(str\), expected int"):
        parse_manifest(FORMAT_1 | {"shards": [FORMAT_1["shards"][0] | {"bytes": "many"}]}, "here")  # type: ignore[index]
