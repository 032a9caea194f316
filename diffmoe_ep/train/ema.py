"""The averaged weights, sharded like the weights: each rank averages what it holds."""

import torch
from torch import Tensor
from torch.func import functional_call

from diffmoe_ep.config import EmaConfig
from diffmoe_ep.data.condition import Condition
from diffmoe_ep.model.dit import DiT, Output


class Ema:
    """Moving average of a model's parameters in float32. Thresholds stay the live ones unless the config asks for
    averaged ones.
    """

    def __init__(self, model: DiT, config: EmaConfig) -> None:
        self.model, self.config = model, config
        self.live: dict[str, Tensor] = dict(model.named_parameters())
        if config.thresholds == "averaged":
            self.live |= {
                name: buffer for name, buffer in model.named_buffers() if name.endswith("predictor.threshold")
            }
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (from 1)."""
        torch._foreach_lerp_(
            list(self.tensors.values()), [tensor.detach() for tensor in self.live.values()], 1 - self.decay(step)
        )

    def decay(self, step: int) -> float:
        """The decay at a step, with the ramp if it is on."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.ramp else self.config.decay

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """Run the model with the averaged weights in place of its own, which stay untouched."""
        output: Output = functional_call(self.model, self.tensors, (x, t, condition))
        return output
