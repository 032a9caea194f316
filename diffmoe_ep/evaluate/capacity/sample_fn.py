"""How evaluations of capacity call for samples: they say of what and with which settings, not from which model."""

from collections.abc import Callable

from torch import Tensor

from diffmoe_ep.config import SampleConfig
from diffmoe_ep.sampling.generate import Progress
from diffmoe_ep.sampling.prompts import Prompts
from diffmoe_ep.sampling.sample import Samples

Requested = Tensor | Prompts  # labels (n,), or as many prompts
# (what, how, called after each step) -> the samples on the first rank, None on the others; collective
SampleFn = Callable[[Requested, SampleConfig, Progress | None], Samples | None]
