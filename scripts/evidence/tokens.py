"""Token files: a text as numbers, with what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evidence.packed import FOLDER, pack, unpack


@dataclass(frozen=True)
class Tokens:
    """A text: 1-d int32 tokens to train on and held-out ones, and its facts.

    `facts` has the size of the vocabulary, the sources with versions and licences, and the tokens' SHA-256.
    """

    train: Tensor
    held_out: Tensor
    facts: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        return self.facts["vocabulary"]


def write(name: str, train: Tensor, held_out: Tensor, facts: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write `NAME.tokens.xz`, both parts as little-endian uint16, and `NAME.json`. Tokens are below 65,536."""
    numbers = torch.cat((train, held_out))
    if len(numbers) and int(numbers.max()) >= 1 << 16:
        raise ValueError(f"{name}: the token {int(numbers.max())} does not fit into 16 bits; take a smaller vocabulary")
    content = numbers.numpy().astype("<u2").tobytes()
    pack(name, "tokens", content, {**facts, "train": len(train), "held_out": len(held_out)}, folder)


def read(name: str, folder: Path = FOLDER) -> Tokens:
    """Read what `write` wrote. Raises as `unpack` does."""
    text, large, _ = name.partition("-16k")
    options = f" --vocabulary 16384 --name {name}" if large else ""
    content, facts = unpack(name, "tokens", f"python scripts/evidence/data.py {text}{options}", folder)
    numbers = torch.frombuffer(content, dtype=torch.uint16).to(torch.int32)
    return Tokens(numbers[: facts["train"]], numbers[facts["train"] :], facts)
