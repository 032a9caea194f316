"""The transformer block with adaLN-Zero conditioning, its dense feed-forward network, and the head.

Legend: B samples, T tokens, D hidden size, M places for a caption's tokens.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ep.config import ModelConfig, PoolConfig
from diffmoe_ep.model.attention import Attention, CrossAttention
from diffmoe_ep.moe.experts import FeedForward
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.layer_report import LayerReport

Caption = tuple[Tensor, Tensor]  # (B, M, D), and (B, M) bool: where a token stands


def normalize(x: Tensor) -> Tensor:
    """LayerNorm without parameters, in x's own type (autocast would widen it, and the rows that travel)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens x (B, T, D) by vectors (B, D) of their sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """An attention half and a feed-forward half, dense or MoE, each modulated and gated by the condition (adaLN-Zero);
    between them, in a model of captions, a look at the caption.
    """

    def __init__(self, model: ModelConfig, pool: PoolConfig, is_moe: bool) -> None:
        super().__init__()
        self.attention = Attention(model.hidden_size, model.num_heads)
        self.cross_attention = CrossAttention(model.hidden_size, model.num_heads) if model.condition == "text" else None
        self.ffn: FeedForward | MoELayer = (
            MoELayer(model, pool) if is_moe else FeedForward(model.hidden_size, 4 * model.hidden_size)
        )
        self.modulation = nn.Linear(model.hidden_size, 6 * model.hidden_size)

    # fmt: off
    def forward(self, x: Tensor, c: Tensor, caption: Caption | None = None) -> tuple[Tensor, LayerReport | None]:
        """Tokens x (B, T, D), condition c (B, D) and, if the model takes text, the caption -> tokens (B, T, D), and
        what the MoE layer did.
        """
        modulation = self.modulation(F.silu(c))                                                         # (B, 6 D)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation.chunk(6, dim=1)  # (B, D) each
        x = self.attend(x, shift_attn, scale_attn, gate_attn, caption)                                  # (B, T, D)
        return self.feed_forward(x, shift_ffn, scale_ffn, gate_ffn)                                     # (B, T, D)

    def attend(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, caption: Caption | None) -> Tensor:
        """The attention half: tokens x (B, T, D) by vectors (B, D) -> (B, T, D)."""
        x = x + gate[:, None] * self.attention(modulate(normalize(x), shift, scale))                    # (B, T, D)
        if self.cross_attention is not None:
            assert caption is not None
            x = x + self.cross_attention(normalize(x), *caption)                                        # (B, T, D)
        return x

    def feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor, LayerReport | None]:
        """The feed-forward half: tokens x (B, T, D) by vectors (B, D) -> (B, T, D), and what the MoE layer did."""
        tokens = modulate(normalize(x), shift, scale)                                                   # (B, T, D)
        mixed, report = self.ffn(tokens) if isinstance(self.ffn, MoELayer) else (self.ffn(tokens), None)
        return x + gate[:, None] * mixed, report                                                        # (B, T, D)
    # fmt: on


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
