"""A twin of an optimizer on tensors that stand in for its parameters, and a way to step it that nobody notices."""

from __future__ import annotations

import copy
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.process_settings import settings_of_torch

# Counters that some packages keep in the group; the twin starts at its first step, as its (empty) state does.
COUNTERS = ("step", "k")
_SHARED = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, types.ModuleType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


class CannotClone(Exception):
    """The twin would share something with the original that a step may change. The message ends a sentence."""


class StepFailed(Exception):
    """The base's own step raised; its error is the `__cause__`."""


def clone_with_stand_ins(
    base: Optimizer,
    stand_ins: Sequence[Sequence[Tensor]],
    overrides: Mapping[str, Any] | None = None,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> Optimizer:
    """A fresh twin of `base` (no state, no hooks) whose parameters are `stand_ins`, one list for each group.

    `groups` are the groups whose options it takes, `base.param_groups` unless given. `overrides` replaces options
    that the groups have; a tensor stays a tensor (of its own dtype and device), None stays None. Nothing is
    constructed: passing `defaults` to the constructor fails already for AdamW. Whatever a step could change is copied.

    Raises `CannotClone` where that is not possible: the base holds another optimizer or a model.
    """
    groups = base.param_groups if groups is None else groups
    twin = object.__new__(type(base))
    # A scheduler puts a `step` of its own on the instance, bound to the original: it must not come along.
    kept = {k: v for k, v in vars(base).items() if k not in ("state", "param_groups", "step")}
    for name, value in kept.items():
        hooks = name.endswith("_hooks") and isinstance(value, OrderedDict)
        vars(twin)[name] = OrderedDict() if hooks else _copied(value, f"its attribute '{name}'", base, twin)
    vars(twin)["state"] = defaultdict(dict)
    vars(twin)["param_groups"] = [
        _twin_group(g, ps, base, overrides or {}) for g, ps in zip(groups, stand_ins, strict=True)
    ]
    for name, value in (overrides or {}).items():
        if name in twin.defaults:
            twin.defaults[name] = _like(twin.defaults[name], value)
    return twin


def _twin_group(group: Mapping[str, Any], params: Sequence[Tensor], base: Optimizer, overrides: Mapping[str, Any]):
    options = {k: v for k, v in group.items() if k != "params"}
    fresh = {k: _copied(v, f"'{k}' of a parameter group", base, None) for k, v in options.items()}
    for name in COUNTERS:
        if name in fresh and isinstance(fresh[name], (int, float, Tensor)):
            fresh[name] = fresh[name] * 0
    for name, value in overrides.items():
        if name in fresh:
            fresh[name] = _like(fresh[name], value)
    return {"params": list(params), **fresh}


def _like(old: Any, new: Any) -> Any:
    if old is None:
        return None
    return torch.full_like(old, new) if isinstance(old, Tensor) else new


def _copied(value: Any, where: str, base: Optimizer, twin: Optimizer | None) -> Any:
    """`value` for the twin: containers and tensors copied, plain values and functions shared."""
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
        return types.MethodType(value.__func__, twin) if value.__self__ is base and twin is not None else value
    kind: Any = type(value)
    if kind in (list, tuple, set, frozenset):
        return kind(_copied(v, where, base, twin) for v in value)
    if kind in (dict, OrderedDict):
        return kind((k, _copied(v, where, base, twin)) for k, v in value.items())
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {k: _copied(v, where, base, twin) for k, v in value.items()})
    if kind.__module__.startswith("torch.distributed") or "ProcessGroup" in kind.__name__:
        return value  # meshes and process groups are the same for everybody
    try:
        return copy.deepcopy(value)
    except Exception as error:  # an arbitrary object: we cannot know what its copying raises
        raise CannotClone(f"{where} ({type(value).__name__}) cannot be copied: {error}") from error


@contextmanager
def unnoticed() -> Iterator[None]:
    """Random generators are put back, warnings stay here, `torch.compile` in a step does not compile, one thread works.

    What is found out here is remembered, so that it is found out under torch's own settings: `settings_of_torch`.

    torchao compiles its step for each shape: minutes on a CPU, for tensors that nobody trains. And two threads on 4,096
    elements wait for each other: on a busy machine of two cores a measurement took 4 s rather than 0.05.
    """
    threads = torch.get_num_threads()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        torch.set_num_threads(1)
        with warnings.catch_warnings(), settings_of_torch(), torch.no_grad():
            warnings.simplefilter("ignore")
            with torch.compiler.set_stance("force_eager"):
                yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def reseed(seed: int) -> None:
    """Inside `unnoticed`: every run meets the same random numbers.

    Not `torch.manual_seed`: where CUDA has not started, that leaves a seed behind for when it does.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
