"""A function of a view as a policy, so that a mask can be tried out without a class.

Note [functions in checkpoints]: a function is no data. A checkpoint has its name, as the policy's kind, and goes on
with the function of that name that the optimizer was built with. Another name is another policy, which a load refuses.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from selective.messages.families import FUNCTION
from selective.policies.view import TENSORS, StepView

if TYPE_CHECKING:
    from selective.policies.policy import Policy

Mask = Callable[[StepView], Any]


class OfFunction:
    """The part of such a policy that calls the function."""

    function: ClassVar[Mask]
    rebuild: ClassVar[Callable[[Mask], Any]]  # a function of a module: pickles name it
    _replaces: ClassVar[bool] = True  # another function of the same name is registered in its place

    def mask(self, view: StepView) -> Tensor:
        """The function's result."""
        return type(self).function(view)

    def __repr__(self) -> str:
        return type(self).__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OfFunction) and type(other).function is type(self).function

    def __hash__(self) -> int:
        return hash(type(self).function)

    def __reduce__(self) -> Any:
        return type(self).rebuild, (type(self).function,)

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def policy_of_function(function: Mask, head: type[Policy], rebuild: Callable[[Mask], Policy]) -> Policy:
    """Make a policy whose mask is `function(view)`. `head` is `Policy`, and `rebuild` is this function without `head`.

    The tensors that it reads are those that the function's code names as attributes (`view.momentum`), and always the
    update and the gradient.

    Raises:
        TypeError: the function can't be called with a view alone.
    """
    plain = _plain(function)
    name = getattr(plain, "__name__", type(plain).__name__)
    _check_arguments(function, name)
    body = {
        "__module__": getattr(plain, "__module__", None) or __name__,
        "__qualname__": name,
        "__doc__": f"The function {name} as a policy.",
        "__annotations__": dict.fromkeys(("kind", "function", "rebuild", "reads"), ClassVar[Any]),
        "kind": FUNCTION + name,
        "function": staticmethod(function),
        "rebuild": staticmethod(rebuild),
        "reads": frozenset({"update", "grad", *_attributes_in(plain)}) & frozenset(TENSORS),
    }
    made: type[Policy] = type(head)(name, (OfFunction, head), body)  # type: ignore[assignment]
    return made()


def with_live_function(saved: Policy, live: Policy) -> Policy:
    """A policy from a checkpoint; `live` where both are of functions with one name: Note [functions in checkpoints]."""
    return live if isinstance(live, OfFunction) and live.kind == saved.kind else saved


def _plain(function: Any) -> Any:
    """The function inside of a partial, a bound method or a decorator."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function


def _check_arguments(function: Mask, name: str) -> None:
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"policy: {name}{signature} can't be called with a view alone; write `def {name}(view)`, which returns a "
            f"mask, or a subclass of Policy with `mask(self, view)`"
        ) from None
    except ValueError:  # a function in C, whose signature is not known
        return


def _attributes_in(function: Any) -> Iterator[str]:
    """The names of attributes that the code of a function reads, in functions inside of it, too."""
    codes = [getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)]
    for code in codes:
        if isinstance(code, CodeType):
            steps = dis.get_instructions(code)
            yield from (str(step.argval) for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD"))
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
