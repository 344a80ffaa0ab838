"""Casts of the base's state to the dtypes that the base itself would have given it.

Note [whose precision]: in delta capture the base steps float32 copies of bfloat16 and float16 parameters. Its state of
them is then float32, both entries shaped like the parameter and others (Adafactor's factors). Under `Dense()` and in
scratch capture the base steps the parameter itself and expects state of the dtypes that it makes for it: torch's
multi-tensor operations refuse a bfloat16 gradient beside a float32 moment. So when a group's capture changes, or its
state came from elsewhere (a checkpoint, a base that was wrapped before), every entry is cast to the dtype that the base
itself gives it. A clone shows this dtype, because some optimizers keep float32 moments of any parameter. torch does the
same when the plain base loads such a checkpoint. It happens before the next step, so that reading a state changes
nothing.

The base's buffers of rounding residue are added and removed at the same time: in delta capture the wrapper keeps its
own.
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
    base: Optimizer, group: dict[str, Any], step_dtypes: Mapping[Tensor, torch.dtype], residue: Collection[str]
) -> bool:
    """Cast the base's state of a group's parameters to the dtypes that the base makes for the tensors it steps.

    `step_dtypes` has the dtype in which the base steps each parameter, `residue` the names of the base's entries with
    rounding residue. Entries that change are replaced in the base's own dictionaries. Return True if anything changed.
    The state of a base that cannot be cloned or stepped stays as it is; if it does not fit, the base's step raises.
    """
    unfit = {p: dtype for p, dtype in step_dtypes.items() if _may_not_fit(base.state.get(p), p, dtype)}
    if not unfit:
        return False
    changed = False
    with unnoticed():
        for p, dtype in unfit.items():  # one by one, because a clone makes a second copy of the parameter's state
            wanted = first_state(base, group, p, dtype)
            if wanted is None:
                continue
            changed |= _fit(base.state[p], wanted.entries, residue)
            for name, option in wanted.options.items():  # None: the base sets it in its first step
                if name in group and group[name] is None and option is not None:
                    group[name], changed = option, True
    return changed


def _may_not_fit(state: Mapping[str, Any] | None, param: Tensor, dtype: torch.dtype) -> bool:
    """Return True if an entry has another dtype than `dtype`. Counters and other 0-d entries are ignored."""
    return any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != dtype
        and (value.dim() > 0 or param.dim() == 0)
        for _, value in state_entries(state or {})
    )


def _fit(state: MutableMapping[str, Any], wanted: Mapping[str, Any], residue: Collection[str]) -> bool:
    """Cast the entries of `state` to the dtypes of those in `wanted`, and take the `residue` entries of `wanted`.

    Return True if anything changed.
    """
    changed = False
    for key in residue:
        shapes = [getattr(entries.get(key), "shape", None) for entries in (state, wanted)]
        if shapes[0] != shapes[1]:  # without rounding the entry is missing, or is a placeholder
            state[key], changed = wanted.get(key), True
    for key, like in wanted.items():
        now = state.get(key)
        if isinstance(like, Mapping) and isinstance(now, MutableMapping):
            changed |= _fit(now, like, ())
        elif isinstance(like, Tensor) and isinstance(now, Tensor) and _is_cast(now, like):
            state[key], changed = now.to(like.dtype), True
    return changed


def _is_cast(now: Tensor, like: Tensor) -> bool:
    """Return True if `now` has to be cast to the dtype of `like`; quantised entries are never cast."""
    plain = dequantized(now) is now and dequantized(like) is like
    return plain and now.is_floating_point() and like.is_floating_point() and now.dtype != like.dtype
