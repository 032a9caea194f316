"""The transformer block with adaLN-Zero conditioning, its dense feed-forward network, and the head.

Legend: B samples, T tokens, D hidden size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_ep.config import ModelConfig, PoolConfig
from diffmoe_ep.model.attention import Attention
from diffmoe_ep.moe.experts import FeedForward
from diffmoe_ep.moe.layer import LayerReport, MoELayer


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without parameters, in x's own type (autocast would widen it, and the rows that travel)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens x (B, T, D) by vectors (B, D) of their sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and a feed-forward part, dense or MoE, each modulated and gated by the condition."""

    def __init__(self, model: ModelConfig, pool: PoolConfig, is_moe: bool) -> None:
        super().__init__()
        self.attention = Attention(model.hidden, model.heads)
        self.ffn: FeedForward | MoELayer = MoELayer(model, pool) if is_moe else FeedForward(model.hidden, 4 * model.hidden)
        self.modulation = nn.Linear(model.hidden, 6 * model.hidden)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, LayerReport | None]:
        """Tokens x (B, T, D) and condition c (B, D) -> tokens, and what the MoE layer did."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attention(modulate(normalise(x), shift_a, scale_a))
        out = self.ffn(modulate(normalise(x), shift_m, scale_m))
        mixed, report = out if isinstance(out, tuple) else (out, None)
        return x + gate_m[:, None] * mixed, report


class Head(nn.Module):
    """The last modulation and the map from tokens to patches."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(model.hidden, 2 * model.hidden)
        self.projection = nn.Linear(model.hidden, model.patch**2 * model.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, T, D) and condition c (B, D) -> (B, T, patch * patch * channels)."""
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        out: Tensor = self.projection(modulate(normalise(x), shift, scale))
        return out
