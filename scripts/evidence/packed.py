"""Packed files: bytes, compressed without loss, beside a JSON file of facts with their SHA-256."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

from selective.compare.train import write_atomically

FOLDER = Path(__file__).resolve().parents[2] / "data" / "evidence"


def pack(name: str, kind: str, content: bytes, facts: dict[str, Any], folder: Path) -> None:
    """Write `NAME.KIND.xz`, the bytes, and `NAME.json`, the facts."""
    facts = {**facts, "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / f"{name}.{kind}.xz", lzma.compress(content, preset=6))
    write_atomically(folder / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())


def unpack(name: str, kind: str, command: str, folder: Path) -> tuple[bytearray, dict[str, Any]]:
    """Read what `pack` wrote.

    Args:
        command: what makes the files, for the message if they are missing.

    Raises:
        FileNotFoundError: the files are not there yet.
        ValueError: the bytes are not those of the facts.
    """
    if not (folder / f"{name}.json").exists():
        raise FileNotFoundError(f"{folder}: there are no {kind} of {name!r}; `{command}` makes them")
    facts = json.loads((folder / f"{name}.json").read_text())
    content = lzma.decompress((folder / f"{name}.{kind}.xz").read_bytes())
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise ValueError(f"{folder}: {name}.{kind}.xz is not the file that {name}.json describes; make both again")
    return bytearray(content), facts
