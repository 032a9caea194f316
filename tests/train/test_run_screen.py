"""What a terminal shows of a run: all that matters, within its width and height."""

import re
from pathlib import Path

import pytest

from diffmoe_ep.train.run_screen import rendered, screen
from diffmoe_ep.train.run_view import RunView
from train.test_run_view import folder, held, line


def shown(runs: list[Path], width: int, height: int) -> list[str]:
    return rendered(screen([RunView(run) for run in runs], width, height), width, color=False)


def of_layers(path: Path, number: int, steps: int = 40) -> Path:
    more = {"capacity": 1.0, "capacity_per_layer": [0.5] * (number - 1) + [1.5], "lr": 1e-4, "peak_memory_gb": 12.0,
            "mfu": 0.4, "eta_seconds": 75.0}  # fmt: skip
    path.mkdir()
    (path / "checkpoints/step-0000010").mkdir(parents=True)
    return folder(path, *(line(step, **more) for step in range(1, steps + 1)))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (120, 40), (200, 60)])
@pytest.mark.parametrize("layers", [1, 3, 12, 14, 36])
def test_a_run_fits_its_terminal(tmp_path: Path, width: int, height: int, layers: int) -> None:
    run = of_layers(tmp_path / "run", layers)
    with held():
        lines = shown([run], width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= (height if layers < 36 or width > 60 else height + 8)
    text = "\n".join(lines)
    for words in ("trains", "step 40 of 100", "40.0%", "ETA 1m15s", "loss 0.0250", "norm▏", "samples/s▏", " 1.50"):
        assert words in text
    assert len(re.findall(r" 0\.50(?!\d)", text)) == layers - 1


def test_a_run_that_has_logged_nothing_is_shown(tmp_path: Path) -> None:
    assert shown([folder(tmp_path)], 80, 24)[1:3] == [
        "has not begun  the same command goes on from the start",
        f"step 0 of 100  0.0%  ▕{' ' * 57}▏",
    ]


def test_broken_numbers_are_shown_as_they_are(tmp_path: Path) -> None:
    broken = line(2, loss=float("nan"), grad_norm="x", capacity_per_layer=[None], eta_seconds=float("inf"))
    text = "\n".join(shown([folder(tmp_path, line(1), broken)], 80, 24))
    assert "loss nan  norm nan" in text
    assert "step 2  loss is nan" in text


def test_several_runs_are_compared_where_all_have_been(tmp_path: Path) -> None:
    long, short = of_layers(tmp_path / "long", 2, 40), of_layers(tmp_path / "short", 2, 20)
    _, titles, first, second = shown([long, short], 100, 24)
    assert titles.split()[:7] == ["run", "state", "step", "of", "loss", "at", "20"]
    assert first.split()[1:7] == ["has", "stopped", "40", "100", "0.0250", "0.0500"]
    assert second.split()[1:7] == ["has", "stopped", "20", "100", "0.0500", "0.0500"]
    assert (first[-1], second[-1]) == ("▁", "▁")


def test_colors_take_no_room(tmp_path: Path) -> None:
    lines = screen([RunView(folder(tmp_path, line(1), line(2)))], 50, 24)
    plain, colored = rendered(lines, 50, color=False), rendered(lines, 50, color=True)
    assert [re.sub(r"\x1b\[\d*m", "", text).rstrip() for text in colored] == plain
    assert any("\x1b[34m" in text for text in colored)
