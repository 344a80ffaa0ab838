"""A small GPT over bytes: pre-norm blocks with RMSNorm, rotary positions, causal attention and a SwiGLU MLP.

The head is not tied to the embedding. With 256 tokens tying would save a few per cent of the parameters only, and it
would mix two kinds of gradient in one tensor (the embedding's rows are zero for bytes that are not in the batch),
so that the share selected of neither could be read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective.compare.config import ModelConfig

VOCABULARY = 256  # bytes


def hidden_width(width: int) -> int:
    """The SwiGLU MLP's inner width: 8/3 of `width`, rounded up to a multiple of 32.

    Its three matrices then have about as many parameters as the two of an MLP with 4 times the width.
    """
    return -(-8 * width // 96) * 32


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`. Input and output: (batch, tokens, width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, hidden_width(config.width)
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)  # gate and value in one product
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, features)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        gate, value = self.mlp_in(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * value)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (arXiv 2104.09864). The first half of the features is paired with the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """Predicts the next token: int64 (batch, tokens) in, float32 logits (batch, tokens, vocabulary) out.

    Tokens are bytes unless another `vocabulary` is given. The weights depend on `seed` alone; the global generators are
    not touched. Matrices are normal with a deviation of 0.02, which is divided by sqrt(2 * layers) for those that write
    into the residual stream (as in GPT-2).
    """

    def __init__(self, config: ModelConfig, seed: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        with torch.device("meta"):  # no weights yet: the modules' own initialisation would draw global numbers
            self.embedding = nn.Embedding(vocabulary, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width)
            self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.to_empty(device="cpu")
        self._initialise(torch.Generator().manual_seed(seed), config.layers)
        features = config.width // config.heads
        angle = torch.arange(config.context)[:, None] * 10_000 ** (-torch.arange(0, features, 2) / features)
        self.cos: Tensor  # (context, features / 2)
        self.sin: Tensor
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _initialise(self, generator: torch.Generator, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            deviation = 0.02 / (2 * layers) ** 0.5 if "_out" in name else 0.02
            nn.init.normal_(parameter, std=deviation, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of `windows`, int64 (batch, context + 1)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
