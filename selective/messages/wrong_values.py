"""Turns pydantic's errors about policies and preconditioners into one line of plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from pydantic import PydanticUserError
from pydantic_core import ErrorDetails, ValidationError

from selective.messages.short import short

_UNDEFINED = re.compile(r"`(\w+)` is not fully defined; you should define `(\w+)`")
_SHOULD_BE = "Input should be "


@contextmanager
def in_plain_words() -> Iterator[None]:
    """Raise a pydantic `ValidationError` inside of this context again, as a `ValueError` of one line.

    A field whose annotation names what is not defined is a `TypeError` of one line.
    """
    try:
        yield
    except PydanticUserError as error:
        found = _UNDEFINED.match(error.message)
        if found is None:
            raise
        kind, name = found.groups()
        raise TypeError(f"{kind}: an annotation in its class body names {name!r}, which is not defined") from None
    except ValidationError as error:
        line = "; ".join(map(_sentence, error.errors(include_url=False)))
        raise ValueError(f"{error.title}: {line}") from None


def unknown_key(kind: str, key: Any, known: list[str]) -> str:
    """The message about a key that `kind` does not have, with the key that was probably meant."""
    near = get_close_matches(str(key), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown key; {kind} has {', '.join(known) or 'no hyper-parameters'}{hint}"


def _sentence(problem: ErrorDetails) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    if problem["type"] == "missing":
        return f"{path} is required"
    if problem["type"] == "value_error" or not path:
        return text if not path or text.startswith(f"{path}: ") else f"{path}: {text}"
    if text.startswith(_SHOULD_BE):
        must = text.removeprefix(_SHOULD_BE).partition(", unable to")[0]
        return f"{path} is {short(problem['input'])}, must be {must}"
    if problem["type"] == "unknown_key":
        return f"{path} is an {text}"
    return f"{path} is {short(problem['input'])}: {text}"


def frozen(kind: str, family: str, name: str, value: Any, in_init: bool, state: str) -> str:
    """The message about an assignment to an attribute of a frozen object.

    `in_init` is True in an `__init__` of the user's own. `state` says where this family keeps what changes from step to
    step.
    """
    if in_init:
        return (
            f"{kind}: self.{name} can't be assigned, because a {family} takes its hyper-parameters as fields; write "
            f"`{name}: {type(value).__name__}` in the class body in the place of __init__, and call {kind}({name}=...)"
        )
    return f"{kind}: self.{name} can't be assigned, because a {family} is frozen; {state}"
