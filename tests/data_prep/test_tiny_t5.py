"""The tiny T5: the real classes and files, the same bytes for ever, and lessons that are true of the canvases."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from data_prep import tiny_t5
from data_prep.__main__ import main
from data_prep.digits_captions import compose
from data_prep.tiny_t5 import UNTOLD, make_tiny_t5
from diffmoe_ep.encoders.text import load_text_encoder
from pictures import content

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

pytestmark = pytest.mark.slow


def make(out: Path, *more: str) -> int:
    return main(["tiny_t5", "--out", str(out), "--width", "32", "--layers", "1", *more])


def test_it_loads_like_every_t5_and_its_bytes_are_the_same_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert make(tmp_path / name, "--steps", "3") == 0
    assert make(tmp_path / "other", "--steps", "3", "--seed", "1") == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    one, other = (load_text_encoder("t5", tmp_path / name, max_length=96) for name in ("one", "other"))
    assert (one.width, one.fingerprint != other.fingerprint) == (32, True)
    (rows,), _ = one.features(["a 3 above an 8"])
    assert rows.shape == (len("a 3 above an 8") + 1, 32)
    assert "trained for 3 steps on captions of the digits (written)" in capsys.readouterr().out


def test_without_steps_its_weights_are_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "random", "--steps", "0") == 0
    assert make(tmp_path / "learnt", "--steps", "3") == 0
    assert "random, not trained" in capsys.readouterr().out
    random, learnt = (load_text_encoder("t5", tmp_path / name, max_length=96) for name in ("random", "learnt"))
    assert random.fingerprint != learnt.fingerprint


def test_it_is_made_once_and_never_over_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "t5", "--steps", "1") == 0
    before = content(tmp_path / "t5")
    assert make(tmp_path / "t5", "--steps", "1") == 0
    assert "already there" in capsys.readouterr().out
    assert make(tmp_path / "t5", "--steps", "2") == 2
    assert "made with other settings (steps 1, now 2); choose another folder with --out" in capsys.readouterr().err
    assert content(tmp_path / "t5") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert make(tmp_path / "full", "--steps", "1") == 2
    assert "holds other files" in capsys.readouterr().err


def test_lessons_are_true_of_the_canvases() -> None:
    kinds = Counter[int]()
    for step in range(6):
        lesson = tiny_t5.lesson(step)
        kind = tiny_t5.KINDS[step]
        kinds[kind] += 1
        assert lesson.answers.shape == (len(lesson.texts), tiny_t5.QUESTIONS)
        for text, answers in zip(lesson.texts, lesson.answers.tolist(), strict=True):
            cells, numbers, relation = answers[:9], answers[9:19], answers[19:]
            words = text.replace(",", "").replace("s", "").split()
            digits = Counter(int(word) for word in words if word.isdigit())
            if kind == 0:
                assert Counter(digit for digit in cells if digit < 10) == digits
                assert {f"{digit}" in text for digit in cells if digit < 10} == {True}
            else:
                assert cells == [UNTOLD] * 9
            if kind == 2:
                first, second = (int(word) for word in words if word.isdigit())
                assert relation == [first, second, int("above" in text)]
            if kind == 1:
                assert relation == [UNTOLD] * 3
                counts = re.findall(r"(one|two|three) (\d)", text)
                digits = Counter({int(digit): ("one", "two", "three").index(count) + 1 for count, digit in counts})
            assert numbers == [digits[digit] for digit in range(10)]
    assert kinds == {0: 4, 1: 1, 2: 1}


def test_cells_are_answered_where_the_digits_stand() -> None:
    labels, members = tiny_t5._digits()
    for number in range(50):
        placed = compose("train", number, 24, labels, members)
        answers = tiny_t5.answered(placed, 0)
        assert {place: digit for place, digit in enumerate(answers[:9]) if digit < 10} == {
            3 * found.row + found.column: found.digit for found in placed
        }


def test_it_learns(tmp_path: Path) -> None:
    """Its loss falls from that of guessing; the global generator is left alone."""
    losses: list[float] = []
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make_tiny_t5(tmp_path / "t5", steps=40, width=32, layers=1, progress=losses.append)
    assert torch.equal(torch.rand(1), expected)
    assert losses[0] > 2.2  # ln 11 is 2.4
    assert max(losses[-6:]) < 1.2
