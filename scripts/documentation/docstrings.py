"""Turns a docstring into Markdown for MyST.

Ours are Markdown already, except for their sections (Args, Returns, Raises) and for signs that are arithmetic in prose
and markup to a parser (`*`, `<`). The sections become field lists, which Sphinx sets as tables of parameters.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator

SECTIONS = {"Args": "param", "Raises": "raises", "Returns": "returns"}
_ITEM = re.compile(r"(\w+(?:, \w+)*): ")
_CODE = re.compile(r"(`[^`]*`)", flags=re.DOTALL)
_MARKUP = re.compile(r"^(?=[>#+-])")  # a quotation, a title, a list
_STAR = re.compile(r"(?<!\\)\*")
_EMPHASIS = re.compile(r"(?<![\w*\\])(\*{1,2})(?=\w)([^*\n]*\w)\1(?![\w*])")
_ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})")


def to_markdown(docstring: str | None, names: Collection[str] = ()) -> str:
    """The docstring as Markdown. Any paragraph of lines "name: text" becomes a list if the names are in `names`.

    `names` are the parameters or fields of the object.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring or "").strip("\n"))
    return "\n\n".join(_paragraph(paragraph, names) for paragraph in paragraphs if paragraph.strip())


def _paragraph(text: str, names: Collection[str]) -> str:
    head, _, rest = text.partition("\n")
    section = SECTIONS.get(head.removesuffix(":")) if head.endswith(":") else None
    if section == "returns":
        return field("returns", inspect.cleandoc(rest))
    if section:
        return "\n".join(_items(inspect.cleandoc(rest), section))
    if text.startswith("    "):
        return text  # code
    first = _ITEM.match(text)
    if first and set(first[1].split(", ")) <= set(names):
        return "\n".join(_items(text, "param"))
    return prose(text)


def _items(text: str, section: str) -> Iterator[str]:
    """Yield a field for each line "name: text". Indented lines continue the line before."""
    items: list[list[str]] = []
    for line in text.splitlines():
        if _ITEM.match(line):
            items.append([line])
        elif items:
            items[-1].append(line.strip())
        else:
            raise ValueError(f"{line!r}: a section begins with a line `name: what it is`")
    for lines in items:
        names, _, what = " ".join(lines).partition(": ")
        first, *others = names.split(", ")
        yield field(f"{section} {first}", what)
        yield from (field(f"{section} {other}", f"as `{first}`") for other in others)


def field(name: str, what: str) -> str:
    """A line of a field list, with the text in one paragraph whatever sign it begins with."""
    text = _MARKUP.sub(r"\\", prose(" ".join(what.split())))
    return f":{name}: {text}"


def prose(text: str) -> str:
    """Escape HTML and arithmetic that looks like emphasis, and link papers, outside of `code`."""
    parts = _CODE.split(text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    codes: list[str] = []

    def keep(match: re.Match[str]) -> str:
        codes.append(match[0])
        return f"\0{len(codes) - 1}\0"

    text = _EMPHASIS.sub(keep, text)
    text = _STAR.sub(r"\\*", text).replace("<", "&lt;")
    text = re.sub(r"\0(\d+)\0", lambda match: codes[int(match[1])], text)
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
