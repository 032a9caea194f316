"""TensorBoard and Weights & Biases: what they are given, once for each step also over a resume, and that none of them
costs a run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diffmoe_ep.config import Config, ConfigError, from_tree
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train import boards as showing
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.boards import Boards, check_boards, scalars
from ranks import RankError, run
from train.runs import config


def test_numbers_have_names_and_layers_their_own() -> None:
    line = {
        "step": 3, "samples": 24, "time": "2026-11-27T14:03:27.123+00:00", "loss": 0.5, "epoch": {"a": 1.5},
        "capacity": 1.0, "capacity_per_layer": [0.9, 1.1], "capacity_per_expert": [[0.8, 1.0], [1.1, 1.1]],
    }  # fmt: skip
    assert scalars(line) == {
        "train/step": 3, "train/samples": 24, "train/loss": 0.5, "epoch/a": 1.5, "train/capacity": 1.0,
        "capacity/layer_00": 0.9, "capacity/layer_01": 1.1,
    }  # fmt: skip


@pytest.mark.parametrize(("package", "extra"), [("tensorboard", "log"), ("wandb", "wandb")])
def test_a_missing_package_is_named(package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its name, as wandb leaves them behind, is none."""
    for name in (package, "nothing"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ConfigError) as refused:
        check_boards(from_tree({}, [f"log.{package}=true"]))
    assert str(refused.value) == (
        f"log.{package}=true needs {package}, which is not installed: pip install 'diffmoe_ep[{extra}]', or set "
        f"log.{package}=false"
    )
    check_boards(Config())


def prepares(rank: int, given: Config) -> None:
    mesh = training.start_mesh(given)
    training.prepare(given, mesh)


@pytest.mark.slow
def test_it_is_named_on_every_rank_before_anything_is_built(digits: Path, tmp_path: Path) -> None:
    if showing.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(RankError, match=r"log\.wandb=true needs wandb, which is not installed"):
        run(2, prepares, config(digits / "train", tmp_path / "run", "log.wandb=true"))


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def goes_on(rank: int, given: Config) -> None:
    mesh = training.start_mesh(given)
    dataset, checkpoint = training.prepare(given, mesh)
    training.Trainer(given, mesh, dataset, checkpoint).run()


def dies(rank: int, given: Config) -> None:
    """Train to the end, but lose the checkpoint of the last step, as a run that is killed before it is written."""
    goes_on(rank, given)
    if rank == 0:
        folder = Path(given.folder) / "checkpoints"
        (folder / f"step-{given.train.steps:07d}").rename(Path(given.folder) / "lost")
        (folder / "latest").unlink()


@pytest.mark.slow
def test_tensorboard_has_each_step_once_with_its_grids_and_layers(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    every = ("log.tensorboard=true", "sample.grid_every=2", "sample.grid_size=2", "sample.steps=1")
    given = config(digits / "train", tmp_path / "run", "train.steps=5", "checkpoint.every=3", *every)
    run(2, dies, given)
    run(1, goes_on, given)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    batch = given.train.global_batch
    for tag in ("train/loss", "train/grad_norm", "capacity/layer_00", "capacity/layer_01"):
        assert [event.step for event in events.Scalars(tag)] == [batch * step for step in range(1, 6)]
    assert [event.step for event in events.Images("grid")] == [2 * batch, 4 * batch, 5 * batch]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    shown = events.Images("grid")[0]
    from PIL import Image

    with Image.open(tmp_path / "run/samples/step-0000002.png") as image:
        assert (shown.width, shown.height) == image.size


# -- Weights & Biases, by a stand-in -----------------------------------------------------------------------------------

STAND_IN = """
import json

class Run:
    def __init__(self, told): self.told = told
    def keep(self, *words):
        with open(f"{self.told['dir']}/told.jsonl", "a") as file:
            file.write(json.dumps(words, default=str) + "\\n")
    def define_metric(self, name, step_metric): self.keep("metric", name, step_metric)
    def log(self, values):
        if values["samples"] >= FAILS_AT: raise ConnectionError("the network is gone")
        self.keep("log", values)
    def mark_preempting(self): self.keep("preempting")
    def finish(self, exit_code): self.keep("finish", exit_code)

FAILS_AT = 1e9
def Settings(**settings): return settings
def Image(path): return f"image {path}"
def init(**told):
    if told["name"] == "refused": raise RuntimeError("No API key\\n  configured")
    run = Run(told)
    run.keep("init", told)
    return run
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package wandb that writes down what it is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb")


def told(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def opened(folder: Path, step: int = 0, data: str = "data") -> Boards:
    folder.mkdir(exist_ok=True)
    tree = {"folder": str(folder), "log": {"wandb": True}, "data": {"folder": data}}
    return Boards(from_tree(tree), Mesh(), step)


LINE = {"step": 1, "samples": 256, "loss": 0.5, "capacity_per_layer": [0.9]}


def test_wandb_gets_one_run_over_all_resumes_and_no_credentials(tmp_path: Path, wandb: Any) -> None:
    folder = tmp_path / "digits"
    first = opened(folder, data="https://me:word@host/data?X-Amz-Signature=abc&part=1")
    first.write(LINE)
    (folder / "grid.png").write_bytes(b"")
    first.picture("grid", folder / "grid.png", 256)
    first.picture("grid", folder / "missing.png", 256)
    first.close(finished=False)
    opened(folder, step=1).close(finished=True)
    (_, start), metric, logged, grid, preempting, end, (_, again), _, last = told(folder)
    assert start["id"] == again["id"] == json.loads((folder / "wandb.json").read_text())["id"]
    assert (start["name"], start["resume"], start["dir"]) == ("digits", "allow", str(folder))
    assert start["config"]["data"]["folder"] == "https://***@host/data?X-Amz-Signature=***&part=1"
    assert start["config"]["train"]["global_batch"] == 256
    assert start["settings"]["x_disable_meta"]  # which would send the command line
    assert metric == ["metric", "*", "samples"]
    assert logged == ["log", {"train/step": 1, "train/samples": 256, "train/loss": 0.5, "capacity/layer_00": 0.9,
                              "samples": 256}]  # fmt: skip
    assert grid == ["log", {"grid": f"image {folder / 'grid.png'}", "samples": 256}]
    assert (preempting, end, last) == (["preempting"], ["finish", 1], ["finish", 0])


def test_a_board_that_fails_is_told_and_left_out(
    tmp_path: Path, wandb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    boards = opened(tmp_path / "run")
    wandb.FAILS_AT = 0
    for _ in range(3):
        boards.write(LINE)
    boards.close(finished=True)
    assert capsys.readouterr().err == "log.wandb failed (the network is gone); the run goes on without it\n"
    assert [kind for kind, *_ in told(tmp_path / "run")] == ["init", "metric"]


def test_a_board_that_cannot_be_opened_is_an_error(tmp_path: Path, wandb: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path / "refused")
    assert str(refused.value) == (
        "log.wandb=true cannot be opened (No API key configured); mend that, or set log.wandb=false"
    )
