"""What is drawn for a position is a function of seed and position alone."""

from dataclasses import replace

import numpy as np

from diffmoe_ep.config import DataConfig
from diffmoe_ep.data.loader.draw import Draw
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.rng import generator_for

MOMENTS = Manifest("tiny", "moments", (2, 4, 4), "float16", 0.18215, 0.0, 10, (), "made up", flips=2)
DATA = DataConfig(flip=True, condition_dropout=0.3)


def test_each_draw_has_a_stream_of_its_own() -> None:
    manifest = replace(MOMENTS, condition="text", num_classes=0)
    draws = Draw(5, DATA, manifest)(range(40, 50))
    assert draws.posterior is not None
    for row, position in enumerate(range(40, 50)):
        for name, found in (("noise", draws.noise), ("posterior", draws.posterior)):
            expected = generator_for(5, position, name).standard_normal((2, 4, 4), dtype=np.float32)
            np.testing.assert_array_equal(found[row], expected)
        assert draws.u[row] == generator_for(5, position, "time").random(dtype=np.float32)
        assert draws.flip[row] == (generator_for(5, position, "flip").random() < 0.5)
        assert draws.drop[row] == (generator_for(5, position, "drop").random() < 0.3)
        assert draws.caption[row] == generator_for(5, position, "caption").random()


def test_what_is_not_needed_is_not_drawn() -> None:
    pixels = Manifest("tiny", "pixels", (1, 2, 3), "uint8", 0.5, -1.0, 4, (), "made up")
    draws = Draw(5, replace(DATA, flip=False, condition_dropout=0.0), pixels)(range(8))
    assert draws.posterior is None
    assert not any(draws.flip) and not any(draws.drop) and not any(draws.caption)
    assert Draw(5, DATA, pixels)(range(8)).noise.tobytes() == draws.noise.tobytes()
