"""Checks of a selection's own Triton function that need no Triton: its signature, its `select`, its numbers."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

TENSORS = ("grad", "update", "momentum")  # a kernel's first parameters: the tensors that it can see
MOST_NUMBERS = 4
HEAD = f"kernel({', '.join(TENSORS)}, ...)"


def take_kernel(cls: type[Any], head: type[Any]) -> tuple[str, ...]:
    """Check the `kernel` of a selection's class, and make it a static method. Returns the names of its numbers.

    `head` is the base class of all selections. Raises TypeError, which says what to write instead.
    """
    declared = inspect.getattr_static(cls, "kernel")
    kernel = declared.__func__ if isinstance(declared, staticmethod) else declared
    if kernel is None:
        return ()
    if isinstance(declared, FunctionType):  # as an attribute of an instance it would take the instance for its gradient
        cls.kernel = staticmethod(kernel)
    _check_company(cls, head)
    return _numbers(cls, kernel)


def _check_company(cls: type[Any], head: type[Any]) -> None:
    """Refuse a kernel that does not go with the rest of its class."""
    who = cls.__name__
    twin, owner = _defined_in(cls, "select"), _defined_in(cls, "kernel")
    if cls.spec is not head.spec:
        raise TypeError(
            f"{who}: {_defined_in(cls, 'spec').__name__} has kernels of its own, so that this kernel would not run; "
            f"make it a subclass of Selection"
        )
    if twin is head:
        raise TypeError(
            f"{who}: a kernel needs its twin in torch, which runs where no kernel can: override select(view) to "
            f"select the same elements"
        )
    if issubclass(twin, owner) and twin is not owner:
        raise TypeError(
            f"{who}: select is {twin.__name__}'s, the kernel still {owner.__name__}'s; both have to select the same: "
            f"give {twin.__name__} a kernel too, or kernel = None"
        )
    unseen = sorted(set(cls.reads) - set(TENSORS))
    if unseen:
        raise TypeError(
            f"{who}: reads names {unseen}; a kernel can see {', '.join(TENSORS)} and numbers, and nothing else of a "
            f"step: take {unseen[0]!r} out of reads, or leave the kernel out and write select(view) alone"
        )


def _numbers(cls: type[Any], kernel: Any) -> tuple[str, ...]:
    """The kernel's parameters after the tensors. Each has to be a field that holds a number."""
    who = cls.__name__
    function = getattr(kernel, "fn", kernel)  # the plain function inside of what `triton.jit` returns
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise TypeError(
            f"{who}: kernel is {kernel!r}; write it with `def {HEAD}`, with or without @triton.jit: Triton compiles "
            f"its source"
        )
    parameters = list(inspect.signature(function).parameters.values())
    names = tuple(p.name for p in parameters)
    if names[: len(TENSORS)] != TENSORS or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise TypeError(
            f"{who}: found kernel({', '.join(map(str, parameters))}); a kernel takes {', '.join(TENSORS)} and then "
            f"fields of its class by name: write {HEAD}"
        )
    numbers = names[len(TENSORS) :]
    if len(numbers) > MOST_NUMBERS:
        raise TypeError(
            f"{who}: kernel takes {len(numbers)} numbers ({', '.join(numbers)}), at most {MOST_NUMBERS} can be handed "
            f"to it; make one field of several, or a constant in the function"
        )
    for name in numbers:
        field = cls.model_fields.get(name)
        if field is None or field.annotation not in (float, int, bool):
            fields = [n for n, f in cls.model_fields.items() if f.annotation in (float, int, bool)]
            raise TypeError(
                f"{who}: kernel takes {name!r}, which is no field of the class that holds a number; "
                f"{'those are ' + ', '.join(fields) if fields else 'it has none'}. Add `{name}: float = ...`, or name "
                f"the parameter like a field"
            )
    return numbers


def _defined_in(cls: type[Any], name: str) -> type[Any]:
    """The class from which `cls` inherits this attribute."""
    return next(c for c in cls.__mro__ if name in c.__dict__)
