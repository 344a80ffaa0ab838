"""The language models of the scripts: LLaMA-style, with a matrix for each projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selective.compare.config import ModelConfig
from selective.compare.model import GPT


class Apart(nn.Module):
    """Linear layers that read the same input, each with a matrix of its own, as in LLaMA.

    Queries, keys and values in one matrix would be rotated together, which is another rotation.
    """

    def __init__(self, together: nn.Linear, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(part.detach().clone() for part in together.weight.chunk(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, torch.cat(list(self.weights)))


def llama_model(config: ModelConfig, seed: int, vocabulary: int, fused: bool = False) -> GPT:
    """The model of `selective compare`, with separate projections unless `fused`. Both start as the same function."""
    model = GPT(config, seed, vocabulary)
    if not fused:
        for block in model.blocks:
            for name, count in (("qkv", 3), ("mlp_in", 2)):
                together = getattr(block, name)
                assert isinstance(together, nn.Linear)
                setattr(block, name, Apart(together, count))
    return model
