"""Multi-head self-attention over the tokens of each sample."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Fused query, key and value with bias, rows [q; k; v] with the heads inside each; no normalisation of queries and keys."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, count, hidden = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D/H)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, count, hidden))
        return out
