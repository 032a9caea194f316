"""The transformer block with adaLN-Zero conditioning, its dense feed-forward network, and the head.

Legend: B samples, T tokens, D hidden size, M places for a caption's tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffmoe_ep.config import ModelConfig, PoolConfig
from diffmoe_ep.model.attention import Attention, CrossAttention
from diffmoe_ep.moe.experts import FeedForward
from diffmoe_ep.moe.layer import LayerReport, MoELayer, SavedRouting

Recompute = Literal["none", "ffn", "block"]
Step = tuple[Tensor, LayerReport | None]
Caption = tuple[Tensor, Tensor]  # (B, M, D), and (B, M) bool: where a token stands


def normalize(x: Tensor) -> Tensor:
    """LayerNorm without parameters, in x's own type (autocast would widen it, and the rows that travel)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens x (B, T, D) by vectors (B, D) of their sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and a feed-forward part, dense or MoE, each modulated and gated by the condition; between them a look
    at the caption.
    """

    def __init__(self, model: ModelConfig, pool: PoolConfig, is_moe: bool) -> None:
        super().__init__()
        self.attention = Attention(model.hidden_size, model.num_heads)
        self.cross_attention = CrossAttention(model.hidden_size, model.num_heads) if model.condition == "text" else None
        self.ffn: FeedForward | MoELayer = (
            MoELayer(model, pool) if is_moe else FeedForward(model.hidden_size, 4 * model.hidden_size)
        )
        self.modulation = nn.Linear(model.hidden_size, 6 * model.hidden_size)

    def compile_parts(self) -> None:
        """Let torch.compile fuse what needs no other rank: adaLN with attention, a dense feed-forward network, parts of
        an MoE layer.
        """
        self._attend = torch.compile(self._attend)  # type: ignore[method-assign]
        if isinstance(self.ffn, FeedForward):
            self.ffn.forward = torch.compile(self.ffn.forward)  # type: ignore[method-assign]
        else:
            self.ffn.compile_parts()

    def forward(self, x: Tensor, c: Tensor, recompute: Recompute = "none", caption: Caption | None = None) -> Step:
        """Tokens x (B, T, D), condition c (B, D) and, if the model takes text, the caption -> tokens, and what the MoE
        layer did.

        recompute: what is not kept for the backward but computed again there: nothing, the feed-forward part, or the
        whole block.
        """
        if recompute == "block":
            return computed_again(self._whole, x, c, caption)
        x, modulation = self._attend(x, c, caption)
        return (
            computed_again(self._feed, x, modulation)
            if recompute == "ffn"
            else self._feed(x, modulation, SavedRouting())
        )

    def _whole(self, x: Tensor, c: Tensor, caption: Caption | None, kept: SavedRouting) -> Step:
        return self._feed(*self._attend(x, c, caption), kept)

    def _attend(self, x: Tensor, c: Tensor, caption: Caption | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        shift, scale, gate, *modulation = self.modulation(F.silu(c)).chunk(6, dim=1)
        x = x + gate[:, None] * self.attention(modulate(normalize(x), shift, scale))
        if self.cross_attention is not None:
            assert caption is not None
            x = x + self.cross_attention(normalize(x), *caption)
        return x, tuple(modulation)

    def _feed(self, x: Tensor, modulation: tuple[Tensor, ...], kept: SavedRouting) -> Step:
        shift, scale, gate = modulation
        tokens = modulate(normalize(x), shift, scale)
        mixed, report = self.ffn(tokens, kept) if isinstance(self.ffn, MoELayer) else (self.ffn(tokens), None)
        return x + gate[:, None] * mixed, report


def computed_again(function: Callable[..., Step], *inputs: Any) -> Step:
    """Compute function(*inputs, kept) and keep only the inputs; the backward computes the rest again, but with the
    choice that was made.

    Every rank does so at the same place of its backward, so that the rows that travel again meet. Nothing random is
    drawn in a forward.
    """
    return cast(Step, checkpoint(function, *inputs, SavedRouting(), use_reentrant=False, preserve_rng_state=False))


class Head(nn.Module):
    """The last modulation and the map from tokens to patches."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(model.hidden_size, 2 * model.hidden_size)
        self.projection = nn.Linear(model.hidden_size, model.patch**2 * model.out_channels)
        self.out_channels = model.out_channels

    def forward(self, x: Tensor, c: Tensor, channels: int) -> Tensor:
        """Tokens x (B, T, D) and condition c (B, D) -> (B, T, patch * patch * channels), of each pixel the first
        `channels` alone.
        """
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        rows = (-1, self.out_channels)  # of the weight, ordered (pixel of the patch, channel)
        weight = self.projection.weight.unflatten(0, rows)[:, :channels].flatten(0, 1)
        bias = self.projection.bias.unflatten(0, rows)[:, :channels].flatten()
        return F.linear(modulate(normalize(x), shift, scale), weight, bias)
