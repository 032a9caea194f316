"""The convention in which weights under flow predict, and the one way from one to the other.

    forward     eps - x_0 at t, t = 1 is noise: ours
    reversed    x_0 - eps at 1 - t: the published implementation's, in which imported weights are kept

A model in memory is always forward; files say which they are. For ddpm both agree: eps at the integer step.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from diffmoe_ep.config import ModelConfig

TimeConvention = Literal["forward", "reversed"]
REWRITTEN = ("time.fc1.weight", "head.projection.weight", "head.projection.bias")


def reverse_time(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Weights of the other convention; its own inverse, up to rounding to their type.

    weights: by canonical name, at least those of `REWRITTEN`, on the CPU; all others are handed through.

    The sign is the head's, in the channels that are velocity: what a model predicts beyond in_channels, a variance that
    flow does not use, keeps its sign. The time is the first linear map's, since cos f(1 - t') = cos f cos f t' +
    sin f sin f t' and sin f(1 - t') = sin f cos f t' - cos f sin f t': its columns of cosines and sines are reflected,
    each pair by its frequency f.
    """
    weight = weights["time.fc1.weight"]
    cosines, sines = weight.double().chunk(2, dim=1)  # (D, 128) each
    half = cosines.shape[1]
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    reflected = torch.cat(
        [cosines * frequency.cos() + sines * frequency.sin(), cosines * frequency.sin() - sines * frequency.cos()],
        dim=1,
    )
    changed = {"time.fc1.weight": reflected.to(weight.dtype)}
    for name in ("head.projection.weight", "head.projection.bias"):
        rows = weights[name].clone()
        by_channel = rows.view(
            model.patch**2, model.out_channels, *rows.shape[1:]
        )  # features are ordered (row, column, channel)
        by_channel[:, : model.in_channels].neg_()
        changed[name] = rows
    return dict(weights) | changed
