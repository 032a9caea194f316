"""The real encoder classes, tiny, in the preparation: latents and text features in the shards, the same for any number
of ranks.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.image import square
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.latent import final_latent, oriented
from diffmoe_ep.data.shards import Dataset
from diffmoe_ep.encoders.text import load_text_encoder
from diffmoe_ep.encoders.vae import load_vae
from encoders.tiny import save_clip, save_t5, save_vae
from pictures import content, picture, tar

pytestmark = pytest.mark.slow  # importing the encoders' libraries alone takes seconds


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("models")
    save_vae(folder / "vae")
    save_t5(folder / "t5")
    save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for unit in range(2):
        names = [f"{unit:05d}{number:04d}" for number in range(5)]
        files = {}
        for number, name in enumerate(names):
            files |= {f"{name}.jpg": picture(10 * unit + number, 40, 30, "JPEG"), f"{name}.txt": b"cat " * (number + 1)}
        tar(folder / f"{unit:05d}.tar", files)
    return folder


def options(models: Path, source: Path, out: Path) -> list[str]:
    encoders = [
        "--vae",
        str(models / "vae"),
        "--t5",
        str(models / "t5"),
        "--t5-length",
        "12",
        "--clip",
        str(models / "clip"),
    ]
    sizes = [
        "--image-size",
        "16",
        "--min-side",
        "1",
        "--flips",
        "2",
        "--shard-size",
        "4",
        "--batch",
        "3",
        "--readers",
        "2",
        "--device",
        "cpu",
    ]
    return ["text_image", "--source", str(source), "--out", str(out), *encoders, *sizes]


def test_latents_and_features_are_stored(
    models: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(models, source, tmp_path / "out")) == 0
    told = capsys.readouterr().out
    assert "10 samples in 2 units (written)" in told
    assert "10 captions were longer" in told  # four for t5 (a token a letter, at most 12), six for clip (at most 10)
    dataset = Dataset.open(tmp_path / "out")
    manifest = dataset.manifest
    vae, t5 = load_vae(models / "vae"), load_text_encoder("t5", models / "t5", max_length=12)
    assert (manifest.kind, manifest.dtype, manifest.shape, manifest.stored_shape) == (
        "moments",
        "float16",
        (4, 8, 8),
        (2, 8, 8, 8),
    )
    assert (manifest.scale, manifest.shift, manifest.encoder) == (vae.scale, 0.0, vae.fingerprint)
    assert manifest.fields == ("captions.json", "moments.npy", "text.clip.npy", "text.t5.npy")
    assert [(text.name, text.width, text.max_length) for text in manifest.text] == [("t5", 16, 12), ("clip", 12, 10)]
    assert manifest.text[0].fingerprint == t5.fingerprint
    assert dataset.sizes == (4, 1, 4, 1)
    for unit in range(2):
        for number in range(5):
            array, captions = read_sample(dataset, 2 * unit + number // 4, number % 4)
            assert isinstance(captions, tuple)
            image = square(picture(10 * unit + number, 40, 30, "JPEG"), 16, 1)
            expected = vae.moments(image[None], 2)[0].astype(np.float32)
            np.testing.assert_allclose(array.astype(np.float32), expected, rtol=5e-3, atol=5e-3)
            text = ("cat " * (number + 1)).strip()
            assert captions[0].text == text
            assert [len(rows) for rows in captions[0].features] == [
                min(len(text) + 1, 12),
                min(3 * (number + 1) + 2, 10),
            ]
            np.testing.assert_allclose(
                captions[0].features[0].astype(float), t5.features([text])[0][0].astype(float), rtol=5e-3, atol=5e-3
            )
    array, _ = read_sample(dataset, 0, 0)
    normal = np.random.default_rng(0).standard_normal(manifest.shape, dtype=np.float32)
    one, other = (final_latent(oriented(array, manifest, flipped), manifest, normal) for flipped in (False, True))
    assert np.abs(one - other).max() > 0.01


def test_the_same_bytes_on_three_ranks(models: Path, source: Path, tmp_path: Path) -> None:
    assert main(options(models, source, tmp_path / "one")) == 0
    for rank in (2, 1, 0):
        assert main([*options(models, source, tmp_path / "three"), "--world", "3", "--rank", str(rank)]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_another_encoder_is_another_dataset(
    models: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(models, source, tmp_path / "out")) == 0
    command = options(models, source, tmp_path / "out")
    command[command.index(str(models / "vae"))] = str(save_vae(tmp_path / "vae", seed=1))
    assert main(command) == 2
    assert "holds another dataset: its encoder is" in capsys.readouterr().err


def test_values_that_do_not_fit_are_bad_samples(models: Path, source: Path, tmp_path: Path) -> None:
    """A VAE whose output overflows float16 makes every sample bad, and none of them fatal by itself."""
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(models / "vae")
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e8)
    model.save_pretrained(tmp_path / "vae")
    command = options(models, source, tmp_path / "out")
    command[command.index(str(models / "vae"))] = str(tmp_path / "vae")
    assert main([*command, "--max-bad", "1"]) == 2
    bad = [json.loads(line)["reason"] for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert bad == ["the VAE gave values that are not finite in float16"] * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image-size", "15"], "--image-size 15 is not a multiple of 2"),
        (["--t5", "absent"], "the t5 folder absent is not a folder"),
    ],
)
def test_options_that_do_not_fit(
    models: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main([*options(models, source, tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
