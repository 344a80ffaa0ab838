"""Settings by kind of parameter: one value, or a mapping from kinds to values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

from torch import Tensor

from selective.messages.short import short
from selective.param_groups.joined_weights import JOINED_VIEWS

VIEWS = (*JOINED_VIEWS, "conv", "experts")  # kinds with the name of their `matrix_view`
MATRICES = ("matrices", *VIEWS)
KINDS = (*MATRICES, "embeddings", "head", "routers", "vectors")
REST = "rest"
NO_DECAY = ("vectors",)  # unless the user says otherwise, as in nanoGPT and transformers, where embeddings decay


MISSING: Any = object()
"""The value of a kind that a mapping does not name."""


def checked_number(caller: str, setting: str, value: Any) -> Any:
    """The value, which is a number of at least 0 or a tensor, such as a learning rate. Raises ValueError."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor) or (is_number and 0 <= float(value) < math.inf):
        return value
    hint = "; no_decay names the kinds that do not decay" if setting == "weight_decay" else ""
    raise ValueError(f"{caller}: {setting} is {short(value)}, must be a number of at least 0{hint}")


def for_each_kind(
    caller: str, setting: str, value: Any, *, of_matrices: bool, read: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """The value of each kind in `KINDS`. {} if `value` is None: then groups don't have this setting.

    In a mapping, a kind's own name comes first. "matrices" stands for all kinds of matrices that are not named, and
    "rest" for everything else that is not.

    Args:
        caller, setting: for messages: the function, and the name of its argument.
        value: what was given: a value, or a mapping from kinds to values. One with a "kind" is a value.
        of_matrices: a single value is for matrices, and other kinds get None. Otherwise it is for all kinds.
        read: makes a policy or a preconditioner of what was written.

    Raises:
        ValueError: a kind that does not exist.
    """
    read = read or (lambda given: given)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or "kind" in value:
        single = read(value)
        return {kind: single if kind in MATRICES or not of_matrices else None for kind in KINDS}
    for name in value:
        if name not in (*KINDS, REST):
            near = get_close_matches(str(name), [*KINDS, REST], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{caller}: {setting} has {name!r}{hint}; the kinds are {', '.join((*KINDS, REST))}")
    given = {name: read(each) if each is not None else None for name, each in value.items()}
    default = given.get(REST, None if of_matrices else MISSING)
    of_matrix = given.get("matrices", default)
    return {kind: given.get(kind, of_matrix if kind in MATRICES else default) for kind in KINDS}
