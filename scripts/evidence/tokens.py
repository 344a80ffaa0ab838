"""Token files: a text as numbers, with what it is made of."""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selective.compare.train import write_atomically

FOLDER = Path(__file__).resolve().parents[2] / "data" / "evidence"


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
    facts = {**facts, "train": len(train), "held_out": len(held_out), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / f"{name}.tokens.xz", lzma.compress(content, preset=6))
    write_atomically(folder / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())


def read(name: str, folder: Path = FOLDER) -> Tokens:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: there is no such text yet.
        ValueError: the tokens are not those of the facts.
    """
    if not (folder / f"{name}.json").exists():
        raise FileNotFoundError(
            f"{folder}: there are no tokens of {name!r}; `python scripts/evidence/data.py {name}` makes them"
        )
    facts = json.loads((folder / f"{name}.json").read_text())
    content = lzma.decompress((folder / f"{name}.tokens.xz").read_bytes())
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise ValueError(f"{folder}: {name}.tokens.xz is not the file that {name}.json describes; make both again")
    numbers = torch.frombuffer(bytearray(content), dtype=torch.uint16).to(torch.int32)
    return Tokens(numbers[: facts["train"]], numbers[facts["train"] :], facts)
