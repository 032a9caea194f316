import sys

import numpy as np
import pytest
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.sampling.picture import grid, wrap

Image = pytest.importorskip("PIL.Image")


def _read(path):
    return np.asarray(Image.open(path))


def test_a_grid_shows_every_pixel_as_a_square(tmp_path):
    pixels = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    pixels[0, 0, 0, 0] = 16
    pixels[4, 0, 7, 2] = 8
    grid(pixels, tmp_path / "grid.png", columns=3, highest=16)
    picture = _read(tmp_path / "grid.png")
    assert picture.shape == (2 * 52 + 4, 3 * 52 + 4, 3)  # 48 pixels a cell, 4 between
    assert (picture[4:10, 4:10] == 255).all()
    assert (picture[4:52, 10:52] == 0).all()
    top, left = 4 + 52 + 7 * 6, 4 + 52 + 2 * 6
    assert (picture[top : top + 6, left : left + 6] == 128).all()
    assert (picture[:4] == picture[0, 0]).all()
    assert 0 < picture[0, 0, 0] < 128  # separators can be seen beside black cells
    assert (picture[4 + 52 : -4, 4 + 2 * 52 : -4] == 0).all()  # no sixth image


def test_a_grid_keeps_colors_and_its_own_scale(tmp_path):
    pixels = torch.tensor([255, 10, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 4)
    grid(pixels, tmp_path / "grid.png", columns=2, enlarge=5)
    picture = _read(tmp_path / "grid.png")
    assert picture.shape == (10 + 8, 2 * 24 + 4, 3)
    assert (picture[4:14, 4:24] == (255, 10, 0)).all()


def test_row_labels_stand_in_a_gutter_at_the_left(tmp_path):
    pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    grid(pixels, tmp_path / "plain.png", columns=2)
    grid(pixels, tmp_path / "labelled.png", columns=2, row_labels=["zero", "one"])
    plain, labelled = _read(tmp_path / "plain.png"), _read(tmp_path / "labelled.png")
    gutter = labelled.shape[1] - plain.shape[1]
    assert gutter > 20
    assert (labelled[:, gutter:] == plain).all()
    assert (labelled[:54, :gutter] > 100).any()
    assert (labelled[54:, :gutter] > 100).any()


def test_a_grid_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        grid(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), tmp_path / "grid.png", columns=1)
    with pytest.raises(ValueError, match="a caption and a verdict for each"):
        grid(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), tmp_path / "grid.png", columns=1, captions=["a"])
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        grid(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), tmp_path / "grid.png", columns=1, row_labels=["a"])


def test_captions_stand_under_their_pictures_and_verdicts_around_them(tmp_path):
    pixels = torch.full((3, 1, 8, 8), 16, dtype=torch.uint8)
    words = ["one 3", "two digits: a 3 at the top left and an 8 at the bottom right", "so" * 200]
    grid(pixels, tmp_path / "plain.png", columns=2, highest=16, enlarge=14)
    grid(pixels, tmp_path / "told.png", columns=2, highest=16, captions=words, right=[True, False, True])
    plain, told = _read(tmp_path / "plain.png"), _read(tmp_path / "told.png")
    below = (told.shape[0] - plain.shape[0]) // 2
    assert told.shape[1] == plain.shape[1]
    assert 30 < below < 80  # at most five lines
    cell = 8 * 14
    for place, colour in enumerate([(60, 170, 90), (200, 60, 60), (60, 170, 90)]):
        top, left = 4 + place // 2 * (cell + below + 4), 4 + place % 2 * (cell + 4)
        assert (told[top : top + cell, left : left + cell] == 255).all()
        assert (told[top - 1, left : left + cell] == colour).all()
        assert (told[top : top + cell, left + cell] == colour).all()
        ink = told[top + cell + 2 : top + cell + below, left : left + cell, 0] > 150
        assert ink.any()
        assert not ink[:, -1].all()
    fourth = told[4 + cell + below + 4 :, 4 + cell + 6 :]
    assert (fourth <= 48).all()  # neither picture nor words nor frame


def test_words_are_wrapped_within_the_width_and_cut_after_five_lines():
    from PIL import ImageFont

    font = ImageFont.load_default(size=11)
    for text in ("one 3", "a 3 to the left of an 8", "w" * 300, "so it goes " * 40, ""):
        lines = wrap(text, font, 100)
        assert 1 <= len(lines) <= 5
        assert all(font.getlength(line) <= 100 for line in lines)
        whole = "".join(lines).replace(" ", "")
        letters = text.replace(" ", "")
        assert letters.startswith(whole[:-1]) if whole.endswith("…") else whole == letters
    assert wrap("so it goes " * 40, font, 100)[-1].endswith("…")


def test_a_missing_library_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"Pillow.*pip install 'diffmoe_ep\[sample\]'"):
        grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "grid.png", columns=1)
