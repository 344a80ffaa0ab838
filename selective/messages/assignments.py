"""Attributes that an assignment would create without any effect, and that say how the same thing is done."""

from __future__ import annotations

from typing import Any, NoReturn


class NotAssignable:
    """An attribute that can't be assigned, and is not there to be read. `way` completes the message."""

    def __init__(self, way: str) -> None:
        self._way = way
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self._name!r}; {self._way}")

    def __set__(self, instance: object, value: object) -> NoReturn:
        raise AttributeError(f"{type(instance).__name__}: opt.{self._name} can't be assigned; {self._way}")


def in_the_groups(attribute: str) -> NotAssignable:
    """An argument of the constructor that belongs to each group, under `attribute`."""
    return NotAssignable(f"each parameter group has its own: opt.{attribute}")


def in_the_members() -> NotAssignable:
    """An argument of a wrapped optimizer that a chain of several does not have itself."""
    return NotAssignable("each member has its own, given when the member is made")


def at_construction() -> NotAssignable:
    """An argument of the constructor that stays as it was given."""
    return NotAssignable("it is given at construction: build a new optimizer, and load this one's state_dict() into it")


SET_POLICY = (
    "SelectiveUpdate: opt.policy can't be assigned, because each parameter group has its own policy: set "
    "opt.policy_groups[i].policy"
)
