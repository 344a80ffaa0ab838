"""A clone of an optimizer on tensors that stand in for its parameters, and a context that hides its steps."""

from __future__ import annotations

import copy
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.generators import generators_restored
from selective.base.process_settings import settings_of_torch

# Step counters that some packages keep in the group. They are 0 in a clone, whose state is empty.
COUNTERS = ("step", "k")
_SHARED = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, types.ModuleType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


class CannotClone(Exception):
    """Raised if the clone would share something with the base that a step may change. The message ends a sentence."""


class StepFailed(Exception):
    """Raised if the base's own step raises; its error is the `__cause__`."""


def clone_with_stand_ins(
    base: Optimizer,
    stand_ins: Sequence[Sequence[Tensor]],
    overrides: Mapping[str, Any] | None = None,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> Optimizer:
    """Return a clone of `base` without state and hooks, whose parameters are `stand_ins`, one list for each group.

    The options are those of `groups`, by default of `base.param_groups`. `overrides` replaces options that the groups
    have. An option that is a tensor stays one of the same dtype and device, and None stays None. The constructor is not
    called: passing `defaults` to it fails already for AdamW. Everything that a step could change is copied.

    Raises:
        CannotClone: the base holds another optimizer, a model, or an object that cannot be copied.
    """
    groups = base.param_groups if groups is None else groups
    clone = object.__new__(type(base))
    # A scheduler puts a `step` of its own on the instance, which is bound to the base. The clone must not get that.
    attributes = {k: v for k, v in vars(base).items() if k not in ("state", "param_groups", "step")}
    for name, value in attributes.items():
        hooks = name.endswith("_hooks") and isinstance(value, OrderedDict)
        vars(clone)[name] = OrderedDict() if hooks else _copied(value, f"its attribute '{name}'", base, clone)
    vars(clone)["state"] = defaultdict(dict)
    vars(clone)["param_groups"] = [
        _cloned_group(g, ps, base, overrides or {}) for g, ps in zip(groups, stand_ins, strict=True)
    ]
    for name, value in (overrides or {}).items():
        if name in clone.defaults:
            clone.defaults[name] = _like(clone.defaults[name], value)
    return clone


def _cloned_group(group: Mapping[str, Any], params: Sequence[Tensor], base: Optimizer, overrides: Mapping[str, Any]):
    options = {k: v for k, v in group.items() if k != "params"}
    copies = {k: _copied(v, f"'{k}' of a parameter group", base, None) for k, v in options.items()}
    for name in COUNTERS:
        if name in copies and isinstance(copies[name], (int, float, Tensor)):
            copies[name] = copies[name] * 0
    for name, value in overrides.items():
        if name in copies:
            copies[name] = _like(copies[name], value)
    return {"params": list(params), **copies}


def _like(old: Any, new: Any) -> Any:
    if old is None:
        return None
    return torch.full_like(old, new) if isinstance(old, Tensor) else new


def _copied(value: Any, where: str, base: Optimizer, clone: Optimizer | None) -> Any:
    """Return `value` for the clone: containers and tensors are copied, plain values and functions are shared."""
    if isinstance(value, _SHARED) or isinstance(value, _FUNCTIONS):
        return value
    if isinstance(value, (Optimizer, torch.nn.Module)):
        what = "another optimizer" if isinstance(value, Optimizer) else "a model"
        raise CannotClone(f"{where} holds {what} ({type(value).__name__}), which its step may move")
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return torch.Generator(device=value.device).set_state(value.get_state())
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, clone) if value.__self__ is base and clone is not None else value
    kind: Any = type(value)
    if kind in (list, tuple, set, frozenset):
        return kind(_copied(v, where, base, clone) for v in value)
    if kind in (dict, OrderedDict):
        return kind((k, _copied(v, where, base, clone)) for k, v in value.items())
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {k: _copied(v, where, base, clone) for k, v in value.items()})
    if kind.__module__.startswith("torch.distributed") or "ProcessGroup" in kind.__name__:
        return value  # meshes and process groups are shared
    try:
        return copy.deepcopy(value)
    except Exception as error:  # broad: an object of an unknown class may raise anything when it is copied
        raise CannotClone(f"{where} ({type(value).__name__}) cannot be copied: {error}") from error


@contextmanager
def unnoticed() -> Iterator[None]:
    """Hide steps of clones: restore the random generators, silence warnings, and run eagerly on one thread.

    Measurements are remembered. So they are made under torch's own settings and not under the user's
    (`settings_of_torch`).

    `torch.compile` is off because torchao compiles its step for each shape, which takes minutes on a CPU. One thread is
    used because two threads on 4,096 elements wait for each other: on a busy machine of two cores a measurement took 4
    s instead of 0.05 s.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with generators_restored(), warnings.catch_warnings(), settings_of_torch(), torch.no_grad():
            warnings.simplefilter("ignore")
            with torch.compiler.set_stance("force_eager"):
                yield
    finally:
        torch.set_num_threads(threads)
