"""What a run tells: metrics that survive a kill, speeds that are right, and a stop when the loss is no number."""

import io
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffmoe_ep.config import Config, ConfigError, TrainConfig
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.planner.plan import plan
from diffmoe_ep.train import metrics as measuring
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.metrics import Clock, TrafficMeter, Utilization, peak_memory, peak_tflops
from diffmoe_ep.train.progress import Progress, duration, figures
from diffmoe_ep.train.run_folder import MetricsFile, RunFolder
from ranks import run
from train.runs import config


def test_metrics_keep_what_a_resume_does_not_repeat(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": step / 2})
    metrics.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')  # torn by a kill
    again = MetricsFile(path, 3)
    again.write({"step": 4, "loss": 7.0})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}, {"step": 4, "loss": 7.0},
    ]  # fmt: skip


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    full = mock.Mock(write=mock.Mock(side_effect=OSError(28, "No space left on device")))
    told = r"metrics\.jsonl cannot be written \(No space left on device\)"
    with mock.patch.object(metrics, "file", full), pytest.raises(ConfigError, match=told):
        metrics.write({"step": 1})


def test_speed_leaves_out_what_is_no_training() -> None:
    now = iter([100.0, 110.0, 112.0, 120.0, 124.0, 130.0, 140.0])
    with mock.patch.object(measuring.time, "monotonic", side_effect=now):
        clock = Clock(40)  # at 100
        assert clock.wait(lambda: "batch") == "batch"  # 110 to 112
        clock.pause(lambda: None)  # 120 to 124
        train = TrainConfig(global_batch=8, steps=100)
        first = clock.lap(50, train)  # at 130: 30 s less a pause of 4
        second = clock.lap(60, train)  # at 140
    assert abs(datetime.fromisoformat(first.pop("time")).timestamp() - time.time()) < 600
    assert datetime.fromisoformat(second.pop("time")).utcoffset() == timedelta(0)
    assert first == {
        "samples_per_second": pytest.approx(10 * 8 / 26),
        "data_wait": pytest.approx(2 / 26),
        "seconds": 30.0,
        "eta_seconds": pytest.approx(50 * 30 / 10),  # pauses included, which come again
    }
    assert second == {
        "samples_per_second": pytest.approx(10 * 8 / 10),
        "data_wait": 0.0,
        "seconds": 40.0,
        "eta_seconds": pytest.approx(40 * 40 / 20),
    }


def test_what_saves_keep_training_is_told_once() -> None:
    now = iter([0.0, 10.0, 10.5, 20.0, 20.25, 30.0, 40.0])
    with mock.patch.object(measuring.time, "monotonic", side_effect=now):
        clock, train = Clock(0), TrainConfig(global_batch=8, steps=100)
        assert clock.stall(lambda: None) == 0.5
        assert clock.stall(lambda: None) == 0.25
        first, second = clock.lap(10, train), clock.lap(20, train)
    assert first["save_stall_ms"] == 750.0
    assert first["samples_per_second"] == pytest.approx(10 * 8 / 29.25)
    assert "save_stall_ms" not in second


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_run_logs_what_its_saves_cost(digits: Path, tmp_path: Path, background: bool) -> None:
    kept = ["train.steps=6", "checkpoint.every=2", f"checkpoint.background={str(background).lower()}"]
    given = config(digits / "train", tmp_path / "run", *kept)
    run(1, stalls, given)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("save_stall_ms", 0) > 0] == [3, 5]


def stalls(rank: int, given: Config) -> None:
    mesh = training.start_mesh(given)
    training.Trainer(given, mesh, training.prepare(given, mesh)[0]).run()


LOGGED = {
    "step": 8, "time": "2026-11-27T14:03:27.123+00:00", "loss": 2.0, "grad_norm": 0.3, "lr": 1e-4, "capacity": 0.98,
    "samples_per_second": 123.4, "peak_memory_gb": 12.34, "eta_seconds": 75.0,
}  # fmt: skip


