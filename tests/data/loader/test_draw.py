"""The loader's hot path gives what the plain functions give, to the bit."""

import pickle
from typing import Any

import numpy as np
import pytest

from diffmoe_ep.data.loader.draw import AT_ONCE, Draws, Latents
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.rng import STREAMS, generator_for
from diffmoe_ep.data.sample import final_latent


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_draws_are_those_of_keyed(seed: int) -> None:
    draws = Draws(seed)
    for position in (0, 3, 2**40, 2**63 - 1):
        for purpose in STREAMS:
            found, expected = draws.at(position, purpose), generator_for(seed, position, purpose)
            assert found.random(dtype=np.float32) == expected.random(dtype=np.float32)  # leaves half a word behind
            np.testing.assert_array_equal(
                found.standard_normal(7, dtype=np.float32), expected.standard_normal(7, dtype=np.float32)
            )
            assert found.bit_generator.random_raw() == expected.bit_generator.random_raw()


def test_draws_survive_the_way_to_a_worker() -> None:
    copied = pickle.loads(pickle.dumps(Draws(5)))
    assert copied.at(9, "noise").random() == generator_for(5, 9, "noise").random()
    assert copied.at(9, "noise").random() == generator_for(5, 9, "noise").random()


@pytest.mark.parametrize("count", [1, 5, 2 * AT_ONCE + 3])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("pixels", "uint8"), ("pixels", "float16"), ("pixels", "float32"), ("moments", "float16"), ("moments", "float32")],
)
@pytest.mark.parametrize("scattered", [False, True])
def test_latents_of_a_batch_are_those_of_its_samples(kind: Any, dtype: str, count: int, scattered: bool) -> None:
    facts = Manifest(
        "tiny", kind, (3, 5, 7), dtype, 0.18215, -0.125, 4, (), "made up", flips=2 if kind == "moments" else 1
    )
    arrays = list((np.random.default_rng(1).normal(size=(count, *facts.stored_shape)) * 40).astype(dtype))
    flipped, positions = [bool(number % 2) for number in range(count)], [number * 13 for number in range(count)]
    latents = Latents(facts)
    found = np.stack(
        [
            generator_for(3, position, "posterior").standard_normal(facts.shape, dtype=np.float32)
            for position in positions
        ]
    )
    for first in range(0, count, AT_ONCE):
        rows = list(range(count))[:: -1 if scattered else 1][first : first + AT_ONCE]
        for row in rows:
            latents.put(row, arrays[row], flipped[row])
        assert latents.fill(found) == []
    expected = [
        final_latent(*each) for each in zip(arrays, [facts] * count, flipped, [3] * count, positions, strict=True)
    ]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("pixels", "float16"), ("pixels", "float32"), ("moments", "float16"), ("moments", "float32")]
)
def test_values_that_are_not_finite_are_told(kind: Any, dtype: str, bad: float) -> None:
    """Also at the ends of what the type holds, where sums overflow first."""
    facts = Manifest("tiny", kind, (3, 5, 7), dtype, 1.0, 0.0, 4, (), "made up")
    arrays = np.full((AT_ONCE, *facts.stored_shape), np.finfo(dtype).max, dtype)
    for row in (2, AT_ONCE - 1):
        arrays[row].flat[100] = bad
    latents = Latents(facts)
    for row, array in enumerate(arrays):
        latents.put(row, array, False)
    with np.errstate(over="ignore", invalid="ignore"):
        assert latents.fill(np.zeros((AT_ONCE, *facts.shape), np.float32)) == [2, AT_ONCE - 1]
    assert latents.fill(np.zeros(0)) == []
