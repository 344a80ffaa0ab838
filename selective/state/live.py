"""Attributes that change from step to step, kept where everybody finds them who stands in for the optimizer.

Note [stand-ins]: Lightning Fabric hands out an object of a class derived from ours and from its own, which looks up
what it does not have on the optimizer. Our properties and methods run on that object, too. An attribute that one of
them assigned would be the object's own from then on, and hide the optimizer's: the step count that was read first was
read for ever. So what is assigned after construction is kept in one dictionary, which is only ever looked up.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Live(Generic[T]):
    """One such attribute: `_steps = Live[int]()` in the class."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> T:
        if instance is None:
            return cast(T, self)  # asked of the class, by `is_live`
        try:
            return instance._live[self.name]
        except KeyError:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r} yet") from None

    def __set__(self, instance: Any, value: T) -> None:
        instance._live[self.name] = value


def is_live(cls: type, name: str) -> bool:
    """Whether instances of `cls` keep this attribute in their `_live`."""
    return isinstance(getattr(cls, name, None), Live)
