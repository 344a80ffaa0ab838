"""The attention of the encoders: a matrix for each projection, as in BERT and ViT."""

from __future__ import annotations

from torch import Tensor, nn


class Attention(nn.Module):
    """Attention over all tokens, or over those that `seen` allows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        queries, keys, values = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.out(mixed.transpose(1, 2).flatten(2))
