"""Messages about the arguments of `SelectiveUpdate`: a base that is no optimizer, and arguments that do not exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

from torch.optim import Optimizer

F = TypeVar("F", bound=Callable[..., None])


class _NotGiven:
    """The type of `NOT_GIVEN`, which prints as None: what follows is the same, except for a warning."""

    def __repr__(self) -> str:
        return "None"


NOT_GIVEN: Any = _NotGiven()
"""The default of `policy`: unlike None it was not written by the user."""


def names_unknown_arguments(init: F) -> F:
    """Make a constructor name unknown keyword arguments in plain words, with the way to pass them."""
    known = list(inspect.signature(init).parameters)[1:]

    @wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        unknown = [name for name in options if name not in known]
        if unknown:
            base = args[0] if args else options.get("base")
            message = _unknown(base, unknown, known) if isinstance(base, Optimizer) else no_optimizer(base, unknown)
            raise TypeError(message)
        init(self, *args, **options)

    return checked  # type: ignore[return-value]


def no_optimizer(base: object, unknown: Sequence[str] = ()) -> str:
    """The message about a base that is no optimizer: parameters, a model, a class, a name."""
    of_base = ", ".join(f"{name}=..." for name in unknown) or "lr=..."
    what = f"the class {base.__name__}" if isinstance(base, type) else f"a {type(base).__name__}"
    return (
        f"SelectiveUpdate: base is {what}, must be a torch.optim.Optimizer; build it first: "
        f"SelectiveUpdate(torch.optim.AdamW(model.parameters(), {of_base}), policy=...). A whole model at once: "
        f"SelectiveUpdate.for_model(model, 'adamw', lr=..., policy=...). Where a class is wanted (Trainer's "
        f"optimizer_cls_and_kwargs): SelectiveUpdate.bind(torch.optim.AdamW, policy=...)"
    )


def _unknown(base: Optimizer, unknown: Sequence[str], known: Sequence[str]) -> str:
    near = [] if unknown[0] in base.defaults else get_close_matches(unknown[0], known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Arguments of the base go to the base, before it is wrapped."
    return f"SelectiveUpdate: there is no argument {unknown[0]!r}. {hint} There are {', '.join(known)}"


def nothing_to_do(base: Optimizer) -> str:
    """The warning about an optimizer without policy, preconditioner and selective decay."""
    name = type(base).__name__
    return (
        f"SelectiveUpdate: neither a policy nor a preconditioner is given, so that every step is {name}'s own. Pass "
        f"policy='MGUP' or preconditioner='Soap', for instance; policy=None if this is what you want"
    )
