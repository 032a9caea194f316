"""Law 3 for captions: a text-to-image run is the same run on any number of ranks, its features stored or made while it
trains.
"""

import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from diffmoe_ep.checkpoint import store
from diffmoe_ep.config import Config
from diffmoe_ep.encoders.text import load_text_encoder
from diffmoe_ep.sampling.prompts import encode
from diffmoe_ep.train import trainer as training
from ranks import RankError, run
from train.runs import config
from train.test_same_run import KINDS, differences, holds, traced

pytestmark = pytest.mark.slow

pytest.importorskip("transformers", reason="transformers is not installed")
WIDTH = 16


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Canvases of digits with the features of a random T5, and that T5."""
    from data_prep.__main__ import main

    folder, encoder = tmp_path_factory.mktemp("captioned"), tmp_path_factory.mktemp("t5") / "t5"
    main(["tiny_t5", "--out", str(encoder), "--steps", "0", "--width", str(WIDTH), "--layers", "1"])
    main(
        [
            "digits_captions",
            "--out",
            str(folder),
            "--samples",
            "96",
            "--heldout",
            "8",
            "--t5",
            str(encoder),
            "--t5-length",
            "40",
        ]
    )
    return folder / "train", encoder


def text_config(captioned: tuple[Path, Path], *overrides: str) -> Config:
    """The laws' small model, with captions in place of labels."""
    data, encoder = captioned
    text = [
        "model.condition=text",
        f"model.text_width={WIDTH}",
        "model.text_length=40",
        "model.input_size=24",
        "model.patch=6",
    ]
    return config(data, Path("unused"), "train.steps=8", f"text.folder={encoder}", *text, *overrides)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_layout_is_the_same_run(captioned: tuple[Path, Path], kind: str, accumulation: int) -> None:
    given = text_config(captioned, f"train.grad_accumulation={accumulation}", *KINDS[kind])
    single = traced(given, 1, 1, 0)[0]
    for layout in ((2, 1, 1), (2, 2, 2), (4, 2, 0)):
        found = differences(traced(given, *layout), single)
        assert holds(found), f"(W, EP, ZeRO) = {layout}: {found}"


@pytest.mark.timeout(600)
def test_captions_encoded_while_training_are_those_that_were_stored(captioned: tuple[Path, Path]) -> None:
    """To the rounding of encoders, whose batches differ; and the same on two ranks as on one."""
    stored = text_config(captioned, *KINDS["sgd"])
    online = text_config(captioned, "text.online=true", *KINDS["sgd"])
    single = traced(online, 1, 1, 0)[0]
    found = differences([single], traced(stored, 1, 1, 0)[0])
    assert found["loss"] < 1e-4 and found["grad_norm"] < 1e-3, found
    found = differences(traced(online, 2, 2, 1), single)
    assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-3, found


def draws(rank: int, given: Config) -> list[tuple[tuple[str, ...], list[torch.Tensor], int]]:
    """Words, features and seed of the grids of a run."""
    calls: list[tuple[tuple[str, ...], list[torch.Tensor], int]] = []
    with mock.patch.object(training, "sample") as sample:
        sample.side_effect = lambda module, prompts, settings, mesh, **options: calls.append(
            (prompts.words, list(prompts.rows), options["seed"])
        )
        until(rank, given)
    return calls


@pytest.mark.timeout(600)
@pytest.mark.parametrize("online", ["true", "false"])
def test_grids_show_the_prompts_of_the_config_with_the_same_noise(
    captioned: tuple[Path, Path], tmp_path: Path, online: str
) -> None:
    """A list or a file; the same bits on every rank, of the encoder that the data were made with."""
    words = ("one three", "a nine above")
    (tmp_path / "prompts.txt").write_text("# two\none three\n\na nine above\n")
    encoder = load_text_encoder("t5", captioned[1], max_length=40)
    expected = encode(encoder, words, 40)[0]
    for world, given in ((1, '["one three","a nine above"]'), (2, str(tmp_path / "prompts.txt"))):
        run_config = text_config(
            captioned, "train.steps=4", "sample.grid_every=2", f"sample.prompts={given}", f"text.online={online}"
        )
        for calls in run(world, draws, dataclasses.replace(run_config, folder=str(tmp_path / f"run{world}"))):
            assert [(said, seed) for said, _, seed in calls] == [(words, 0), (words, 0)]
            assert all(torch.equal(*pair) for _, rows, _ in calls for pair in zip(rows, expected.rows, strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("text.folder=null", r"text\.folder is not set, so prompts cannot be encoded"),
        ("sample.prompts=nowhere.txt", r"sample\.prompts nowhere\.txt cannot be read"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused_on_every_rank(
    captioned: tuple[Path, Path], tmp_path: Path, setting: str, message: str
) -> None:
    given = text_config(captioned, "train.steps=4", "sample.grid_every=2", 'sample.prompts=["one"]', setting)
    with pytest.raises(RankError, match=message):
        run(2, until, dataclasses.replace(given, folder=str(tmp_path / "run")))


def until(rank: int, given: Config) -> None:
    """Train until the config's last step, taking up what the folder holds."""
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    training.Trainer(given, mesh, dataset, checkpoint).run()


@pytest.mark.timeout(600)
def test_a_resume_knows_the_encoder(captioned: tuple[Path, Path], tmp_path: Path) -> None:
    """That of stored features and that which encodes while training, wherever it lies; another is refused."""
    other = tmp_path / "other"
    shutil.copytree(captioned[1], other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    moved = shutil.copytree(captioned[1], tmp_path / "moved")

    def go_on(steps: int, folder: Path, online: bool, run_folder: str = "run") -> None:
        given = text_config(captioned, f"train.steps={steps}", f"text.online={str(online).lower()}")
        text = dataclasses.replace(given.text, folder=str(folder))
        run(1, until, dataclasses.replace(given, text=text, folder=str(tmp_path / run_folder)))

    refused = pytest.raises(RankError, match="was trained with a text encoder of fingerprint .*; set text.folder to")
    go_on(1, captioned[1], online=False)
    with refused:
        go_on(2, other, online=True)
    go_on(2, moved, online=True)
    known = store.read_meta(store.resolve(tmp_path / "run"))["meta"]
    assert known["text_encoder"] == known["data"]["text"][0]["fingerprint"]
    with refused:
        go_on(3, other, online=True)
    go_on(3, other, online=False)  # which reads stored features

    go_on(1, other, online=True, run_folder="online")
    with refused:
        go_on(2, other, online=False, run_folder="online")


@pytest.mark.timeout(600)
def test_captions_matter(captioned: tuple[Path, Path]) -> None:
    """Dropping all of them is another run, in which the null caption alone is trained."""
    given = text_config(captioned, "data.condition_dropout=0.999", *KINDS["sgd"])
    single, other = (
        traced(given, 1, 1, 0)[0],
        traced(text_config(captioned, "data.condition_dropout=0", *KINDS["sgd"]), 1, 1, 0)[0],
    )
    assert differences([single], other)["loss"] > 1e-6
    moved = {
        name: torch.linalg.vector_norm(single["ema"][name] - other["ema"][name])
        for name in ("caption.null", "caption.fc1.weight")
    }
    assert all(float(distance) > 0 for distance in moved.values())
