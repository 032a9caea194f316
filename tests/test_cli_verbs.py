"""The verbs around training: plan, capacity, import and export, and every solver through the command, on ranks too."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ep import load_model
from diffmoe_ep.checkpoint.exchange import config_of
from ranks import run
from test_cli import TINY, call, train_busy


@pytest.fixture(scope="module")
def flow(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps from busy weights, under rectified flow."""
    return trained(digits, tmp_path_factory.mktemp("flow") / "run")


@pytest.fixture(scope="module")
def ddpm(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under DDPM with learned variance."""
    return trained(digits, tmp_path_factory.mktemp("ddpm") / "run", "train.objective=ddpm", "model.out_channels=2", "sample.sampler=ddpm")


def trained(digits: Path, folder: Path, *more: str) -> Path:
    arguments = ("train", "configs/digits.yaml", f"data.folder={digits / 'train'}", f"folder={folder}", *TINY, "train.steps=6", *more)
    code, _, err = run(1, train_busy, *arguments)[0]
    assert code == 0, err
    return folder


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
    """Law 7 for every solver; with dopri5, ranks of one expert group need different numbers of evaluations and still end together."""
    if "sample.sampler=dopri5" in settings:
        pytest.importorskip("torchdiffeq")
    single = latents(1, flow, tmp_path / "1", *settings)
    assert np.isfinite(single).all()
    assert np.array_equal(latents(2, flow, tmp_path / "2", *settings), single)
    spread = np.abs(latents(2, flow, tmp_path / "22", "parallel.expert=2", *settings) - single).max()
    assert spread < (1e-3 if "sample.sampler=dopri5" in settings else 1e-4)
    assert np.abs(latents(1, flow, tmp_path / "0") - single).max() > 1e-4


@pytest.mark.parametrize("settings", [("sample.sampler=ddpm",), ("sample.sampler=ddim",), ("sample.sampler=ddim", "sample.eta=1")])
def test_ddpm_solvers_do_not_depend_on_the_ranks(ddpm: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    single = latents(1, ddpm, tmp_path / "1", *settings)
    assert np.isfinite(single).all()
    assert np.array_equal(latents(2, ddpm, tmp_path / "2", *settings), single)


def test_a_solver_of_the_other_objective_is_refused(flow: Path, tmp_path: Path) -> None:
    code, _, err = call(0, "sample", str(flow), "--out", str(tmp_path / "out"), "sample.sampler=ddpm")
    assert code == 2
    assert "sample.sampler ddpm needs a model of train.objective ddpm" in err


def test_capacity_is_reported_and_searched(flow: Path, digits: Path, tmp_path: Path) -> None:
    code, out, err = run(1, call, "capacity", "report", str(flow), "--out", str(tmp_path / "report"), "--per-class", "2")[0]
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
    code, _, err = call(0, "export", str(flow), "--out", str(tmp_path / "single"), "--to-reference", str(tmp_path / "reference.pt"))
    assert code == 0, err
    code, _, err = call(0, "import", "--reference", str(tmp_path / "reference.pt"), "--out", str(tmp_path / "back"))
    assert code == 2
    assert "--heads" in err
    code, _, err = call(0, "import", "--reference", str(tmp_path / "reference.pt"), "--out", str(tmp_path / "back"), "--heads", "2")
    assert code == 0, err
    x, t, y = torch.randn(6, 1, 8, 8), torch.linspace(0.05, 0.95, 6), torch.tensor([0, 1, 2, 3, 4, 10])
    with torch.no_grad():
        ours, single, back = (load_model(path)(x, t, y).prediction for path in (flow, tmp_path / "single", tmp_path / "back"))
    assert torch.equal(single, ours)
    torch.testing.assert_close(back, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_a_single_folder_is_drawn_from_like_its_run(flow: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    code, _, err = call(0, "export", str(flow), "--out", str(single))
    assert code == 0, err
    ours = latents(1, flow, tmp_path / "run")
    assert np.array_equal(latents(1, single, tmp_path / "1"), ours)
    assert np.abs(latents(2, single, tmp_path / "2", "parallel.expert=2") - ours).max() < 1e-4
    code, _, err = run(1, call, "capacity", "report", str(single), "--out", str(tmp_path / "report"), "--per-class", "2")[0]
    assert code == 0, err
    code, _, err = call(0, "sample", str(single), "--out", str(tmp_path / "other"), "--samples", "8", "sample.weights=model")
    assert code == 2
    assert "holds one set of weights, ema, not model" in err
    code, _, err = call(0, "export", str(single), "--to-reference", str(tmp_path / "file.pt"), "--weights", "model")
    assert code == 2
    assert "leave --weights away" in err


@pytest.mark.parametrize("world", [1, 2])
def test_an_import_is_sampled_as_the_reference_samples(flow: Path, tmp_path: Path, world: int) -> None:
    out = tmp_path / "imported"
    assert call(0, "export", str(flow), "--to-reference", str(tmp_path / "file.pt"))[0] == 0
    assert call(0, "import", "--reference", str(tmp_path / "file.pt"), "--out", str(out), "--heads", "2", "--one-set")[0] == 0
    assert config_of(out).sample.selection == "count"
    settings = ("sample.steps=4", "sample.chunk=8", "sample.guidance=1")
    theirs = latents(world, out, tmp_path / "theirs", *settings, f"parallel.expert={world}")
    ours = latents(1, flow, tmp_path / "ours", *settings, "sample.selection=count")
    assert np.abs(theirs - ours).max() < 1e-3 * np.abs(ours).max()


def test_nothing_to_export_is_named(flow: Path) -> None:
    code, _, err = call(0, "export", str(flow))
    assert code == 2
    assert "give --out FOLDER" in err
