"""Prompts: the features of their words alone, as stored ones are; what is empty or cut is said, and another encoder is
refused.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ep.config import Config, ConfigError, DataConfig, from_tree
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.encoders.text import TextEncoder
from diffmoe_ep.sampling.prompts import Prompts, encode, first_captions, load_encoder, read_prompts
from encoders.tiny import save_t5

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
WIDTH, PLACES = 16, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5, and canvases of digits with its features."""
    from data_prep.__main__ import main

    folder = tmp_path_factory.mktemp("prompts")
    save_t5(folder / "t5")
    for name, more in (("stored", ["--t5", str(folder / "t5"), "--t5-length", "30"]), ("words", [])):
        main(
            [
                "digits_captions",
                "--out",
                str(folder / name),
                "--samples",
                "30",
                "--heldout",
                "5",
                "--shard-size",
                "20",
                *more,
            ]
        )
    return folder


def config(folder: Path, *overrides: str) -> Config:
    model = {
        "condition": "text",
        "text_width": WIDTH,
        "text_length": PLACES,
        "input_size": 24,
        "in_channels": 1,
        "out_channels": 1,
    }
    return from_tree({"model": model, "text": {"folder": str(folder / "t5")}}, overrides)


def data_info(folder: Path, name: str = "stored") -> DataInfo:
    return DataInfo.of(Mixture.open(DataConfig(folder=str(folder / name / "train"))).manifest)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_encoder(config(folder), data_info(folder))


@pytest.mark.slow
def test_features_depend_on_the_words_alone(encoder: TextEncoder) -> None:
    words = ["one 3", "a 3 above an 8", "one 3", "two 5s"]
    prompts, said = encode(encoder, words, PLACES)
    assert said == []
    assert prompts.words == tuple(words) and len(prompts) == 4
    assert prompts.rows[0] is prompts.rows[2]  # encoded once
    for number, text in enumerate(words):
        alone = encode(encoder, [text], PLACES)[0]
        laid, one = prompts[number : number + 1], alone[:1]
        assert torch.equal(laid.features, one.features) and torch.equal(laid.lengths, one.lengths)
        assert torch.equal(laid.features, laid.features.half().float())  # as stored features are
        length = int(laid.lengths)
        assert length == len(text) + 1  # bytes and an end
        assert laid.features.shape == (1, PLACES, WIDTH)
        assert not laid.features[0, length:].any()
    idle = prompts[4:4]
    assert idle.features.shape == (0, PLACES, WIDTH) and len(idle.lengths) == 0
    assert prompts.part(1, 3).words == ("a 3 above an 8", "one 3")


def test_features_are_those_that_were_stored(folder: Path, encoder: TextEncoder) -> None:
    """To a unit in float16's last place: they were made in a batch."""
    mixture = Mixture.open(DataConfig(folder=str(folder / "stored" / "train")))
    given = config(folder)
    text = CaptionSpec.of(given.model, given.text)
    assert text is not None
    stored = first_captions(mixture, text, 45)
    assert stored.words[30:] == stored.words[:15]  # 30 samples, then again
    assert len(set(stored.words)) > 25
    made = encode(encoder, stored.words, PLACES)[0]
    for ours, theirs in zip(made.rows, stored.rows, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-3, atol=1e-3)
    online = CaptionSpec.of(given.model, config(folder, "text.online=true").text)
    assert online is not None
    words = Mixture.open(DataConfig(folder=str(folder / "words" / "train")))
    longer = load_encoder(config(folder, "text.online=true"), data_info(folder, "words"))
    assert longer.max_length == PLACES
    assert first_captions(words, online, 30, longer).words == stored.words[:30]
    with pytest.raises(ConfigError, match="holds no features of its captions; set text.folder"):
        first_captions(words, online, 3)


def test_what_is_empty_or_cut_is_said(encoder: TextEncoder) -> None:
    long = "a 3 at the top left, again and again and again"
    prompts, said = encode(encoder, ["", "one 3", "  ", long], 20)
    assert prompts[0:4].lengths.tolist() == [0, 6, 0, 20]
    assert said[0] == said[1] == "an empty prompt is drawn as the null caption, without any guidance by words"
    assert said[2:] == [f"the prompt '{long}' has more than 20 tokens and is cut there"]
    assert encode(encoder, [long], PLACES)[1] == [
        f"the prompt '{long}' has more than 30 tokens and is cut there"
    ]  # of the stored features
    assert "…' has more" in encode(encoder, ["x" * 500], PLACES)[1][0]


def test_an_encoder_that_is_not_the_runs_is_refused(folder: Path, tmp_path: Path) -> None:
    made = data_info(folder)
    other = save_t5(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError) as caught:
        load_encoder(config(folder, f"text.folder={other}"), made)
    held = made.text[0].fingerprint
    assert held[:12] in str(caught.value)
    assert f"text.folder {other} is another encoder (fingerprint " in str(caught.value)
    with pytest.raises(ConfigError, match=rf"text.folder is not set.*fingerprint {held[:12]}.*google/t5-v1_1-xxl"):
        load_encoder(config(folder, "text.folder=null"), made)
    with pytest.raises(ConfigError, match=r"t5 folder .*/absent is not a folder.*google/t5-v1_1-xxl"):
        load_encoder(config(folder, f"text.folder={tmp_path / 'absent'}"), made)
    with pytest.raises(ConfigError, match="features of width 16, but model.text_width is 32"):
        load_encoder(config(folder, "model.text_width=32"), made)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# what to draw\none 3\n\n  a 3 above an 8  \ntwo 5s # not a comment\n")
    assert read_prompts(path) == ["one 3", "a 3 above an 8", "two 5s # not a comment"]
    path.write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


def test_prompts_keep_their_kind_when_they_are_few(encoder: TextEncoder) -> None:
    prompts = encode(encoder, ["one 3"], PLACES)[0]
    assert isinstance(prompts, Prompts)
    assert prompts[0:1].features.dtype == torch.float32
