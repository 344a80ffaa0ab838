"""A Hugging Face model and a data set from memory: a small Llama learns to add numbers, written as text.

The weights are random. Write `AutoModelForCausalLM.from_pretrained(...)` in `model` to fine-tune instead.

    selective compare --task examples/task_huggingface.py:Sums --preconditioner soap --policy Cautious --device cuda
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from selective import Cautious, Soap
from selective.compare import compare

CHARACTERS = "0123456789+= "
LENGTH = 12


def encoded(text: str) -> dict[str, Tensor]:
    """A row of the data set: the tokens of the text, padded, and labels that leave the padding out."""
    tokens = torch.tensor([CHARACTERS.index(character) for character in text.ljust(LENGTH)])
    return {"input_ids": tokens, "labels": tokens.where(tokens != CHARACTERS.index(" "), -100)}


class Sums:
    """Next-token prediction of lines like `12+34=46`."""

    name = "Llama on sums"
    unit = "nats per token"

    def __init__(self) -> None:
        rows = [encoded(f"{a}+{b}={a + b}") for a in range(40) for b in range(40)]
        self.held_out = rows[::16]
        self.rows = [row for index, row in enumerate(rows) if index % 16]

    def model(self, seed: int) -> nn.Module:
        config = LlamaConfig(
            vocab_size=len(CHARACTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def batches(self, seed: int) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=16, shuffle=True)  # pyright: ignore[reportArgumentType]

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def evaluate(self, model: Any) -> float:
        batch = torch.utils.data.default_collate(self.held_out)
        return self.loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).item()


if __name__ == "__main__":
    comparison = compare(
        Sums(), [Cautious(), Soap()], lrs=[3e-3], seeds=2, steps=12, policies_in_spaces=False, out="huggingface",
        show=False,
    )  # fmt: skip
    for label, verdict in comparison.summary.verdicts:
        print(f"{label}: {verdict}")
    print("ok")
