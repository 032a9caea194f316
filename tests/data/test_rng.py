"""Keyed random numbers: the same for the same key, unrelated for any other, and as written down here for ever."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ep.data.rng import STREAMS, KeyedRng, generator_for, permutation

WORDS = st.integers(0, 2**64 - 1)
KEYS = st.tuples(WORDS, WORDS, st.sampled_from(sorted(STREAMS)), WORDS)


def raw(key: tuple[int, int, str, int], count: int = 4) -> list[int]:
    return generator_for(*key).bit_generator.random_raw(count).tolist()


@settings(deadline=None, max_examples=50)
@given(KEYS, KEYS)
def test_streams_are_equal_exactly_when_their_keys_are(
    first: tuple[int, int, str, int], second: tuple[int, int, str, int]
) -> None:
    assert raw(first) == raw(first)
    assert (raw(first) == raw(second)) == (first == second)


def test_streams_that_differ_in_one_word_differ() -> None:
    keys = [(1, 2, stream, part) for stream in STREAMS for part in (0, 1)] + [(2, 1, "noise", 0), (1, 3, "noise", 0)]
    assert len({tuple(raw(key)) for key in keys}) == len(keys)


def test_part_is_not_a_later_piece_of_the_stream() -> None:
    assert not set(raw((0, 0, "start", 0), 64)) & set(raw((0, 0, "start", 1), 64))


def test_words_are_those_of_philox_with_key_and_counter() -> None:
    expected = np.random.Philox(key=7 + (5 << 64), counter=(9 << 128) + (STREAMS["drop"] << 192)).random_raw(8)
    assert raw((7, 5, "drop", 9), 8) == expected.tolist()
    assert raw((7, 5, "time", 0), 2) == [8526679654037188868, 3444825123183319459]


@settings(deadline=None, max_examples=30)
@given(WORDS, st.integers(1, 300))
def test_permutation_is_one(number: int, count: int) -> None:
    assert sorted(permutation(generator_for(0, number, "order"), count).tolist()) == list(range(count))


def test_permutations_of_three_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for number in range(3000):
        drawn = tuple(permutation(generator_for(0, number, "order"), 3).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts.values()) < 100  # about five standard deviations


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_keyed_generators_are_those_made_one_by_one(seed: int) -> None:
    rng = KeyedRng(seed)
    for position in (0, 3, 2**40, 2**63 - 1):
        for stream in STREAMS:
            found, expected = rng.at(position, stream), generator_for(seed, position, stream)
            assert found.random(dtype=np.float32) == expected.random(dtype=np.float32)  # leaves half a word behind
            np.testing.assert_array_equal(
                found.standard_normal(7, dtype=np.float32), expected.standard_normal(7, dtype=np.float32)
            )
            assert found.bit_generator.random_raw() == expected.bit_generator.random_raw()


def test_keyed_generators_survive_the_way_to_a_worker() -> None:
    copied = pickle.loads(pickle.dumps(KeyedRng(5)))
    assert copied.at(9, "noise").random() == generator_for(5, 9, "noise").random()
    assert copied.at(9, "noise").random() == generator_for(5, 9, "noise").random()
