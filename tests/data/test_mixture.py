"""Mixtures: exact shares over any window, each dataset in its own order, a start anywhere, and what does not go
together.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from data_prep.write import write_dataset
from diffmoe_ep.config import ConfigError, DataConfig, dump, from_tree, load
from diffmoe_ep.data import mixture as mixtures
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.mixture import BLOCK, MixedOrder, Mixture
from diffmoe_ep.data.order import Lanes
from diffmoe_ep.data.shards import Dataset

PIXELS = Manifest("tiny", "pixels", (1, 2, 2), "uint8", 1.0, 0.0, 3, (), "made up")
MOMENTS = Manifest("tiny", "moments", (1, 2, 2), "float16", 0.5, 0.0, 3, (), "made up")
WEIGHTS = st.lists(st.fractions(Fraction(1, 50), 20, max_denominator=50), min_size=2, max_size=5)
LANES = st.builds(Lanes, st.integers(1, 3), st.integers(1, 7))


def mixed(weights: Sequence[Fraction], seed: int = 0, lanes: Lanes | None = None) -> MixedOrder:
    return MixedOrder([[5, 3, 4 + number] for number in range(len(weights))], weights, seed, 2, lanes)


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, st.integers(0, 99), LANES, st.integers(0, 10**9), st.integers(1, 6000))
def test_any_window_has_each_dataset_in_its_share(
    weights: list[Fraction], seed: int, lanes: Lanes, first: int, length: int
) -> None:
    order = mixed(weights, seed, lanes)
    found = np.bincount([order.own(first + number)[0] for number in range(length)], minlength=len(weights))
    for number, weight in enumerate(weights):
        assert abs(found[number] - length * weight / sum(weights)) < BLOCK * lanes.count


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(0, 10**12))
def test_counts_follow_the_weights_for_ever(weights: list[Fraction], blocks: int) -> None:
    order = mixed(weights)
    before, after = order.counts(blocks * BLOCK), order.counts((blocks + 1) * BLOCK)
    assert sum(before) == blocks * BLOCK
    assert all(low <= high for low, high in zip(before, after, strict=True))
    assert all(
        abs(count - blocks * BLOCK * weight / sum(weights)) < len(weights)
        for count, weight in zip(before, weights, strict=True)
    )


@settings(deadline=None, max_examples=15)
@given(WEIGHTS, st.integers(0, 99), LANES)
def test_each_dataset_goes_through_its_own_stream(weights: list[Fraction], seed: int, lanes: Lanes) -> None:
    """What a dataset has of a lane are that lane's places 0, 1, 2, ... in its own stream, so its epochs visit every
    sample once.
    """
    order = mixed(weights, seed, lanes)
    places: dict[tuple[int, int], list[int]] = {}
    for position in range(4 * BLOCK):
        dataset, own = order.own(position)
        lane, place = lanes.split(own)
        assert lane == lanes.split(position)[0]
        places.setdefault((dataset, lane), []).append(place)
    # Within a block the places of a dataset ascend with its positions, so they are in order over all blocks.
    assert all(found == list(range(len(found))) for found in places.values())


def test_epochs_of_each_dataset_visit_every_sample_once() -> None:
    order = mixed([Fraction(3), Fraction(1)])
    found: list[list[tuple[int, int]]] = [[], []]
    for position in range(4 * BLOCK):
        place = order.locate(position)
        found[place.dataset].append((place.shard, place.sample))
    for number, sizes in enumerate(([5, 3, 4], [5, 3, 5])):
        total = sum(sizes)
        every = [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
        assert len(found[number]) > 50 * total
        for first in range(0, len(found[number]) - total, total):
            assert sorted(found[number][first : first + total]) == every
    assert order.passes(4 * BLOCK) == (3 * BLOCK / 12, BLOCK / 13)


def test_datasets_are_shuffled_within_a_block_and_by_seed() -> None:
    drawn = [
        [mixed([Fraction(1), Fraction(1)], seed).own(position)[0] for position in range(2 * BLOCK)] for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]
    assert drawn[0][:BLOCK] != drawn[0][BLOCK:]
    assert sum(one != other for one, other in zip(drawn[0], drawn[0][1:], strict=False)) > 800


@settings(deadline=None, max_examples=20)
@given(WEIGHTS, LANES, st.lists(st.integers(0, 10**12), min_size=1, max_size=10))
def test_the_way_to_a_position_does_not_matter(weights: list[Fraction], lanes: Lanes, positions: list[int]) -> None:
    used = mixed(weights, 3, lanes)
    assert [used.locate(position) for position in positions] == [
        mixed(weights, 3, lanes).locate(position) for position in positions
    ]


def test_the_mixture_is_the_one_written_down() -> None:
    """A golden sequence: were it to change, every mixed run that is continued would see other samples."""
    order = mixed([Fraction(1), Fraction("0.5")], seed=11)
    assert [order.own(position) for position in range(10**6, 10**6 + 6)] == [
        (1, 333338),
        (1, 333339),
        (0, 666662),
        (0, 666663),
        (0, 666664),
        (0, 666665),
    ]
    first = [order.locate(position) for position in range(6)]
    assert [(place.dataset, place.shard, place.sample) for place in first] == [
        (0, 0, 2),
        (0, 2, 2),
        (0, 0, 1),
        (0, 0, 3),
        (0, 2, 1),
        (0, 2, 3),
    ]


def test_a_start_anywhere_computes_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = mixtures.permutation

    def counted(generator: Generator, count: int) -> np.ndarray:
        drawn.append(count)
        return original(generator, count)

    monkeypatch.setattr(mixtures, "permutation", counted)
    order = MixedOrder([[10_000] * 500, [10_000] * 500], [Fraction(1), Fraction(3)], 0, 8)
    order.locate(5_000_123_456)
    assert drawn == [BLOCK]


def write_tiny(folder: Path, manifest: Manifest, **changes: Any) -> Dataset:
    changed = replace(manifest, **changes)
    array = np.ones(changed.stored_shape, dtype=changed.dtype)
    return write_dataset(
        folder, [(f"k{number}", encode(array, number % 3, changed)) for number in range(6)], changed, shard_size=4
    )


@pytest.mark.parametrize(
    ("manifest", "changes", "message"),
    [
        (PIXELS, {"shape": (1, 2, 3)}, r"b has shape \(1, 2, 3\), but .*a has \(1, 2, 2\)"),
        (PIXELS, {"num_classes": 4}, "has num_classes 4"),
        (PIXELS, {"class_names": ("x", "y", "z")}, "has class_names"),
        (PIXELS, {"kind": "moments", "dtype": "float16"}, "has kind moments"),
        (MOMENTS, {"scale": 0.25}, r"has scale 0\.25"),
        (MOMENTS, {"encoder": "0" * 64}, None),
        (PIXELS, {"dtype": "float32", "scale": 2.0}, None),
    ],
)
def test_datasets_must_agree(tmp_path: Path, manifest: Manifest, changes: dict[str, Any], message: str | None) -> None:
    parts = [write_tiny(tmp_path / "a", manifest), write_tiny(tmp_path / "b", manifest, **changes)]
    if message is None:
        assert Mixture(parts).num_samples == 12
    else:
        with pytest.raises(ConfigError, match=message):
            Mixture(parts)


def test_known_encoders_must_agree(tmp_path: Path) -> None:
    parts = [write_tiny(tmp_path / letter, MOMENTS, encoder=letter * 64) for letter in "ab"]
    with pytest.raises(ConfigError, match="has encoder bbb"):
        Mixture(parts)


def test_fingerprint_is_of_all_and_of_the_weights(tmp_path: Path) -> None:
    one, other = write_tiny(tmp_path / "a", PIXELS), write_tiny(tmp_path / "b", PIXELS, licence="another")
    assert Mixture([one]).fingerprint == one.fingerprint
    pairs = [([one, other], [1, 2]), ([one, other], [2, 1]), ([other, one], [1, 2]), ([one, other], [1, 1])]
    assert len({Mixture(parts, weights).fingerprint for parts, weights in pairs}) == 4
    assert Mixture([one, other], [0.1, 0.3]).fingerprint == Mixture([one, other], [1, 3]).fingerprint


def test_the_config_opens_one_or_several(tmp_path: Path) -> None:
    one, other = write_tiny(tmp_path / "a", PIXELS), write_tiny(tmp_path / "b", PIXELS)
    assert Mixture.open(DataConfig(folder=str(one.folder))).fingerprint == one.fingerprint
    tree = {"data": {"mixture": [{"folder": str(one.folder), "weight": "3e-1"}, {"folder": str(other.folder)}]}}
    config = from_tree(tree)
    opened = Mixture.open(config.data)
    assert opened.weights == (Fraction(3, 10), Fraction(1))
    assert opened.names == (str(one.folder), str(other.folder))
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"folder": "x", "mixture": [{"folder": "a"}]}, "data.folder is x and data.mixture names datasets too"),
        ({"mixture": [{"weight": 2}]}, r"data.mixture\[0\].folder is missing"),
        ({"mixture": [{"folder": "a"}, {"folder": "a"}]}, r"data.mixture\[1\].folder a is named twice"),
        ({"mixture": [{"folder": "a", "weight": 0}]}, r"data.mixture\[0\].weight is 0.0; it must be greater than 0"),
        (
            {"mixture": [{"folder": "a", "wieght": 1}]},
            r"unknown key data.mixture\[0\].wieght; did you mean data.mixture\[0\].weight",
        ),
        ({"mixture": {"folder": "a"}}, r"data.mixture: expected \[\{folder: str, weight: float\}, ...\]"),
        ({"mixture": ["a"]}, r"data.mixture\[0\]: expected a section with keys"),
        ({"lanes": 7}, "data.lanes 7 does not divide the 256 samples"),
        ({"retries": 50}, "data.retries 50 wait .* seconds"),
    ],
)
def test_config_mistakes_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree({"data": data})
