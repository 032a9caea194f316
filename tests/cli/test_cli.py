"""What users meet: verbs, the dry run, and one clear message for each mistake, on every rank."""

import contextlib
import io
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from diffmoe_ep.cli import main
from diffmoe_ep.train import trainer as training
from ranks import run
from train.runs import busy

TINY = [
    "data.workers=0",
    "model.hidden_size=16",
    "model.num_blocks=2",
    "model.num_heads=2",
    "train.global_batch=8",
    "train.steps=2",
    "log.every=1",
    "sample.grid_every=0",
    "sample.steps=2",
    "sample.chunk=4",
    "parallel.expert_parallel=1",
]


def call(rank: int, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, patience=0.0)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def train(digits: Path, folder: Path, *more: str) -> tuple[str, ...]:
    return ("train", "configs/digits.yaml", f"data.folder={digits / 'train'}", f"folder={folder}", *TINY, *more)


def test_the_dry_run_tells_and_stops(digits: Path, tmp_path: Path) -> None:
    code, out, _ = call(0, "train", "configs/digits.yaml", f"folder={tmp_path / 'run'}", "--dry-run")
    assert code == 0
    assert "num_experts: 8" in out
    assert "total       4,687,644         1,921,692" in out  # the plan's own table
    assert "rank 1: experts 4 to 7, copy 0 of 1" in out
    assert "pool of 128 samples, 2048 tokens, over 2 ranks; each expert takes 256" in out
    assert not (tmp_path / "run").exists()


def test_every_key_is_printed() -> None:
    code, out, _ = call(0, "keys")
    assert code == 0
    assert "execution  parallel.expert_parallel: int = 1\n           expert parallelism EP" in out


MISTAKES = {
    "unknown key": (["train.stps=1"], "unknown key train.stps; did you mean train.steps?"),
    "wrong type": (["train.steps=lots"], "train.steps: expected int"),
    "experts over ranks": (
        ["parallel.expert_parallel=3"],
        "model.num_experts 8 is not a multiple of parallel.expert_parallel 3",
    ),
    "ranks over experts": (
        ["parallel.expert_parallel=4"],
        "parallel.expert_parallel is 4 but only 2 processes were started",
    ),
    "batch": (["train.global_batch=9"], "do not divide over 2 ranks"),
    "capacity": (["pool.capacity=0.001"], "= 0 tokens; it must be at least 1"),
    "zero": (["parallel.zero_stage=3"], "DeepSpeed refuses ZeRO-3"),
    "no data": (["data.folder=/nonexistent/digits"], "/nonexistent/digits"),
    "other classes": (["model.num_classes=11"], "set model.num_classes=10"),
    "other shape": (["model.input_size=16"], "set model.in_channels=1 model.input_size=8"),
    "write permission": (["folder=/proc/run"], "folder /proc/run cannot be written"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_every_rank_with_one_message(digits: Path, tmp_path: Path, mistake: str) -> None:
    overrides, message = MISTAKES[mistake]
    results = run(2, call, *train(digits, tmp_path / "run", *overrides), timeout=60)
    assert [code for code, _, _ in results] == [2, 2]
    told = results[0][2].strip().splitlines()[-1]
    assert told.startswith("diffmoe: error: ")
    assert message in told
    assert "error:" not in results[1][2]  # said once for all
    assert all("Traceback" not in err for _, _, err in results)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "missing shard", "truncated shard", "broken manifest"])
def test_damaged_data_end_every_rank(digits: Path, tmp_path: Path, damage: str) -> None:
    data = tmp_path / "train"
    shutil.copytree(digits / "train", data)
    shard = sorted(data.glob("*.tar"))[1]
    match damage:
        case "empty":
            shutil.rmtree(data)
            data.mkdir()
        case "missing shard":
            shard.unlink()
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-512])
        case "broken manifest":
            (data / "manifest.json").write_text('{"format": 1}')
    results = run(2, call, *train(tmp_path, tmp_path / "run", "data.max_bad_fraction=0"), timeout=60)
    assert [code for code, _, _ in results] == [2, 2]
    told = results[0][2].strip().splitlines()[-1]
    assert str(data) in told
    assert "python -m data_prep digits" in told
    if "shard" in damage:
        assert shard.name in told


