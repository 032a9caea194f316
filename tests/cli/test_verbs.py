"""The verbs around training: plan, capacity, import and export, prompts, and every solver through the command, on ranks
too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.test_cli import TINY, call, train_busy
from diffmoe_ep import load_model
from diffmoe_ep.checkpoint.load import config_of
from ranks import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flow(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps from busy weights, under rectified flow."""
    return trained(digits, tmp_path_factory.mktemp("flow") / "run")


@pytest.fixture(scope="module")
def ddpm(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under DDPM with learned variance."""
    return trained(
        digits,
        tmp_path_factory.mktemp("ddpm") / "run",
        "train.objective=ddpm",
        "model.out_channels=2",
        "sample.sampler=ddpm",
    )


def trained(digits: Path, folder: Path, *more: str, config: str = "digits") -> Path:
    arguments = (
        "train",
        f"configs/{config}.yaml",
        f"data.folder={digits / 'train'}",
        f"folder={folder}",
        *TINY,
        "train.steps=6",
        *more,
    )
    code, _, err = run(1, train_busy, *arguments)[0]
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random T5 (t5), canvases of digits with its features (data), and a run of a few steps on them
    (run).
    """
    pytest.importorskip("transformers", reason="transformers is not installed")
    from data_prep.__main__ import main

    folder = tmp_path_factory.mktemp("text")
    main(["tiny_t5", "--out", str(folder / "t5"), "--steps", "0", "--width", "16", "--layers", "1"])
    captions = [
        "digits_captions",
        "--out",
        str(folder / "data"),
        "--samples",
        "1500",
        "--heldout",
        "100",
        "--t5-length",
        "60",
    ]
    main([*captions, "--t5", str(folder / "t5")])
    more = (
        "model.text_width=16",
        "model.text_length=60",
        f"text.folder={folder / 't5'}",
        "sample.grid_every=6",
        "sample.grid_size=4",
    )
    trained(folder / "data", folder / "run", *more, config="text/digits_diffmoe")
    return folder


PROMPTS = (
    "--prompt",
    "one 3",
    "--prompt",
    "two digits: an 8 at the top left and a 5 at the bottom right",
    "--prompt",
    "",
)


def drawn(world: int, path: Path, out: Path, *more: str) -> tuple[np.ndarray, str]:
    """Latents of prompts, and what was said on standard error."""
    results = run(world, call, "sample", str(path), "--out", str(out), *more)
    assert [code for code, _, _ in results] == [0] * world, results[0][2]
    assert all("prompt" not in err for _, _, err in results[1:])  # said once
    with np.load(out / "samples.npz") as arrays:
        assert len(arrays["labels"]) == 0
        return np.array(arrays["latents"]), results[0][2]


@pytest.mark.parametrize(
    "settings", [(), ("sample.selection=count",), ("sample.sampler=heun", "--negative", "three 0s")]
)
def test_prompts_do_not_depend_on_the_ranks(text: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Law 7 for prompts: the first rank encodes, all see the same bits; and grid and prompts.json lie beside the
    samples.
    """
    asked = (*PROMPTS, "--per-prompt", "3", "seed=40", *settings)
    single, said = drawn(1, text / "run", tmp_path / "1", *asked)
    assert single.shape == (9, 1, 24, 24) and np.isfinite(single).all()
    assert "diffmoe: an empty prompt is drawn as the null caption" in said
    assert np.array_equal(drawn(2, text / "run", tmp_path / "2", *asked)[0], single)
    assert (
        np.abs(drawn(2, text / "run", tmp_path / "22", *asked, "parallel.expert_parallel=2")[0] - single).max() < 1e-4
    )
    told = json.loads((tmp_path / "1/prompts.json").read_text())
    assert [image["seed"] for image in told["images"]] == list(range(40, 49))
    assert [image["prompt"] for image in told["images"]] == [words for words in PROMPTS[1::2] for _ in range(3)]
    assert told["negative"] == ("three 0s" if "--negative" in settings else None)
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"samples.npz", "prompts.json", "grid.png"}


def test_an_image_can_be_drawn_again_by_its_prompt_and_seed(text: Path, tmp_path: Path) -> None:
    together, _ = drawn(1, text / "run", tmp_path / "all", *PROMPTS, "--per-prompt", "2", "seed=7")
    alone, _ = drawn(1, text / "run", tmp_path / "one", *PROMPTS[2:4], "seed=10")
    assert np.abs(alone[0] - together[3]).max() < 1e-4  # its chunk has another size: to rounding
    assert np.abs(together[2] - together[3]).max() > 0.1
    swapped, _ = drawn(1, text / "run", tmp_path / "swapped", "--prompt", "three 0s", "seed=10")
    assert np.abs(swapped[0] - together[3]).max() > 1e-3  # words matter


def test_prompts_come_from_a_file_and_long_ones_are_cut(text: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# what to draw\none 3\n" + "a 3 above an 8, " * 9 + "\n", encoding="utf-8")
    latents, said = drawn(
        1, text / "run", tmp_path / "file", "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "one 8"
    )
    assert len(latents) == 3
    assert "diffmoe: the prompt 'a 3 above an 8, " in said and "has more than 60 tokens and is cut there" in said
    same, _ = drawn(
        1,
        text / "run",
        tmp_path / "same",
        "--prompt",
        "one 8",
        "--prompt",
        "one 3",
        "--prompt",
        ("a 3 above an 8, " * 9)[:59],
    )
    assert np.array_equal(same, latents)  # 59 bytes and an end
    assert json.loads((tmp_path / "file/prompts.json").read_text())["images"][0]["prompt"] == "one 8"


MISTAKES = {
    "no prompt": ([], 'say what to draw: --prompt "...", or --prompts FILE'),
    "classes": (["--classes", "1,2"], "--classes is given, but the model is conditioned on captions"),
    "samples": ([*PROMPTS, "--samples", "3"], "--samples is 3, but prompts say how many are drawn; give --per-prompt"),
    "per prompt": ([*PROMPTS, "--per-prompt", "0"], "--per-prompt is 0; it must be at least 1"),
    "no guidance": (
        [*PROMPTS, "--negative", "a 3", "sample.guidance=1"],
        "--negative needs guidance, but sample.guidance is 1",
    ),
    "no file": (["--prompts", "/absent.txt"], "--prompts /absent.txt cannot be read"),
    "no encoder": ([*PROMPTS, "text.folder=/absent"], "the t5 folder /absent is not a folder"),
    "not named": ([*PROMPTS, "text.folder=null"], "text.folder is not set, so prompts cannot be encoded"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_with_prompts_are_named(text: Path, tmp_path: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    results = run(2, call, "sample", str(text / "run"), "--out", str(tmp_path), *arguments)
    assert [code for code, _, _ in results] == [2, 2]
    assert message in results[0][2]
    assert sum("error:" in err for _, _, err in results) == 1


def test_another_encoder_is_refused_by_both_fingerprints(text: Path, tmp_path: Path) -> None:
    from data_prep.__main__ import main

    main(["tiny_t5", "--out", str(tmp_path / "t5"), "--steps", "0", "--width", "16", "--layers", "1", "--seed", "1"])
    code, _, err = run(
        1, call, "sample", str(text / "run"), "--out", str(tmp_path), *PROMPTS, f"text.folder={tmp_path / 't5'}"
    )[0]
    assert code == 2
    assert f"text.folder {tmp_path / 't5'} is another encoder (fingerprint " in err
    held = json.loads((text / "data/train/manifest.json").read_text())["text"][0]["fingerprint"]
    assert f"digits-captions-train (fingerprint {held[:12]})" in err


def test_prompts_for_a_model_of_classes_are_refused(flow: Path, digits: Path, tmp_path: Path) -> None:
    for arguments in (PROMPTS, ("--negative", "a 3")):
        code, _, err = call(0, "sample", str(flow), "--out", str(tmp_path), *arguments)
        assert code == 2
        assert "the model is conditioned on classes; give --classes" in err
    folders = ("--reference", str(digits / "train"), "--heldout", str(digits / "heldout"))
    code, _, err = call(0, "evaluate", str(flow), *folders, "--composition")
    assert code == 2
    assert "--composition scores samples of prompts, but the model is conditioned on classes" in err


def test_composition_is_scored_and_compared(text: Path, tmp_path: Path) -> None:
    folders = ("--reference", str(text / "data/train"), "--heldout", str(text / "data/heldout"))
    scored = ("evaluate", str(text / "run"), *folders)
    results = run(
        2, call, *scored, "--composition", "--samples", "16", "--out", str(text / "run/scores"), "sample.chunk=6"
    )
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    out = results[0][1]
    assert [line.split("  ")[0] for line in out.splitlines()[1:6]] == [
        "single object", "two objects", "counting", "position", "overall",
    ]  # fmt: skip
    found = json.loads((text / "run/scores/composition.json").read_text())
    assert found["overall_heldout"] > 0.95 > 0.5 > found["overall"]
    assert len(found["images"]) == 16 and {"prompt", "seed", "task", "right"} == set(found["images"][0])
    assert (text / "run/scores/grid.png").stat().st_size > 0
    assert len(list((text / "run/samples").glob("*.png"))) == 1  # the grid of the training
    code, out, err = call(0, "compare", "--composition", str(text / "run"), str(text / "run"))
    assert code == 0, err
    assert out.splitlines()[1] == out.splitlines()[2]
    assert out.splitlines()[1].split()[0] == "run"
    code, _, err = call(0, *scored)
    assert code == 2
    assert "its samples are scored with --composition" in err
    code, _, err = call(0, *scored, "--composition", "--samples", "6")
    assert code == 2
    assert "composition needs a multiple of 4, at least 8" in err
    code, _, err = call(0, "compare", "--composition", str(tmp_path))
    assert code == 2
    assert "has no config.yaml" in err


def test_capacity_is_reported_by_prompt(text: Path, tmp_path: Path) -> None:
    arguments = ("capacity", "report", str(text / "run"), "--out", str(tmp_path), "--per-prompt", "2", *PROMPTS[:4])
    code, out, err = run(1, call, *arguments)[0]
    assert code == 0, err
    assert "one 3" in out


def latents(world: int, path: Path, out: Path, *overrides: str) -> np.ndarray:
    code, _, err = run(world, call, "sample", str(path), "--out", str(out), "--samples", "10", *overrides)[0]
    assert code == 0, err
    with np.load(out / "samples.npz") as arrays:
        return np.array(arrays["latents"])


def test_plan_is_printed() -> None:
    code, out, _ = call(0, "plan", "configs/imagenet/diffmoe_l_e16_flow.yaml")
    assert code == 0
    assert "1,981,700,320" in out
    assert "470.8M; by the paper's Eq. 40: 459.4M" in out
    assert "454.3M" in call(0, "plan", "configs/imagenet/diffmoe_l_e16_flow.yaml", "--capacity", "0.95")[1]


@pytest.mark.parametrize("settings", [
    ("sample.sampler=heun",), ("sample.sampler=dopri5", "sample.rtol=1e-2", "sample.atol=1e-2"),
    ("sample.sampler=euler", "sample.guidance_interval=[0.3,0.8]"),
])  # fmt: skip
def test_flow_solvers_do_not_depend_on_the_ranks(flow: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Law 7 for every solver; with dopri5, ranks of one expert group need different numbers of evaluations and still
    end together.
    """
    if "sample.sampler=dopri5" in settings:
        pytest.importorskip("torchdiffeq")
    single = latents(1, flow, tmp_path / "1", *settings)
    assert np.isfinite(single).all()
    assert np.array_equal(latents(2, flow, tmp_path / "2", *settings), single)
    spread = np.abs(latents(2, flow, tmp_path / "22", "parallel.expert_parallel=2", *settings) - single).max()
    assert spread < (1e-3 if "sample.sampler=dopri5" in settings else 1e-4)
    assert np.abs(latents(1, flow, tmp_path / "0") - single).max() > 1e-4


@pytest.mark.parametrize(
    "settings", [("sample.sampler=ddpm",), ("sample.sampler=ddim",), ("sample.sampler=ddim", "sample.eta=1")]
)
def test_ddpm_solvers_do_not_depend_on_the_ranks(ddpm: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    single = latents(1, ddpm, tmp_path / "1", *settings)
    assert np.isfinite(single).all()
    assert np.array_equal(latents(2, ddpm, tmp_path / "2", *settings), single)


def test_a_solver_of_the_other_objective_is_refused(flow: Path, tmp_path: Path) -> None:
    code, _, err = call(0, "sample", str(flow), "--out", str(tmp_path / "out"), "sample.sampler=ddpm")
    assert code == 2
    assert "sample.sampler ddpm needs a model of train.objective ddpm" in err


def test_capacity_is_reported_and_searched(flow: Path, digits: Path, tmp_path: Path) -> None:
    code, out, err = run(
        1, call, "capacity", "report", str(flow), "--out", str(tmp_path / "report"), "--per-class", "2"
    )[0]
    assert code == 0, err
    assert "C_infer^avg" in out
    assert {"capacity_per_step.csv", "capacity_per_class.csv", "capacity_per_step.png"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }
    folders = ("--reference", str(digits / "train"), "--heldout", str(digits / "heldout"))
    arguments = (
        "capacity",
        "search",
        str(flow),
        "--thresholds",
        "0.3,0.6,dynamic",
        *folders,
        "--samples",
        "20",
        "--out",
        str(tmp_path / "search"),
    )
    code, out, err = run(1, call, *arguments)[0]
    assert code == 0, err
    assert "0.6" in out
    assert (tmp_path / "search/thresholds.csv").read_text().count("\n") == 4


def test_out_to_the_reference_and_back(flow: Path, tmp_path: Path) -> None:
    code, _, err = call(
        0, "export", str(flow), "--out", str(tmp_path / "single"), "--to-published", str(tmp_path / "reference.pt")
    )
    assert code == 0, err
    code, _, err = call(0, "import", "--published", str(tmp_path / "reference.pt"), "--out", str(tmp_path / "back"))
    assert code == 2
    assert "--heads" in err
    code, _, err = call(
        0, "import", "--published", str(tmp_path / "reference.pt"), "--out", str(tmp_path / "back"), "--heads", "2"
    )
    assert code == 0, err
    x, t, y = torch.randn(6, 1, 8, 8), torch.linspace(0.05, 0.95, 6), torch.tensor([0, 1, 2, 3, 4, 10])
    with torch.no_grad():
        ours, single, back = (
            load_model(path)(x, t, y).prediction for path in (flow, tmp_path / "single", tmp_path / "back")
        )
    assert torch.equal(single, ours)
    torch.testing.assert_close(back, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_a_single_folder_is_drawn_from_like_its_run(flow: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    code, _, err = call(0, "export", str(flow), "--out", str(single))
    assert code == 0, err
    ours = latents(1, flow, tmp_path / "run")
    assert np.array_equal(latents(1, single, tmp_path / "1"), ours)
    assert np.abs(latents(2, single, tmp_path / "2", "parallel.expert_parallel=2") - ours).max() < 1e-4
    code, _, err = run(
        1, call, "capacity", "report", str(single), "--out", str(tmp_path / "report"), "--per-class", "2"
    )[0]
    assert code == 0, err
    code, _, err = call(
        0, "sample", str(single), "--out", str(tmp_path / "other"), "--samples", "8", "sample.weights=model"
    )
    assert code == 2
    assert "holds one set of weights, ema, not model" in err
    code, _, err = call(0, "export", str(single), "--to-published", str(tmp_path / "file.pt"), "--weights", "model")
    assert code == 2
    assert "leave --weights away" in err


@pytest.mark.parametrize("world", [1, 2])
def test_an_import_is_sampled_as_the_reference_samples(flow: Path, tmp_path: Path, world: int) -> None:
    out = tmp_path / "imported"
    assert call(0, "export", str(flow), "--to-published", str(tmp_path / "file.pt"))[0] == 0
    assert (
        call(0, "import", "--published", str(tmp_path / "file.pt"), "--out", str(out), "--heads", "2", "--one-set")[0]
        == 0
    )
    assert config_of(out).sample.selection == "count"
    settings = ("sample.steps=4", "sample.chunk=8", "sample.guidance=1")
    theirs = latents(world, out, tmp_path / "theirs", *settings, f"parallel.expert_parallel={world}")
    ours = latents(1, flow, tmp_path / "ours", *settings, "sample.selection=count")
    assert np.abs(theirs - ours).max() < 1e-3 * np.abs(ours).max()


def test_nothing_to_export_is_named(flow: Path) -> None:
    code, _, err = call(0, "export", str(flow))
    assert code == 2
    assert "give --out FOLDER" in err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verify_tells_deepspeed_its_device_before_it_is_imported(device: str) -> None:
    """DeepSpeed decides on a device when it is imported, and would take a GPU that it finds."""
    program = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed":
            print("deepspeed sees", os.environ.get("DS_ACCELERATOR"))
            raise SystemExit
sys.meta_path.insert(0, Watch())
from diffmoe_ep.cli import main
main(["verify", "--device", "{device}"])
"""
    kept = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"deepspeed sees {device}\n", done.stderr
