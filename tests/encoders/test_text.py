"""T5 and CLIP: features at their true lengths as transformers gives them, and folders that hold no encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.encoders.local_folder import weight_files
from diffmoe_ep.encoders.text import load_text_encoder
from encoders.tiny import save_clip, save_t5

TEXTS = ["a cat", "a", "a cat that sits on a mat"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


def test_t5_features_have_their_true_length(t5: Path) -> None:
    encoder = load_text_encoder("t5", t5, max_length=12)
    found, cut = encoder.features(TEXTS)
    assert [rows.shape for rows in found] == [(6, 16), (2, 16), (12, 16)]  # bytes and an end
    assert cut == [False, False, True]
    for text, rows in zip(TEXTS, found, strict=True):
        assert rows.dtype == np.float16
        ids = torch.tensor(
            [[*[byte + 3 for byte in text.encode()][:11], 1]]
        )  # ByT5: three special tokens come first, 1 is the end
        with torch.no_grad():
            alone = encoder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(rows).float(), alone, rtol=2e-3, atol=2e-3)


def test_clip_features_have_their_true_length(clip: Path) -> None:
    encoder = load_text_encoder("clip", clip, max_length=77)
    assert (encoder.width, encoder.max_length) == (12, 10)  # it has no more positions
    found, cut = encoder.features(["a", "abc", "a b c d e f g h i j k"])
    assert [rows.shape for rows in found] == [(3, 12), (5, 12), (10, 12)]
    assert cut == [False, False, True]
    ids = torch.tensor([[0, 27, 53]])  # start, a at a word's end, end
    with torch.no_grad():
        alone = encoder.model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(torch.from_numpy(found[0]).float(), alone, rtol=2e-3, atol=2e-3)


def test_bfloat16(t5: Path) -> None:
    full, half = (
        load_text_encoder("t5", t5, max_length=12, precision=precision) for precision in ("float32", "bfloat16")
    )
    assert full.fingerprint == half.fingerprint
    one, other = full.features(["a cat"])[0][0], half.features(["a cat"])[0][0]
    assert 0 < np.abs(one.astype(float) - other).max() < 0.1


def test_the_fingerprint_counts_the_tokenizer(t5: Path, tmp_path: Path) -> None:
    first = load_text_encoder("t5", t5, max_length=12).fingerprint
    assert load_text_encoder("t5", save_t5(tmp_path / "same"), max_length=12).fingerprint == first
    assert load_text_encoder("t5", save_t5(tmp_path / "other", seed=1), max_length=12).fingerprint != first
    path = tmp_path / "same" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"remark": "another"}))
    assert load_text_encoder("t5", tmp_path / "same", max_length=12).fingerprint != first


def test_another_kind_of_model_is_refused(t5: Path, clip: Path) -> None:
    with pytest.raises(ConfigError, match="holds a model of type t5, expected clip; give the local folder of a CLIP"):
        load_text_encoder("clip", t5, max_length=12)
    with pytest.raises(ConfigError, match="expected t5; give the local folder of a T5 encoder"):
        load_text_encoder("t5", clip, max_length=12)
    with pytest.raises(ConfigError, match="0 tokens, expected 1 or more"):
        load_text_encoder("t5", t5, max_length=0)


def test_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the t5 folder .*absent is not a folder .* google/t5"):
        load_text_encoder("t5", tmp_path / "absent", max_length=12)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_text_encoder("t5", tmp_path, max_length=12)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="lacks model.safetensors"):
        load_text_encoder("t5", tmp_path, max_length=12)


def test_weights_in_several_files(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}})
    )
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        weight_files(tmp_path, "model")
    (tmp_path / "model-2.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path, "model")] == ["model-1.safetensors", "model-2.safetensors"]
    for content in ('{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(ConfigError, match="is not a plain file name"):
            weight_files(tmp_path, "model")
    for content in ("[]", "{}", "{"):
        index.write_text(content)
        with pytest.raises(ConfigError, match="is not a list of weight files"):
            weight_files(tmp_path, "model")
