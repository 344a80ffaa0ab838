"""Checks how docstrings open: with what a thing is or does, and not with a question word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_QUESTION = re.compile(r"(?:What|Which|Who|Whom|Whose|How|Where|Whether|Why)\b")
_CONDITION = re.compile(r"(?:When|If)\b")


def openings(files: Iterable[Path]) -> Iterator[str]:
    """A line for each docstring that opens with a question word, and for each string below a field that does."""
    for file in files:
        for line, text in docstrings(ast.parse(file.read_text())):
            if word := question(text):
                yield f"{file}:{line}: a docstring says what a thing is or does, and does not open with {word!r}"


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each docstring, and each string below a field, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.lineno, value.value.strip()


def question(text: str) -> str | None:
    """The question word that a docstring opens with. A condition with a main clause behind its comma is none."""
    if found := _QUESTION.match(text):
        return found[0]
    if found := _CONDITION.match(text):
        first = re.split(r"[.:;](?:\s|$)|\n\s*\n", text, maxsplit=1)[0]
        return None if "," in first else found[0]
    return None
