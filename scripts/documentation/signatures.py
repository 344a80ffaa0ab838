"""Signatures as text, with defaults as they are at run time and annotations as the source writes them."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any, ForwardRef

from pydantic import BaseModel
from pydantic.fields import FieldInfo

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


class _Text:
    """A text that `inspect.Signature` prints without the quotes that a string would get."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _annotation(value: Any) -> _Text:
    if isinstance(value, ForwardRef):  # of a NamedTuple's fields
        value = value.__forward_arg__
    return _Text((value if isinstance(value, str) else inspect.formatannotation(value)).strip('"'))


def signature(value: Any, *, bound: bool = False) -> str:
    """The signature in parentheses; empty if users don't call it. `bound` drops a method's first parameter."""
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return of_fields(value)
    if inspect.isclass(value) and not (is_dataclass(value) or hasattr(value, "_fields") or "__init__" in vars(value)):
        return ""
    inspected = inspect.signature(value)
    parameters = [_written(p) for p in list(inspected.parameters.values())[bound:] if not p.name.startswith("_")]
    returns = inspected.return_annotation
    returns = inspected.empty if returns is inspected.empty or inspect.isclass(value) else _annotation(returns)
    return str(inspect.Signature(parameters, return_annotation=returns))


def _written(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.annotation is not parameter.empty:
        parameter = parameter.replace(annotation=_annotation(parameter.annotation))
    if inspect.isroutine(parameter.default):
        return parameter.replace(default=_Text(parameter.default.__name__))
    if repr(parameter.default) == "<factory>":  # how dataclasses mark an empty container that is made for each instance
        return parameter.replace(default=_Text("..."))
    return parameter


def of_fields(model: type[BaseModel]) -> str:
    """The fields of a pydantic model, as keyword arguments."""
    written = [f"{name}: {annotation(model, name)}{_default(field)}" for name, field in model.model_fields.items()]
    return f"({', '.join(['*', *written])})" if written else "()"


def annotation(model: type[BaseModel], name: str) -> str:
    """A field's annotation, as the class that declares it writes it."""
    for cls in model.__mro__:
        if name in vars(cls).get("__annotations__", {}):
            return repr(_annotation(vars(cls)["__annotations__"][name]))
    raise LookupError(f"{model.__name__}.{name} is declared nowhere")


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"


def bounds(field: FieldInfo) -> str:
    """The allowed values of a field, such as "> 0, ≤ 1"."""
    limits = [
        (sign, getattr(constraint, name))
        for constraint in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(constraint, name)
    ]
    return ", ".join(f"{sign} {number:g}" for sign, number in limits)