def test_progress_in_a_file_is_a_line_for_each_step_that_is_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC-2")  # two hours before UTC, as POSIX counts
    time.tzset()
    progress = Progress("the run starts", 0, 20)
    progress.show(LOGGED)
    dense = {key: value for key, value in LOGGED.items() if key != "capacity"}
    progress.show(dense | {"step": 16, "loss": 1.0, "grad_norm": 12.0, "mfu": 0.414})
    progress.close()
    monkeypatch.undo()
    time.tzset()
    told = capsys.readouterr().err
    assert "\r" not in told
    assert told.splitlines() == [
        "the run starts",
        "16:03:27  step  8/20  loss 2.0000  norm 0.300  lr 1.0e-04  C 0.98  123 samples/s  12.3 GB  ETA 1m15s",
        "16:03:27  step 16/20  loss 1.8000  norm 12.0  lr 1.0e-04  123 samples/s  MFU 41.4%  12.3 GB  ETA 1m15s",
    ]


def test_a_line_fits_its_room_and_keeps_what_matters_most() -> None:
    whole = LOGGED | {"mfu": 0.414}
    lines = [figures(whole, room) for room in range(12, 130)]
    assert all(len(line) <= room for room, line in enumerate(lines, 12))
    assert lines[0] == "loss 2.0000"
    assert figures(whole, 40) == "loss 2.0000  123 samples/s  ETA 1m15s"
    assert lines[-1] == "loss 2.0000  norm 0.300  lr 1.0e-04  C 0.98  123 samples/s  MFU 41.4%  12.3 GB  ETA 1m15s"


def test_a_bar_on_a_terminal_keeps_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    progress = Progress("the run starts", 0, 100_000)
    progress.show(LOGGED | {"step": 50_000, "mfu": 0.414})
    progress.close()
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert len(last) <= 80
    assert re.fullmatch(r" 50%\|#+ +\| 50000/100000, loss 2\.0000  123 samples/s  ETA 1m15s", last)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (200, "3m20s"), (5 * 3600 + 7 * 60, "5h07m"), (2 * 86400 + 3 * 3600, "2d03h")],
)
def test_a_time_left_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert RunFolder(tmp_path / "run").problem() is None
    assert "cannot be written (Not a directory)" in (RunFolder(tmp_path / "file/run").problem() or "")


def diverges(rank: int, given: Config) -> tuple[str, bool, list[str]]:
    """Train with a gradient that is infinite at step 3, on one rank; log and save at step 4."""
    mesh = training.start_mesh(given)
    trainer = training.Trainer(given, mesh, training.prepare(given, mesh)[0])
    weight = trainer.model.blocks[0].attention.qkv.weight  # type: ignore[union-attr]
    spoil = torch.tensor(float("inf"))
    hook: Any = lambda gradient: gradient + spoil if trainer.step == 2 and rank == 0 else gradient  # noqa: E731
    weight.register_hook(hook)  # type: ignore[union-attr, operator]
    try:
        trainer.run()
    except ConfigError as error:
        return str(error), error.everywhere, [path.name for path in trainer.folder.checkpoints.glob("step-*")]
    return "", False, []


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_diverged_run_stops_on_every_rank_and_is_not_saved(digits: Path, tmp_path: Path, zero: int) -> None:
    given = config(
        digits / "train", tmp_path / "run", "log.every=4", "checkpoint.every=4", f"parallel.zero_stage={zero}"
    )
    for told, everywhere, saved in run(2, diverges, given):
        assert "the run has diverged and is not saved" in told
        assert everywhere
        assert saved == []


