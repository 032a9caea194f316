"""The compositional score: prompts worded as captions, verdicts that mean what they say, real canvases near 1, shuffled
near chance.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ep.config import ConfigError
from diffmoe_ep.evaluate.digits.composition import TASKS, Prompt, check_canvases, composition, prompts, read
from diffmoe_ep.evaluate.digits.detect import EMPTY, UNCLEAR, Canvases, Detector, cells, known_digits, load_canvases

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.fixture(scope="module", params=[24, 32])
def canvases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Canvases, Canvases]:
    """Prepared canvases of the train and held-out split, at the size where cells are as large as digits and at a larger
    one.
    """
    from data_prep.__main__ import main

    folder = tmp_path_factory.mktemp("canvases")
    main(
        [
            "digits_captions",
            "--out",
            str(folder),
            "--samples",
            "2500",
            "--heldout",
            "400",
            "--image-size",
            str(request.param),
        ]
    )
    return load_canvases(folder / "train"), load_canvases(folder / "heldout")


def seen(*placed: tuple[int, int, int]) -> np.ndarray:
    """A canvas with (what, row, column), else empty."""
    found = np.full((3, 3), EMPTY)
    for what, row, column in placed:
        found[row, column] = what
    return found


def test_prompts_are_worded_as_captions() -> None:
    """Every caption of the data is read as what its canvas shows, and every prompt could be a caption."""
    from data_prep.digits_captions import _article, captions, compose

    labels, forms = np.repeat(np.arange(10), 5), Counter[str]()
    for number in range(600):
        placed = compose("train", number, 24, labels, np.arange(50))
        shown = seen(*((found.digit, found.row, found.column) for found in placed))
        for caption in captions(placed):
            prompt = read(caption.text)
            kinds = Counter(found.digit for found in placed)
            if prompt is None:  # mixed counts, which no task asks for
                assert " digits: " not in caption.text and len(placed) == 3 and len(kinds) > 1
                continue
            forms[prompt.task] += 1
            assert prompt.holds(shown)
            if not prompt.relation:
                assert Counter(prompt.digits) == kinds
    assert min(forms[task] for task in TASKS) > 30
    for prompt in prompts(100):
        assert read(prompt.text) == prompt
        assert all(
            f"{_article(digit)} {digit}" in prompt.text
            for digit in prompt.digits
            if " at the " in prompt.text or prompt.relation
        )


def test_prompts_are_the_same_for_ever_and_cover_the_digits() -> None:
    many, few = prompts(100), prompts(25)
    assert [prompt.task for prompt in many] == [task for task in TASKS for _ in range(100)]
    assert [prompt for number in range(4) for prompt in many[100 * number : 100 * number + 25]] == few
    for task in TASKS:
        asked = Counter(digit for prompt in many if prompt.task == task for digit in prompt.digits)
        assert len(asked) == 10 and max(asked.values()) < 3 * min(asked.values())
    assert len({prompt.text for prompt in many if prompt.task == "position"}) > 90


VERDICTS = {
    "one 3": ([((3, 0, 0),), ((3, 1, 1), (5, 0, 0), (3, 2, 2))], [((5, 0, 0),), (), ((UNCLEAR, 0, 0),)]),
    "one digit: a 3 at the centre": (
        [((3, 1, 1),), ((3, 0, 0),)],
        [((8, 1, 1),)],
    ),  # a single object is to be there, wherever
    "one 3 and one 8": (
        [((8, 0, 0), (3, 2, 1)), ((3, 0, 0), (8, 0, 1), (8, 0, 2))],
        [((3, 0, 0),), ((3, 0, 0), (3, 1, 1))],
    ),
    "two 3s": (
        [((3, 0, 0), (3, 1, 1))],
        [
            ((3, 0, 0),),
            ((3, 0, 0), (3, 0, 1), (3, 0, 2)),
            ((3, 0, 0), (3, 1, 1), (5, 2, 2)),
            ((3, 0, 0), (3, 1, 1), (UNCLEAR, 2, 2)),
        ],
    ),
    "three 0s": ([((0, 0, 0), (0, 1, 1), (0, 2, 2))], [((0, 0, 0), (0, 1, 1))]),
    "a 3 above an 8": (
        [((3, 0, 2), (8, 1, 0)), ((3, 0, 0), (8, 2, 0), (5, 1, 1))],
        [((3, 1, 0), (8, 1, 1)), ((8, 0, 0), (3, 1, 0)), ((3, 0, 0),)],
    ),
    "a 3 to the left of an 8": ([((3, 2, 0), (8, 0, 1))], [((3, 0, 1), (8, 2, 1)), ((8, 0, 0), (3, 0, 1))]),
    "two digits: a 3 at the top left and an 8 at the centre": (
        [((3, 0, 0), (8, 1, 1)), ((3, 0, 0), (8, 1, 1), (1, 2, 2))],
        [((3, 0, 1), (8, 1, 1)), ((8, 0, 0), (3, 1, 1)), ((3, 0, 0),)],
    ),
}


@pytest.mark.parametrize("text", VERDICTS)
def test_a_verdict_means_what_the_prompt_says(text: str) -> None:
    prompt = read(text)
    assert prompt is not None
    right, wrong = VERDICTS[text]
    assert all(prompt.holds(seen(*placed)) for placed in right)
    assert not any(prompt.holds(seen(*placed)) for placed in wrong)


@pytest.mark.parametrize("text", [
    "", "a cat", "one cat", "four 3s", "two digits: a 3 at the centre", "one digit: a 3 at the corner",
    "two 3s and one 5", "one 3, one 4 and one 5", "a 3 below a 4", "one 3 and a cat", "one 12",
])  # fmt: skip
def test_other_words_ask_for_nothing_that_is_scored(text: str) -> None:
    assert read(text) is None


@pytest.mark.slow
def test_real_canvases_score_near_one_and_shuffled_prompts_near_chance(canvases: tuple[Canvases, Canvases]) -> None:
    """The digits of held-out canvases are unknown to the classifier."""
    train, heldout = canvases
    size = train.pictures.shape[-1]
    check_canvases((1, size, size), {"--reference": train, "--heldout": heldout})
    asked = prompts(20)
    blank = np.zeros((80, 1, size, size), dtype=np.uint8)
    found = composition(blank, asked, train, heldout, 1.0)
    assert min(share.right for share in found.heldout.values()) > 0.96
    assert found.overall(heldout=True) > 0.98
    assert found.overall(heldout=True, shuffled=True) < 0.08
    assert found.heldout["single object"].shuffled == pytest.approx(0.1, abs=0.03)  # one digit of ten is there
    assert found.overall() == 0
    assert not any(found.verdicts)
    assert found.lines()[5].split() == [
        "overall",
        "0.000",
        "0.000",
        f"{found.overall(True):.3f}",
        f"{found.overall(True, True):.3f}",
    ]
    assert found.as_dict()["overall"] == 0


@pytest.mark.slow
def test_shares_and_chance_agree_with_a_plain_loop(canvases: tuple[Canvases, Canvases]) -> None:
    train, heldout = canvases
    if train.pictures.shape[-1] != 24:
        pytest.skip("one size will do")
    asked = prompts(30)
    pictures = heldout.pictures[: len(asked)]
    found = composition(pictures, asked, train, heldout, 1.0)
    detector = Detector(*known_digits(train, [where(captions) for captions in train.captions]))
    looks = detector(pictures)
    for number, task in enumerate(TASKS):
        own = range(30 * number, 30 * (number + 1))
        verdicts = [[asked[prompt].holds(looks[picture]) for prompt in own] for picture in own]
        assert found.samples[task].right == np.mean([verdicts[place][place] for place in range(30)])
        others = [verdicts[a][b] for a in range(30) for b in range(30) if a != b]
        assert found.samples[task].shuffled == pytest.approx(np.mean(others))
        assert list(found.verdicts[own.start : own.stop]) == [verdicts[place][place] for place in range(30)]


def where(captions: tuple[str, ...]) -> dict[tuple[int, int], int]:
    prompt = read(captions[0])
    assert isinstance(prompt, Prompt)
    return dict(zip(prompt.cells, prompt.digits, strict=True))


@pytest.mark.slow
def test_the_detector_takes_no_smudge_for_a_digit(canvases: tuple[Canvases, Canvases]) -> None:
    train, heldout = canvases
    known, labels = known_digits(train, [where(captions) for captions in train.captions])
    assert (known.sum((1, 2)) > 0).all() and np.bincount(labels).min() > 100
    detector, generator = Detector(known, labels), np.random.default_rng(0)
    size = train.pictures.shape[-1]
    noise = generator.integers(0, 17, (50, 1, size, size)).astype(np.uint8)
    assert (detector(noise) == UNCLEAR).all()
    assert (detector(np.zeros_like(noise)) == EMPTY).all()
    faint = generator.integers(0, 2, (50, 1, size, size)).astype(np.uint8)  # a background that is not quite black
    assert (detector(faint) == EMPTY).all()
    noisy = np.clip(heldout.pictures + generator.normal(0, 1, heldout.pictures.shape).round(), 0, 16).astype(np.uint8)
    expected = np.stack(
        [seen(*((digit, *cell) for cell, digit in where(captions).items())) for captions in heldout.captions]
    )
    for pictures, least in ((heldout.pictures, 0.98), (noisy, 0.95)):
        looks = detector(pictures)
        assert ((looks == EMPTY) == (expected == EMPTY)).mean() > 0.999
        assert (looks == expected)[expected >= 0].mean() > least
    halves = heldout.pictures.copy()
    for top in range(0, size, size // 3):
        halves[:, :, top : top + 4] = 0  # the upper half of every digit is missing
    assert (detector(halves) == expected)[expected >= 0].mean() < 0.5


def test_cells_are_windows_with_the_most_ink() -> None:
    pictures = np.zeros((1, 1, 32, 32), dtype=np.uint8)
    pictures[0, 0, 12:20, 1:9] = 7  # in the cell from row 10, column 0
    found = cells(pictures)
    assert found.shape == (1, 3, 3, 8, 8)
    assert (found[0, 1, 0] == 7).all()
    assert found.sum() == 7 * 64


@pytest.mark.slow
def test_what_cannot_be_judged_is_an_error_that_names_it(digits: Path, canvases: tuple[Canvases, Canvases]) -> None:
    with pytest.raises(ConfigError, match="python -m data_prep digits_captions"):
        load_canvases(digits / "train")
    train, heldout = canvases
    sides = {"--reference": train, "--heldout": heldout}
    with pytest.raises(ConfigError, match="--reference holds canvases of shape"):
        check_canvases((1, 48, 48), sides)
    few = Canvases(train.pictures[:1], (("two 3s",),))
    with pytest.raises(
        ConfigError, match="--heldout holds no captions of the digits for single object, two objects, position"
    ):
        check_canvases(train.pictures.shape[1:], sides | {"--heldout": few})
    with pytest.raises(ConfigError, match="the digit 0 0 times"):
        Detector(np.ones((4, 8, 8)), np.array([1, 1, 2, 2]))
