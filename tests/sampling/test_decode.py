"""From a prompt to a picture: text encoder, model, VAE; the same pictures for any number of ranks; and VAEs that are
not the data's.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.test_cli import TINY, call, train_busy
from encoders.tiny import save_t5, save_vae
from ranks import run

SCALE = {"scaling_factor": 0.5, "shift_factor": 0.25}
SIZES = ("model.input_size=8", "model.in_channels=4", "model.out_channels=4", "model.patch=2", "model.num_experts=4")
TEXT = ("model.condition=text", "model.text_width=16", "model.text_length=20")


pytestmark = pytest.mark.slow  # importing the encoders' libraries alone takes seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE and a T5 of random weights (vae, t5), latents and features that they made (data), and a run
    on them (run).
    """
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from data_prep.__main__ import main

    folder = tmp_path_factory.mktemp("picture")
    save_vae(folder / "vae", **SCALE)
    save_t5(folder / "t5")
    (folder / "source").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3)).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"source/{number:03d}.png")
        (folder / f"source/{number:03d}.txt").write_text(f"picture {number}")
    encoders = [
        "--vae",
        str(folder / "vae"),
        "--t5",
        str(folder / "t5"),
        "--t5-length",
        "20",
        "--image-size",
        "16",
        "--min-side",
        "1",
    ]
    main(["text_image", "--source", str(folder / "source"), "--out", str(folder / "data"), *encoders])
    grids = (
        f"sample.vae={folder / 'vae'}",
        f"text.folder={folder / 't5'}",
        "sample.grid_every=2",
        "sample.grid_size=4",
    )
    settings = (*TINY, *SIZES, *TEXT, "data.flip=false", *grids)
    arguments = (
        "train",
        "configs/digits.yaml",
        f"data.folder={folder / 'data'}",
        f"folder={folder / 'run'}",
        *settings,
    )
    code, _, err = run(1, train_busy, *arguments)[0]
    assert code == 0, err
    return folder


def drawn(made: Path, world: int, out: Path, *more: str) -> dict[str, np.ndarray]:
    words = ("--prompt", "picture 3", "--prompt", "picture 8", "--per-prompt", "3")
    results = run(world, call, "sample", str(made / "run"), "--out", str(out), *words, *more)
    assert [code for code, _, _ in results] == [0] * world, results[0][2]
    with np.load(out / "samples.npz") as arrays:
        return {name: np.array(arrays[name]) for name in arrays}


def test_pictures_are_what_diffusers_decodes_on_any_number_of_ranks(made: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    found = drawn(made, 1, tmp_path / "1")
    assert found["pixels"].shape == (6, 3, 16, 16)
    vae = AutoencoderKL.from_pretrained(made / "vae").eval()
    with torch.no_grad():
        expected = vae.decode(
            torch.from_numpy(found["latents"]) / 0.5 + 0.25
        ).sample  # diffusers: (sample - shift) * scale
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(found["pixels"] - expected).max() < 0.51
    assert expected.std() > 1  # not one colour
    shown = colours(tmp_path / "1/grid.png")
    for picture in found["pixels"]:
        assert {tuple(colour) for colour in picture.reshape(3, -1).T.tolist()} <= shown
    for world in (2, 4):
        np.testing.assert_array_equal(drawn(made, world, tmp_path / str(world))["pixels"], found["pixels"])


def colours(path: Path) -> set[tuple[int, ...]]:
    """All that occur in a picture."""
    with Image.open(path) as picture:
        return {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}


def test_training_draws_grids_of_pictures(made: Path) -> None:
    """Four pictures of 256 pixels in colour; frame and captions are grey."""
    assert len([colour for colour in colours(made / "run/samples/step-0000002.png") if len(set(colour)) == 3]) > 200


def test_without_a_vae_there_are_latents_and_a_word_on_it(made: Path, tmp_path: Path) -> None:
    code, said, err = run(
        1, call, "sample", str(made / "run"), "--out", str(tmp_path), "--prompt", "one", "sample.vae=null"
    )[0]
    assert code == 0, err
    assert "to see pictures, set sample.vae" in said
    assert not (tmp_path / "grid.png").exists()
    with np.load(tmp_path / "samples.npz") as arrays:
        assert sorted(arrays) == ["labels", "latents"]


def test_capacity_by_prompt_shows_pictures(made: Path, tmp_path: Path) -> None:
    words = ("--prompt", "picture 3", "--prompt", "picture 8", "--per-prompt", "2")
    code, _, err = run(1, call, "capacity", "report", str(made / "run"), "--out", str(tmp_path / "c"), *words)[0]
    assert code == 0, err
    assert len([colour for colour in colours(tmp_path / "c/hardest_easiest.png") if len(set(colour)) == 3]) > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scaling_factor": 0.7},
            r"otherwise \(scale 0\.7, shift -0\.175\) than the model's are \(scale 0\.5, shift -0\.125\)",
        ),
        ({"shift_factor": 0.5}, r"scales its latents otherwise \(scale 0\.5, shift -0\.25\)"),
        (
            {"seed": 1},
            r"is another VAE than the one that made the model's latents \(fingerprint \w{12}\.\.\., not \w{12}",
        ),
        ({"latent_channels": 3}, r"has latents of 3 channels, the model of 4"),
    ],
)  # fmt: skip
def test_another_vae_is_refused_on_all_ranks(
    made: Path, tmp_path: Path, change: dict[str, float], message: str
) -> None:
    other = save_vae(tmp_path / "other", **{**SCALE, **change})  # type: ignore[arg-type]
    words = ("sample", str(made / "run"), "--out", str(tmp_path / "out"), "--prompt", "one", f"sample.vae={other}")
    results = run(2, call, *words)
    assert [code for code, _, _ in results] == [2, 2]
    assert re.search(message, results[0][2]), results
    assert "set sample.vae to the folder of the VAE that made the latents" in results[0][2]


def test_a_folder_that_is_missing_says_where_one_comes_from(made: Path, tmp_path: Path) -> None:
    code, _, err = run(
        1, call, "sample", str(made / "run"), "--out", str(tmp_path), "--prompt", "one", "sample.vae=/absent"
    )[0]
    assert code == 2
    assert "the VAE folder /absent is not a folder" in err
    assert "stabilityai/sd-vae-ft-mse" in err


def test_fine_tuning_on_latents_of_another_scale_is_refused(made: Path, tmp_path: Path) -> None:
    manifest = json.loads((made / "data/manifest.json").read_text())
    other = shutil.copytree(made / "data", tmp_path / "data")
    (other / "manifest.json").write_text(json.dumps(manifest | {"scale": 0.7}))
    sizes = (*TINY, *SIZES, *TEXT, "data.flip=false", f"init_from={made / 'run'}")
    code, _, err = run(
        1, call, "train", "configs/digits.yaml", f"data.folder={other}", f"folder={tmp_path / 'run'}", *sizes
    )[0]
    assert code == 2
    assert "was trained on data whose scale is 0.5, but that of this run's data is 0.7" in err


def test_scores_of_latents_are_refused(made: Path) -> None:
    folders = ("--reference", str(made / "data"), "--heldout", str(made / "data"))
    code, _, err = run(1, call, "evaluate", str(made / "run"), "--composition", *folders)[0]
    assert code == 2
    assert "are latents of a VAE, and scores compare stored pixels" in err