@pytest.mark.slow
def test_a_damaged_shard_is_told_and_its_samples_replaced_where_some_may_be_bad(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "train"
    shutil.copytree(digits / "train", data)
    shard = sorted(data.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-512])
    results = run(2, call, *train(tmp_path, tmp_path / "run"), timeout=60)
    assert [code for code, _, _ in results] == [0, 0]
    assert shard.name in results[0][2] and "its bad samples will be replaced" in results[0][2]
    assert shard.name not in results[1][2]  # said once for all


@pytest.mark.slow
def test_a_run_is_finished_or_goes_on(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(1, call, *train(digits, folder))[0][0] == 0
    code, out, _ = run(1, call, *train(digits, folder))[0]
    assert code == 0
    assert "is finished: step 2 of 2" in out
    code, _, err = run(1, call, *train(digits, folder, "train.steps=3"))[0]
    assert code == 0
    assert "continues at step 2" in err
    assert (folder / "checkpoints/latest").read_text().strip() == "step-0000003"
    code, _, err = run(1, call, *train(digits, folder, "resume=never", "train.steps=4"))[0]
    assert code == 2
    assert "resume is never; set resume=auto or give another folder" in err
    code, _, err = run(2, call, *train(digits, folder, "model.hidden_size=32", "train.steps=4"))[0]
    assert code == 2
    assert "is a checkpoint of another model: model.hidden_size is 16 there and 32 here" in err
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "curves.png"):
        assert (folder / name).stat().st_size > 0


def train_busy(rank: int, *arguments: str) -> tuple[int, str, str]:
    """Train from weights that all take part at once: from the zero start two steps would leave the experts without a
    say.
    """
    with mock.patch.object(training, "initialize", busy(0.3)):
        return call(rank, *arguments)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_ranks(digits: Path, tmp_path: Path) -> None:
    """Law 7: the same bits for any number of ranks at EP 1, in every selection mode; at EP 2 within rounding."""
    code, _, err = run(1, train_busy, *train(digits, tmp_path / "run", "train.steps=6"))[0]
    assert code == 0, err
    drawn = {}
    for world, expert in ((1, 1), (2, 1), (2, 2), (4, 2)):
        for selection in ("threshold", "count", "topk"):
            out = tmp_path / f"{world}{expert}{selection}"
            chosen = (f"sample.selection={selection}", f"parallel.expert_parallel={expert}")
            code, printed, err = run(
                world, call, "sample", str(tmp_path / "run"), "--out", str(out), "--samples", "18", *chosen
            )[0]
            assert code == 0, err
            assert "C_infer^avg" in printed
            with np.load(out / "samples.npz") as arrays:
                drawn[world, expert, selection] = arrays["latents"]
            assert (out / "grid.png").stat().st_size > 0
    assert (
        np.abs(drawn[1, 1, "threshold"] - drawn[1, 1, "count"]).max() > 1e-2
    )  # the experts' choice is seen in the samples
    assert np.abs(drawn[1, 1, "topk"] - drawn[1, 1, "count"]).max() > 1e-2
    for (world, expert, selection), latents in drawn.items():
        single = drawn[1, 1, selection]
        assert latents.shape == (18, 1, 8, 8)
        assert np.array_equal(latents, single) if expert == 1 else np.abs(latents - single).max() < 1e-4, (
            world,
            expert,
            selection,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "0"), "--samples is 0"),
        (("seed=-1",), "seed is -1"),
        (("--classes", "3,10"), "class 10 does not exist: the model has classes 0 to 9"),
        (("sample.guidance=.nan",), "sample.guidance: expected a finite number"),
        (("sample.selection=topk", "sample.capacity=0.01"), "sample.capacity 0.01 with a pool of"),
        (("parallel.expert_parallel=2",), "parallel.expert_parallel is 2 and 1 process was started"),
    ],
)
def test_mistakes_in_sampling_are_named(
    trained: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = call(0, "sample", str(trained), "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_scores_need_fitting_images(trained: Path, digits: Path, tmp_path: Path) -> None:
    folders = ("--reference", str(digits / "train"), "--heldout", str(digits / "heldout"))
    code, _, err = call(0, "evaluate", str(trained), *folders, "--samples", "1")
    assert code == 2
    assert "--samples is 1; scores need at least 2" in err


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, _, err = run(1, call, *train(digits, folder))[0]
    assert code == 0, err
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "nowhere", "--out", "unused"), "nowhere"),
        (("evaluate", "nowhere", "--reference", "nodata", "--heldout", "nodata"), "nowhere"),
        (("train", "nowhere.yaml"), "config file nowhere.yaml does not exist"),
    ],
)
def test_missing_paths_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(0, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
