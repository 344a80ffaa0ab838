"""The words of `explain()` on one kind of parameter group, as data: a title, and lines of a label and a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """A line of a paragraph. The label is empty if the text goes on with what the line above is about."""

    label: str
    text: str

    def __str__(self) -> str:
        return f"  {self.label:<10}{self.text}"


class Paragraph(NamedTuple):
    """The title and the lines of the parameter groups with these numbers, of which the same can be said."""

    numbers: tuple[int, ...]
    title: str
    lines: tuple[Line, ...]
    lasting_bytes: int  # that the wrapper keeps for these groups between steps, beside the base's state

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.lines)])

    def texts(self, label: str) -> list[str]:
        """Return the texts under this label, those that go on in lines without one included."""
        texts: list[str] = []
        inside = False
        for line in self.lines:
            inside = line.label == label or (inside and not line.label)
            texts += [line.text] if inside else []
        return texts


def under(label: str, texts: Sequence[str]) -> list[Line]:
    """Return the lines of several texts under one label."""
    return [Line("" if number else label, text) for number, text in enumerate(texts)]
