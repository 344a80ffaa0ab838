"""Errors of a chain's members, under the name of the chain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OURS = "SelectiveUpdate: "
CHAIN = "ChainedOptimizer"


def member(name: str) -> str:
    """The beginning of the errors of a chain's member."""
    return f"{CHAIN}, member {name!r}"


@contextmanager
def said_by(who: str | None) -> Iterator[None]:
    """Let errors that begin with "SelectiveUpdate" begin with `who`. They stay the same objects. None: all stay."""
    try:
        yield
    except Exception as error:
        text = error.args[0] if error.args else None
        if who is not None and isinstance(text, str) and text.startswith(_OURS):
            error.args = (f"{who}: {text[len(_OURS) :]}", *error.args[1:])
        raise
