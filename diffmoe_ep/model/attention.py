"""Multi-head attention: of each sample's tokens over one another, and over its caption.

Legend: B samples, T tokens, M places for a caption's tokens, D hidden size, H heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Fused query, key and value with bias, rows [q; k; v] with the heads inside each; no normalisation of queries and
    keys.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, count, hidden = x.shape
        if not batch:  # a rank may have no samples, and not every kernel of attention takes none
            return x
        qkv = (
            self.qkv(x).view(batch, count, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        )  # (3, B, H, T, D/H)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, count, hidden))
        return out


class CrossAttention(nn.Module):
    """Queries from the image's tokens, keys and values from the caption's; all four maps with bias, no
    normalisation.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.projection = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D), caption (B, M, D), mask (B, M) bool, true where a token of the caption stands -> (B, T, D)."""
        if not len(x):
            return x
        query, key, value = (
            map_(rows).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T or M, D/H)
            for map_, rows in ((self.query, x), (self.key, caption), (self.value, caption))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(x.shape))
        return out
