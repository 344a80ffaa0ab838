"""Checks the body of a class of policies, selections, strengths or preconditioners before pydantic reads it.

The check stands in `items()`, which pydantic calls behind the last line of a class body, before its first error. A
`__new__` of our own would hide the frame in which pydantic looks up names.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from types import FunctionType
from typing import Any

from pydantic import BaseModel, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter
from torch import Tensor

_NO_FIELD = (FunctionType, property, classmethod, staticmethod, type)
_NO_FIELD_OF = ("functools", "pydantic", "typing", "typing_extensions")  # whose objects pydantic knows how to take


class CheckedBody(dict[str, Any]):
    """The namespace of a class body. Reading its items refuses attributes that pydantic could only refuse in jargon."""

    bases: tuple[type, ...] = ()

    def items(self) -> Any:
        for name, value in super().items():
            if not name.startswith("_") and name != "model_config" and self._is_unannotated(name, value):
                raise TypeError(_without_annotation(self["__qualname__"].rpartition(".")[2], name, value))
        return super().items()

    def _is_unannotated(self, name: str, value: Any) -> bool:
        if name in self["__annotations__"] or isinstance(value, _NO_FIELD):
            return False
        if type(value).__module__.partition(".")[0] in _NO_FIELD_OF and type(value).__name__ != "FieldInfo":
            return False
        return not any(name in getattr(base, "__class_vars__", ()) for base in self.bases)


@lru_cache
def checked_body(namespace: type[dict[str, Any]]) -> type[CheckedBody]:
    """`CheckedBody` as a subclass of pydantic's own namespace, which warns of other mistakes."""
    return type("CheckedBody", (CheckedBody, namespace), {})


def _without_annotation(kind: str, name: str, value: Any) -> str:
    if callable(value) and not isinstance(value, Tensor):
        return (
            f"{kind}: {name} is an object of type {type(value).__name__}; write `def {name}(self, ...):` and call it "
            f"there, or `{name}: ClassVar = ...` for a constant of the class"
        )
    what = type(value).__name__ if isinstance(value, (bool, int, float, str)) else "..."
    return (
        f"{kind}: {name} has no annotation; write `{name}: {what} = ...` for a hyper-parameter, or "
        f"`{name}: ClassVar = ...` for a constant of the class"
    )


def refuse_field(kind: str, name: str, annotation: Any, meant: Any) -> None:
    """Raise TypeError for a field that holds a tensor, or something else that JSON can't hold.

    `meant` is what the annotation stands for if it is text, or any object that is no class if that is not known.
    """
    meant = meant if isinstance(annotation, str) else annotation
    is_tensor = isinstance(meant, type) and issubclass(meant, Tensor)
    if is_tensor or annotation in ("Tensor", "torch.Tensor"):
        raise TypeError(
            f"{kind}: the field {name!r} is a tensor, and hyper-parameters are saved as JSON; write numbers, or a "
            f"tuple of them, and keep tensors in the state that init_state makes"
        )

    if isinstance(meant, type) and meant.__module__ != "builtins" and not _has_schema(meant):
        raise TypeError(
            f"{kind}: the field {name!r} is of type {meant.__name__}, and hyper-parameters are saved as JSON; write "
            f"numbers, text, or tuples of them, or `{name}: ClassVar = ...` for a constant of the class"
        )


def _has_schema(annotation: type) -> bool:
    """True if pydantic knows how to check a value of this class."""
    if issubclass(annotation, BaseModel):
        return True
    try:
        TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return False
    except PydanticUserError:  # names something that is not defined yet
        return True
    return True


def unbuilt(kind: str, family: str, fields: Iterable[str]) -> str:
    """The message about an object whose own `__init__` did not call that of its base class."""
    names = ", ".join(f"{name}={name}" for name in fields)
    return (
        f"{kind}: its __init__ does not call super().__init__({names}), so that it is no whole {family}; leave it out"
    )
