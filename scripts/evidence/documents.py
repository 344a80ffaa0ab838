"""The documents of a text: files, or entries of a dictionary with the same first three letters. Some are held out."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evidence.fetch import fetched, files_of
from evidence.sources import Source

HELD_OUT = 0.02  # the share of the documents
NOT_TRAINED_ON = {"test", "tests"}  # folders: tables of expected numbers are no prose


@dataclass(frozen=True)
class Document:
    """One text that is trained on as a whole, or held out as a whole."""

    name: str
    text: str

    @property
    def order(self) -> float:
        """A number in [0, 1) from the name, by which documents are put in order."""
        return self._number(0)

    @property
    def held_out(self) -> bool:
        """True if the document is no part of the training text, which follows from its name alone."""
        return self._number(6) < HELD_OUT

    def _number(self, first: int) -> float:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[first : first + 6], "big") / 2**48


def documents(source: Source, folder: Path) -> list[Document]:
    """The documents of a package in the order of their names' hashes, as many as `source.most` characters allow."""
    size, taken = 0, []
    for document in sorted(_all(source, fetched(source, folder)), key=lambda document: document.order):
        if size + len(document.text) <= source.most:
            size += len(document.text)
            taken.append(document)
    return taken


def _all(source: Source, archive: Path) -> Iterator[Document]:
    for path, content in files_of(archive, source.pattern):
        if NOT_TRAINED_ON.intersection(path.split("/")):
            continue
        text = (gzip.decompress(content) if path.endswith(".dz") else content).decode(errors="replace")
        if not source.entries:
            yield Document(f"{source.package}/{path}", text)
            continue
        for letters, entries in by_first_letters(text).items():
            yield Document(f"{source.package}/{letters}", entries)


def by_first_letters(dictionary: str) -> dict[str, str]:
    """The entries of a dictionary, joined by the first three letters of their headwords, which are not indented."""
    joined: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", dictionary):
        joined.setdefault(entry[:3].lower(), []).append(entry)
    return {letters: "\n".join(entries) for letters, entries in joined.items()}


def without_copies(everything: list[Document]) -> list[Document]:
    """The documents without those that are word for word the same as an earlier one, held out or not."""
    return list({document.text: document for document in reversed(everything)}.values())[::-1]
