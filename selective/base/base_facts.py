"""The facts about a base, from the table of known classes or from a measurement that is remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import COUNTERS, clone_with_stand_ins
from selective.base.decay import decay_factor
from selective.base.facts import BaseFacts
from selective.base.known import lookup
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
    """Return the facts about `base` for the parameters of `group`: from the table of known classes, else measured.

    With `measure=True` the table is skipped. A measurement steps a clone of the base about 100 times. The clone has one
    stand-in of 4,096 elements for each number of dimensions in the group. The result is remembered for the class and
    for all options but `lr` and `weight_decay`. A measurement changes neither the base's parameters, state and groups
    nor the random generators, and it fires no hooks. It does not raise for a base that cannot be wrapped: the reason is
    in `refusal`.
    """
    if not measure:
        known = lookup(base, group)
        if known is not None:
            return known
    return _remembered(_cache, _measure, base, group)


def measured_moments(base: Optimizer, group: Mapping[str, Any]) -> Moments:
    """Return the kinds of the base's state entries as measured on a clone; remembered like the facts."""
    return _remembered(_moments_cache, measure_moments, base, group)


def _remembered(
    cache: dict[tuple, T],
    measure: Callable[[Optimizer, Mapping[str, Any]], T],
    base: Optimizer,
    group: Mapping[str, Any],
) -> T:
    """Return `measure(base, group)`, computed once for each kind of group."""
    key = _key(base, group)
    if key is None:
        return measure(base, group)
    if key not in cache:
        cache[key] = measure(base, group)
    return cache[key]


def read_momentum(base: Optimizer, param: Tensor, facts: BaseFacts) -> Tensor | None:
    """Return the base's first moment of `param`, shaped like `param`, in float32 (a float64 moment stays float64).

    None if the base has not stepped yet or keeps no first moment. A plain float32 or float64 moment is not copied.
    """
    return momentum_entry(base, param, facts)[0]


def momentum_entry(base: Optimizer, param: Tensor, facts: BaseFacts) -> tuple[Tensor | None, bool]:
    """Return the result of `read_momentum`, and True if it shares the base's own memory."""
    if facts.momentum_key is None:
        return None, False
    entries = base.state.get(param, {})
    stored = entries.get(facts.momentum_key)
    if stored is None:  # it may be nested
        stored = next((v for k, v in state_entries(entries) if k == facts.momentum_key), None)
    if stored is None:
        return None, False
    plain = dequantized(stored) if facts.momentum_reader == "dequantize" else stored
    wide = plain if plain.dtype == torch.float64 else plain.float()
    shaped = wide if wide.shape == param.shape else wide.reshape(param.shape)
    return shaped, plain is stored and wide.dtype == stored.dtype


_NOT_IN_KEY = frozenset(
    ("params", "param_names", "name", "lr", "initial_lr", "max_lr", "min_lr", "weight_decay", *COUNTERS)
)


def _key(base: Optimizer, group: Mapping[str, Any]) -> tuple | None:
    """Return everything that facts may depend on, as a key of the caches.

    Counters, and options that schedulers change, are left out. None if an attribute or an option is a function (a rule
    that was passed to the constructor): nothing tells whether two functions do the same.
    """
    settings = [v for k, v in vars(base).items() if k != "step"] + list(group.values())
    if any(callable(v) and not isinstance(v, (type, Tensor)) for v in settings):
        return None
    params = initialized(group["params"])
    options = sorted((k, _plain(v)) for k, v in group.items() if k not in _NOT_IN_KEY)
    attributes = sorted(
        (k, _plain(v)) for k, v in vars(base).items() if isinstance(v, (bool, int, float, str, type(None)))
    )
    layouts = sorted({(p.ndim, str(p.dtype), p.device.type) for p in params})
    has_options = ("weight_decay" in group, group.get("lr") is None)
    return type(base), tuple(options), tuple(attributes), tuple(layouts), has_options


def _plain(value: Any) -> str:
    if isinstance(value, Tensor):  # without its values: reading them would wait for a GPU
        return f"tensor {value.dtype} {tuple(value.shape)}"
    return repr(value)
