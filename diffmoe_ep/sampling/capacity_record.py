"""How much compute samples cost: the tokens that experts process while a model is sampled.

Legend: N experts, C capacity (1 is the compute of a dense model).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.model.dit import Output


@dataclass(frozen=True)
class CapacityRecord:
    """How many tokens the experts processed while sampling, by step, MoE layer and expert; exact counts in float64.

    A step is a solver's step with all its evaluations. For dopri5, whose steps differ between chunks, it is an
    evaluation: number i of every chunk together, as many as the longest chunk has.
    """

    # (steps, layers, N) float64: tokens that each expert processed, conditional and unconditional halves together
    processed: Tensor
    tokens: Tensor  # (steps, layers) float64: tokens that were offered to each layer

    @classmethod
    def empty(cls, steps: int = 0) -> "CapacityRecord":
        """The record of a dense model, or of no work at all."""
        return cls(torch.zeros(steps, 0, 0, dtype=torch.float64), torch.zeros(steps, 0, dtype=torch.float64))

    @property
    def is_empty(self) -> bool:
        """Whether there is no MoE layer in it, as for a dense model."""
        return self.processed.numel() == 0

    def per_step(self) -> Tensor:
        """C of every sampling step, (steps,): mean over layers and experts of N * processed / tokens (Eq. 8, 9)."""
        return self._capacity().mean((1, 2))

    def per_layer_expert(self) -> Tensor:
        """C of every expert, (layers, N), mean over sampling steps."""
        return self._capacity().mean(0)

    def average(self) -> float:
        """C_infer^avg (Eq. 15): the mean of per_step; 1.0 for a dense model, whose compute is the unit."""
        return 1.0 if self.is_empty else float(self.per_step().mean())

    def merge(self, other: "CapacityRecord") -> "CapacityRecord":
        """The record of both together; counts are whole numbers, so the order of merging changes no bit."""
        if self.is_empty or other.is_empty:
            return other if self.is_empty else self
        if self.processed.shape[1:] != other.processed.shape[1:]:
            raise ValueError(
                f"capacity records of shapes {tuple(self.processed.shape)} and {tuple(other.processed.shape)} "
                "do not add up"
            )
        steps = max(len(self.tokens), len(other.tokens))
        return CapacityRecord(
            _lengthen(self.processed, steps) + _lengthen(other.processed, steps),
            _lengthen(self.tokens, steps) + _lengthen(other.tokens, steps),
        )

    def _capacity(self) -> Tensor:
        return self.processed.shape[2] * self.processed / self.tokens[:, :, None]  # (steps, layers, N)


class CapacityCounter:
    """Adds up the layers' reports on their own device, so that no step waits for the host."""

    def __init__(self) -> None:
        self.step = 0
        self.processed: list[Tensor] = []  # for each step (layers, N) float64
        self.tokens: list[int] = []  # for each step; every layer sees all tokens

    def add(self, output: Output) -> None:
        """Count one forward pass into the present step."""
        if not output.layers:
            return
        processed = torch.stack([layer.processed for layer in output.layers]).double()  # (layers, N)
        while len(self.tokens) <= self.step:
            self.processed.append(torch.zeros_like(processed))
            self.tokens.append(0)
        self.processed[self.step] += processed
        self.tokens[self.step] += output.layers[0].num_tokens

    def record(self) -> CapacityRecord:
        """The counts so far, on the CPU."""
        if not self.processed:
            return CapacityRecord.empty(self.step)
        processed = torch.stack(self.processed).cpu()  # (steps, layers, N)
        return CapacityRecord(
            processed, torch.tensor(self.tokens, dtype=torch.float64)[:, None].repeat(1, processed.shape[1])
        )


def _lengthen(counts: Tensor, steps: int) -> Tensor:
    return torch.cat([counts, counts.new_zeros(steps - len(counts), *counts.shape[1:])])
