"""What is known of a model's data goes through JSON unchanged; what was written by others is read as far as it goes."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.manifest import Manifest, Shard, TextEncoderInfo

T5 = TextEncoderInfo("t5", 64, 120, "float32", "0" * 64)
MANIFEST = Manifest(
    "made", "moments", (4, 8, 8), "float16", 0.18215, 0.0, 0, (), "made up", flips=2, num_samples=5,
    shards=(Shard("made-000000.tar", 1024, 5, "1" * 64, "2" * 64),), condition="text", text=(T5,), encoder="3" * 64,
)  # fmt: skip


def test_it_is_the_manifest_without_its_shards_and_goes_through_json() -> None:
    info = DataInfo.of(MANIFEST)
    expected = json.loads(json.dumps(asdict(MANIFEST)))
    del expected["shards"]
    assert info.to_json() == expected
    assert DataInfo.from_json(json.loads(json.dumps(info.to_json()))) == DataInfo.from_json(info.to_json()) == info
    assert (info.text_encoder("t5"), info.text_encoder("clip")) == (T5, None)


def test_nothing_known_goes_through_json_too_and_unknown_keys_are_passed_over() -> None:
    assert DataInfo.from_json(DataInfo().to_json()) == DataInfo() == DataInfo.from_json({})
    found = DataInfo.from_json({"kind": "moments", "shape": [4, 8, 8], "colour": "red"})
    assert found == DataInfo(kind="moments", shape=(4, 8, 8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": 3}, "name of the data is 3, expected str"),
        ({"scale": "1"}, "scale of the data is '1', expected float"),
        ({"kind": "pixel"}, "kind of the data is 'pixel', expected pixels or moments"),
        ({"condition": "words"}, "condition of the data is 'words', expected class or text"),
        ({"kind": "pixels", "shape": [1, 8, 8]}, "data of kind pixels lack shape, scale or shift"),
        ({"kind": "pixels", "shape": [], "scale": 1.0, "shift": 0.0}, "data of kind pixels lack shape, scale or shift"),
        ({"shape": [4, 8]}, r"shape of the data is \[4, 8\], expected \[C, H, W\]"),
        ({"shape": ["4", 8, 8]}, r"shape of the data is \['4', 8, 8\], expected"),
        ({"text": [{"name": "t5"}]}, "text of the data is .* expected text encoders"),
    ],
)
def test_what_cannot_be_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataInfo.from_json(content)
