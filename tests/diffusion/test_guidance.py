import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError
from diffmoe_ep.diffusion.guidance import Guidance, apart, guided


def _noise(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _towards(x: Tensor, t: float) -> Tensor:
    return 2 * x + t


def _away(x: Tensor, t: float) -> Tensor:
    return x + 1


def _never(x: Tensor, t: float) -> Tensor:
    raise AssertionError("the unconditional half is not needed")


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_moves_away_from_the_unconditional_half(scale):
    x = _noise()
    predicted = guided(_towards, apart(_towards, _away), Guidance(scale))(x, 0.5)
    np.testing.assert_allclose(predicted.numpy(), (x + 1 + scale * (2 * x + 0.5 - (x + 1))).numpy())


def test_guidance_at_scale_one_computes_the_conditional_half_alone():
    assert torch.equal(guided(_towards, apart(_never, _never), Guidance(1.0))(_noise(), 1.0), 2 * _noise() + 1)


def test_outside_the_interval_the_conditional_half_stands_alone():
    field = guided(_towards, apart(_towards, _away), Guidance(3.0, (0.3, 0.7)))
    without = guided(_towards, apart(_never, _never), Guidance(3.0, (0.3, 0.7)))
    for t in (0.0, 0.29, 0.71, 1.0):
        assert torch.equal(without(_noise(), t), _towards(_noise(), t))
    for t in (0.3, 1 - 175 / 250, 0.5, 0.7):  # the second is 0.30000000000000004
        torch.testing.assert_close(field(_noise(), t), _noise() + 1 + 3 * (_noise() + t - 1))
        with pytest.raises(AssertionError, match="not needed"):
            without(_noise(), t)


def test_the_interval_holds_on_both_sides_whatever_is_rounded():
    guidance = Guidance(2.0, (0.3, 0.7))
    active = [guidance.active(1 - step / 250) for step in range(250)]
    assert sum(active) == 101
    assert active[75] and active[175] and not active[74] and not active[176]


def test_channels_after_the_guided_ones_are_conditional():
    x = _noise()

    def twice(field):
        return lambda x, t: torch.cat([field(x, t), 10 * field(x, t)], 1)  # latent and variance channels

    for channels, number in ((None, 4), (3, 3), (1, 1)):
        predicted = guided(twice(_towards), apart(twice(_towards), twice(_away)), Guidance(2.0, None, channels))(x, 0.0)
        assert predicted.shape == (3, 8, 2, 2)
        torch.testing.assert_close(predicted[:, :number], (2 * (2 * x) - (x + 1))[:, :number])
        assert torch.equal(predicted[:, number:], torch.cat([2 * x, 20 * x], 1)[:, number:])


@pytest.mark.parametrize("channels", [0, 5])
def test_channels_that_the_latent_lacks_are_an_error(channels):
    with pytest.raises(ConfigError, match=f"sample.guidance_channels is {channels}"):
        guided(_towards, apart(_towards, _away), Guidance(2.0, None, channels))(_noise(), 0.5)


def test_the_conditional_half_comes_first():
    calls: list[str] = []

    def half(name: str):
        def field(x: Tensor, t: float) -> Tensor:
            calls.append(name)
            return x

        return field

    guided(half("alone"), apart(half("conditional"), half("unconditional")), Guidance(2.0))(_noise(), 0.5)
    assert calls == ["conditional", "unconditional"]
