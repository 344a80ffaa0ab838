"""A small LLaMA-style model that tensor parallelism can cut: a matrix for each projection, and shared key heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective.compare.model import rotate


@dataclass(frozen=True)
class Size:
    vocabulary: int = 64
    width: int = 32
    layers: int = 1
    mlp: int = 48
    heads: int = 4
    key_heads: int = 4
    context: int = 16


# Of the shapes in `selective.bench.shapes`, with heads of 64 features.
SIZES = {
    "tiny": Size(),
    "llama-110m": Size(16_384, 768, 12, 2048, 12, 12, 1024),
    "llama-1b": Size(32_000, 2048, 22, 5632, 32, 4, 2048),
}


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`. The number of heads follows from what is here of a matrix."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features = size.width // size.heads
        keys = size.key_heads * self.features
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.q, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(size.width, keys, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(size.width, size.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(size.mlp, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (part(normed).unflatten(-1, (-1, self.features)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    """Predicts the next token: int64 (batch, tokens) in, logits (batch, tokens, vocabulary) out."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        with torch.device("meta"):  # no weights yet: the modules' own would draw from the global generator
            self.embedding = nn.Embedding(size.vocabulary, size.width)
            self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
            self.norm = nn.RMSNorm(size.width)
            self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.to_empty(device=device)
        values = torch.Generator(device).manual_seed(seed)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02, generator=values)
            else:
                nn.init.ones_(p)
        features = size.width // size.heads
        turns = 10_000 ** (-torch.arange(0, features, 2, device=device) / features)
        angle = torch.arange(size.context, device=device)[:, None] * turns
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))