def finishes(rank: int, given: Config) -> list[str]:
    mesh = training.start_mesh(given)
    training.Trainer(given, mesh, training.prepare(given, mesh)[0]).run()
    return sorted(str(path.relative_to(given.folder)) for path in Path(given.folder).rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_picture_that_fails_costs_no_run(digits: Path, tmp_path: Path) -> None:
    """A folder stands where the grid should go: the run says so and saves its checkpoint all the same."""
    (tmp_path / "run/samples/step-0000002.png").mkdir(parents=True)
    given = config(
        digits / "train",
        tmp_path / "run",
        "train.steps=2",
        "sample.grid_every=2",
        "sample.steps=1",
        "parallel.expert_parallel=2",
    )
    files: list[Any] = run(2, finishes, given)
    assert "checkpoints/step-0000002/meta.json" in files[0]
    assert "curves.png" in files[0]


def test_the_meter_counts_training_steps_alone() -> None:
    mesh = Mesh(expert=Group(2), pool=Group(4))
    meter = TrafficMeter(mesh)
    for bytes_of_step in (100, 300):
        with meter.step():
            mesh.expert.traffic.count(bytes_of_step)
            mesh.expert.traffic.syncs += 1
            mesh.pool.traffic.count(8)
            mesh.pool.traffic.count(8)
        mesh.expert.traffic.count(10**9)  # a sample grid
    assert meter.lap() == {
        "selection_bytes": 16.0, "selection_rounds": 2.0, "selection_syncs": 0.0,
        "dispatch_bytes": 200.0, "dispatch_rounds": 1.0, "dispatch_syncs": 1.0,
    }  # fmt: skip
    assert set(meter.lap().values()) == {0.0}
    assert TrafficMeter(Mesh()).lap() == {}


def test_utilization_is_the_plans_flops_over_the_peak_of_all_ranks() -> None:
    given = Config()
    mesh = Mesh(world=Group(4))
    assert Utilization(given, mesh).of(100.0) == {}  # a CPU's peak is not known
    with mock.patch.object(measuring, "peak_tflops", return_value=989.0):
        found = Utilization(given, mesh).of(100.0)
    assert found == {"mfu": pytest.approx(plan(given).training * 100 / (4 * 989e12))}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H20", 148),
     ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("Another", 0)],
)  # fmt: skip
def test_peaks_are_known_by_the_device_s_name(name: str, peak: float) -> None:
    with mock.patch.object(torch.cuda, "get_device_name", return_value=name):
        assert peak_tflops(torch.device("cuda", 0)) == peak


def test_memory_of_a_process_on_a_cpu_is_what_it_had_resident() -> None:
    """Pages that are written count; in bytes, whatever the unit of the system's counter."""
    before = peak_memory(torch.device("cpu"))
    assert 50e6 < before < 50e9
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    with mmap.mmap(-1, before - resident + 100_000_000) as held:  # 100 MB more than ever before, in pages of its own
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        grown = peak_memory(torch.device("cpu")) - before
    assert 90e6 < grown < 200e6


@pytest.mark.parametrize(
    ("strange", "lines"),
    [
        (b"\xff\xfe{\n", 1),
        (b'{"loss": 1.0}\n5\n[]\n', 3),
        (b'{"step": "3"}\n{"step": 1e999}\n', 2),
        (b'{"step": ' + b"9" * 5000 + b"}\n", 1),
        (b"[" * 5000 + b"\n", 1),
        (b"\0" * 512 + b"\n", 1),
    ],
)
def test_a_metrics_file_with_strange_lines_is_kept(
    tmp_path: Path, strange: bytes, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 5, "loss": NaN}\n' + strange + b'{"step": 10}\n{"step": 15}\n{"step": 20, "lo'
    path.write_bytes(content)
    MetricsFile(path, 10).close()
    assert path.read_text() == '{"step": 5, "loss": NaN}\n{"step": 10}\n'
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == content
    assert f"{path}: {lines} lines are no logged steps and go; it is kept as {aside.name}" in capsys.readouterr().err
    MetricsFile(path, 10).close()
    assert len(list(tmp_path.iterdir())) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_run_folder_whose_metrics_are_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    assert RunFolder(tmp_path).problem() is None
    make(tmp_path / "metrics.jsonl")
    assert RunFolder(tmp_path).problem() == (
        f"{tmp_path}/metrics.jsonl is not a file; move it away, or give another folder with folder=..."
    )
