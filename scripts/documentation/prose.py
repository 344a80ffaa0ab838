"""The prose of a file, at its own place: everything else is blanked out, so that a finding has its line.

Of Markdown: no blocks of code, no addresses of links, no comments. Of Python: docstrings and comments, and the strings
that are handed to an exception or a warning. What stands in backticks counts as one word, a row of "¤".
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

_CODE = re.compile(r"^ *(```+|~~~+).*?^ *\1[^\n]*$|<!--.*?-->", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
_ADDRESS = re.compile(r"\]\([^)]*\)|<[^<>\n]+>|https?://\S+")
_LITERAL = re.compile(r"[fFrRbBuU]*(\"\"\"|'''|\"|')")


def prose_of(file: Path) -> str:
    """The text of a .md or .py file with spaces in the place of all that is no prose; line breaks stay."""
    text = file.read_text()
    return markdown(text) if file.suffix == ".md" else python(text)


def markdown(text: str) -> str:
    return _without_code(_CODE.sub(_blank, text))


def python(text: str) -> str:
    """Docstrings, comments and messages."""
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    shown = set(_messages_and_docstrings(ast.parse(text)))
    kept = list(re.sub(r"[^\n]", " ", text))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_string = token.type == tokenize.STRING or token.type in _FSTRING
        if token.type != tokenize.COMMENT and not (is_string and token.start[0] in shown):
            continue
        at = offsets[token.start[0] - 1] + token.start[1]
        said = _prose_of_token(token)
        kept[at : at + len(said)] = said
    return _without_code("".join(kept))


_FSTRING = tuple(getattr(tokenize, name) for name in ("FSTRING_MIDDLE",) if hasattr(tokenize, name))


def _prose_of_token(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        is_for_tools = re.match(r"#\s*(noqa|type:|pyright:|fmt:)", token.string)
        return _blank_text(token.string) if is_for_tools else " " + token.string[1:]
    opening = _LITERAL.match(token.string)
    if opening is None:
        return token.string
    quote = len(opening[1])
    inside = token.string[len(opening[0]) : -quote]
    if "f" in opening[0].lower():
        inside = re.sub(r"\{[^{}]*\}", _blank, inside)
    return " " * len(opening[0]) + inside + " " * quote


def _messages_and_docstrings(tree: ast.AST) -> Iterator[int]:
    """The lines on which a docstring begins, or a string of a message stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:  # a string below a field explains it
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    yield statement.lineno
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _warns(node)):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from range(part.lineno, (part.end_lineno or part.lineno) + 1)


def _warns(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in {"warn", "warn_once", "fail"}


def _without_code(text: str) -> str:
    return _ADDRESS.sub(_blank, _INLINE.sub(lambda found: re.sub(r"[^\n]", "¤", found[0]), text))


def _blank(found: re.Match[str]) -> str:
    return _blank_text(found[0])


def _blank_text(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The offset and the text of each sentence, list entry, table cell or heading. A semicolon ends a sentence, too."""
    for found in re.finditer(r"(?:(?!\n\s*\n|\n\s*[-*#|>]|\n\s*\d+\. |[.!?:;](?:\s|$)|\|).)+", text, re.DOTALL):
        if found[0].strip():
            yield found.start() + len(found[0]) - len(found[0].lstrip()), found[0].strip()
