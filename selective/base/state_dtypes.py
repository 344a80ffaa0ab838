"""The base's state in the precision in which the base would have made it.

Note [whose precision]: delta capture lets the base step float32 copies of bfloat16 and float16 parameters, and all that
the base then keeps of them is float32, Adafactor's factors as well as what is shaped like the parameter. Where the base
steps the parameter itself, under `Dense()` and in scratch capture, it expects what it would have made of that one:
torch's multi-tensor operations refuse a bfloat16 gradient beside a float32 moment. So when a group's capture changes,
or its state came from elsewhere (a checkpoint, a base that was wrapped before), every entry is brought to the dtype
that the base itself gives it. That is seen on a clone and not guessed, because some bases keep float32 moments of any
parameter. It is what torch does when the plain base loads such a checkpoint, and it happens before the next step and
not when somebody looks, so that reading a state changes nothing.

Buffers of rounding residue come and go with it: under delta capture the wrapper keeps its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import unnoticed
from selective.base.first_state import first_state
from selective.base.state_entries import dequantized, state_entries


def fit_states(
    base: Optimizer, group: dict[str, Any], steps: Mapping[Tensor, torch.dtype], residue: Collection[str]
) -> bool:
    """Bring the base's state of a group's parameters to the dtypes that it has for what the base steps.

    `steps` has the dtype in which the base steps each parameter, `residue` the names of entries that keep what rounding
    takes. Entries that change are replaced in the base's own dictionaries. Returns whether anything changed. A base
    that can't be tried is left as it is; its step will say so if it minds.
    """
    unfit = {p: dtype for p, dtype in steps.items() if _may_not_fit(base.state.get(p), p, dtype)}
    if not unfit:
        return False
    changed = False
    with unnoticed():
        for p, dtype in unfit.items():  # one after the other: a clone has all that the base keeps of it, once more
            wanted = first_state(base, group, p, dtype)
            if wanted is None:
                continue
            changed |= _fit(base.state[p], wanted.entries, residue)
            for name, option in wanted.options.items():  # None: the base decides when it makes its state
                if name in group and group[name] is None and option is not None:
                    group[name], changed = option, True
    return changed


def _may_not_fit(state: Mapping[str, Any] | None, param: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is an entry of another precision. Counts and other single numbers don't count."""
    return any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != dtype
        and (value.dim() > 0 or param.dim() == 0)
        for _, value in state_entries(state or {})
    )


def _fit(state: MutableMapping[str, Any], wanted: Mapping[str, Any], residue: Collection[str]) -> bool:
    """Give the entries of `state` the dtypes of those of `wanted`, and of `residue` those that `wanted` has."""
    changed = False
    for key in residue:
        shapes = [getattr(entries.get(key), "shape", None) for entries in (state, wanted)]
        if shapes[0] != shapes[1]:  # there is none, or a placeholder, where nothing is rounded
            state[key], changed = wanted.get(key), True
    for key, like in wanted.items():
        now = state.get(key)
        if isinstance(like, Mapping) and isinstance(now, MutableMapping):
            changed |= _fit(now, like, ())
        elif isinstance(like, Tensor) and isinstance(now, Tensor) and _is_cast(now, like):
            state[key], changed = now.to(like.dtype), True
    return changed


def _is_cast(now: Tensor, like: Tensor) -> bool:
    """Whether one has to be cast to the other's dtype; quantised states have a precision of their own."""
    plain = dequantized(now) is now and dequantized(like) is like
    return plain and now.is_floating_point() and like.is_floating_point() and now.dtype != like.dtype
