"""The diffusion transformer, dense or DiffMoE, as a plain single-device model.

Legend: B samples, C channels, T tokens, D hidden size, L blocks, M places for a caption's tokens.

`model(x, t, condition)` returns an `Output`; nothing in it knows of ranks. `model.parallelize` slices the experts and
swaps the dispatcher for a run on many ranks, and applies recomputation and compilation; samplers and objectives only
see a callable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ModelConfig, PoolConfig, has_experts
from diffmoe_ep.data.condition import CaptionFeatures, Condition
from diffmoe_ep.model.block import Block, Caption, Head
from diffmoe_ep.model.embed import CaptionEmbed, LabelEmbed, PatchEmbed, TimeEmbed, sine_positions, unpatchify
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.layer_report import LayerReport


@dataclass(frozen=True)
class Output:
    """What a forward returns."""

    prediction: Tensor  # (B, out_channels or fewer, H, W) at least float32; under flow eps - x_0
    auxiliary: Tensor  # scalar to add to the objective's loss: predictors' and balance loss, weighted; 0 in eval mode
    layers: tuple[LayerReport, ...]  # what each MoE layer did


def is_moe(model: ModelConfig, block: int) -> bool:
    """Whether block i (from 0) is an MoE block: every odd one, or all without interleaving."""
    return has_experts(model) and (not model.interleave or block % 2 == 1)


class DiT(nn.Module):
    """Patches -> L blocks conditioned on time, and on a label or a caption -> patches."""

    positions: Tensor

    def __init__(self, model: ModelConfig, pool: PoolConfig | None = None) -> None:
        """Build with empty weights (see `initialize`)."""
        super().__init__()
        pool = pool or PoolConfig()
        self.config = model
        self.compute_type: torch.dtype | None = None  # bfloat16 computes by autocast; None: in the weights' own type
        self.channels = model.out_channels  # how many of them are predicted; flow needs in_channels only
        self.patches = PatchEmbed(model.in_channels, model.hidden_size, model.patch)
        self.time = TimeEmbed(model.hidden_size)
        self.label = LabelEmbed(model.num_classes, model.hidden_size) if model.condition == "class" else None
        self.caption = CaptionEmbed(model.text_width, model.hidden_size) if model.condition == "text" else None
        self.blocks = nn.ModuleList(Block(model, pool, is_moe(model, index)) for index in range(model.num_blocks))
        self.head = Head(model)
        self.register_buffer(
            "positions", sine_positions(model.hidden_size, model.input_size // model.patch), persistent=False
        )

    # fmt: off
    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """Images x (B, C, H, W) at times t (B,) with condition -> Output.

        condition: labels (B,) int64 (num_classes: the null class), or CaptionFeatures (B, M, E) where model.condition
        is text.
        """
        with torch.autocast(x.device.type, self.compute_type, enabled=self.compute_type is not None):
            tokens = self.patches(x)                                         # (B, T, D)
            tokens = tokens + self.positions.to(tokens.dtype)                # (B, T, D)
            c, caption = self.embed(t, condition)                            # (B, D), and (B, M, D) with its mask
            reports = []
            for block in self.blocks:
                tokens, report = block(tokens, c, caption)                   # (B, T, D)
                reports.append(report)
            patches = self.head(tokens, c, self.channels)                    # (B, T, patch * patch * channels)
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        prediction = unpatchify(patches, self.config.patch, self.channels)   # (B, channels, H, W)
        layers = tuple(report for report in reports if report is not None)
        return Output(prediction, self._auxiliary(layers, prediction), layers)
    # fmt: on

    def embed(self, t: Tensor, condition: Condition) -> tuple[Tensor, Caption | None]:
        """What modulates every block (B, D), and the caption that every block looks at."""
        with torch.autocast(t.device.type, enabled=False):  # bfloat16 tells about 256 times apart
            time = self.time(t)
        if self.caption is not None:
            assert isinstance(condition, CaptionFeatures), "this model takes captions"
            return time, self.caption(condition)
        assert self.label is not None and isinstance(condition, Tensor), "this model takes labels"
        return time + self.label(condition), None

    def _auxiliary(self, layers: tuple[LayerReport, ...], like: Tensor) -> Tensor:
        total = like.new_zeros(())
        losses = [report.loss for report in layers if report.loss is not None]
        if losses:
            stacked = torch.stack(losses)
            reduced = stacked.sum() if self.config.predictor_reduction == "sum" else stacked.mean()
            total = total + reduced * self.config.predictor_weight
        for report in layers:
            if report.balance is not None:
                total = total + report.balance * self.config.balance_weight
        return total

    def allocate(self, device: torch.device | str) -> "DiT":
        """Allocate the memory of a model that was built on the meta device; weights are still to be filled, buffers are
        as they start.
        """
        self.to_empty(device=device)
        self.positions.copy_(sine_positions(self.config.hidden_size, self.config.input_size // self.config.patch))
        for layer in self.moe_layers():
            if layer.predictor is not None:
                layer.predictor.reset()
        return self

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first to last."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoELayer)]

    def set_inference(self, rule: InferenceRule) -> None:
        """Set how experts choose tokens in eval mode."""
        for layer in self.moe_layers():
            layer.rule = rule
