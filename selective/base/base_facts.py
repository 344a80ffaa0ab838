"""Finding out about an optimizer by stepping a tiny twin of it with stand-in parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import COUNTERS, clone_with_stand_ins
from selective.base.decay import decay_factor
from selective.base.facts import BaseFacts
from selective.base.measure import measure as _measure
from selective.base.measure_moments import Moments, measure_moments
from selective.base.state_entries import dequantized, state_entries
from selective.base.step_base import call_step
from selective.parameter import initialized

__all__ = [
    "BaseFacts",
    "base_facts",
    "call_step",
    "clone_with_stand_ins",
    "decay_factor",
    "measured_moments",
    "momentum_entry",
    "read_momentum",
]

T = TypeVar("T")
_cache: dict[tuple, BaseFacts] = {}
_moments_cache: dict[tuple, Moments] = {}


def base_facts(base: Optimizer, group: Mapping[str, Any], *, measure: bool = False) -> BaseFacts:
    """What `base` does with the parameters of `group`: from the table of known classes, else measured.

    `measure=True` skips the table. A measurement steps a twin of the base some 100 times on 4,096 elements for each
    number of dimensions in the group; it is remembered for the class and the options that are not `lr` or
    `weight_decay`. The base's parameters, state and groups, the random generators, and everybody's hooks are as
    before. The answer never raises: a base that cannot be wrapped says so in `refusal`.
    """
    if not measure:
        from selective.base.known import lookup

        known = lookup(base, group)
        if known is not None:
            return known
    return _remembered(_cache, _measure, base, group)


def measured_moments(base: Optimizer, group: Mapping[str, Any]) -> Moments:
    """The kinds of the base's state entries, as measured on a twin; remembered like the facts."""
    return _remembered(_moments_cache, measure_moments, base, group)


def _remembered(
    cache: dict[tuple, T],
    measured: Callable[[Optimizer, Mapping[str, Any]], T],
    base: Optimizer,
    group: Mapping[str, Any],
) -> T:
    """A measurement, made once for each kind of group."""
    key = _key(base, group)
    if key is None:
        return measured(base, group)
    if key not in cache:
        cache[key] = measured(base, group)
    return cache[key]


def read_momentum(base: Optimizer, param: Tensor, facts: BaseFacts) -> Tensor | None:
    """The base's first moment of `param` as a float32 tensor (float64 stays), shaped like it; None before its first
    step and where the base has none. Plain float32 moments are returned as they are, not copied."""
    return momentum_entry(base, param, facts)[0]


def momentum_entry(base: Optimizer, param: Tensor, facts: BaseFacts) -> tuple[Tensor | None, bool]:
    """What `read_momentum` returns, and whether it is the base's own memory."""
    if facts.momentum_key is None:
        return None, False
    found = next((v for k, v in state_entries(base.state.get(param, {})) if k == facts.momentum_key), None)
    if found is None:
        return None, False
    plain = dequantized(found) if facts.momentum_reader == "dequantize" else found
    wide = plain if plain.dtype == torch.float64 else plain.float()
    return wide.reshape(param.shape), plain is found and wide.dtype == found.dtype


_NOT_KIND = frozenset(("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "weight_decay", *COUNTERS))


def _key(base: Optimizer, group: Mapping[str, Any]) -> tuple | None:
    """What facts may depend on. Options that are moved by schedulers, and counters, are not among it.

    None where a function is among it (a rule handed to the constructor): two of those are never known to be the same.
    """
    handed = [v for k, v in vars(base).items() if k != "step"] + list(group.values())
    if any(callable(v) and not isinstance(v, (type, Tensor)) for v in handed):
        return None
    params = initialized(group["params"])
    options = sorted((k, _plain(v)) for k, v in group.items() if k not in _NOT_KIND)
    own = sorted((k, _plain(v)) for k, v in vars(base).items() if isinstance(v, (bool, int, float, str, type(None))))
    kinds = sorted({(p.ndim, str(p.dtype), p.device.type) for p in params})
    none = ("weight_decay" in group, group.get("lr") is None)
    return type(base), tuple(options), tuple(own), tuple(kinds), none


def _plain(value: Any) -> str:
    if isinstance(value, Tensor):  # not its content: on a GPU that would wait for it
        return f"tensor {value.dtype} {tuple(value.shape)}"
    return repr(value)
