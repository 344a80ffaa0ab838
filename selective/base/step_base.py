"""Calls of a base's own step that fire each hook exactly once.

torch patches the `step` of each class, so that it fires the optimizer's own hooks and the global ones. The global hooks
fire around the wrapper's whole step, and the base must not fire them a second time. The base's own hooks fire around
its part of the step, even if our kernels compute that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.optim.optimizer as torch_optimizer
from torch.optim import Optimizer


@contextmanager
def base_hooks(base: Optimizer) -> Iterator[None]:
    """Fire the hooks registered on the base around its part of a step, and tell its scheduler that it stepped."""
    if base._optimizer_step_pre_hooks:
        for hook in list(base._optimizer_step_pre_hooks.values()):
            hook(base, (), {})
    yield
    if base._optimizer_step_post_hooks:
        for hook in list(base._optimizer_step_post_hooks.values()):
            hook(base, (), {})
    if hasattr(vars(base).get("step"), "_wrapped_by_lr_sched"):
        vars(base)["_opt_called"] = True


def replaced_step(base: Optimizer) -> Callable[[], Any] | None:
    """Return the `step` that a user has set on the instance; None if there is none, or only a scheduler's counter."""
    step = vars(base).get("step")
    return None if hasattr(step, "_wrapped_by_lr_sched") else step


def run_step(base: Optimizer) -> None:
    """Run the base's step without any hooks, not even its own."""
    step = type(base).step
    replaced = replaced_step(base)
    if replaced is not None:
        with _no_hooks(base):
            replaced()
        return
    patched = [c for c in type(base).__mro__ if getattr(vars(c).get("step"), "hooked", False)]
    if len(patched) == 1 and hasattr(step, "__wrapped__"):
        step.__wrapped__(base)
        return
    with _no_hooks(base):  # the class is not patched, or its step calls a parent's and both are patched
        step(base)


def call_step(base: Optimizer) -> None:
    """Run `base.step()` with the base's own step hooks, without torch's global ones."""
    with base_hooks(base):
        run_step(base)


def run_step_on(base: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Run the base's step, without hooks, on some of its groups."""
    all_groups = base.param_groups
    if len(groups) < len(all_groups):
        base.param_groups = groups
    try:
        run_step(base)
    finally:
        base.param_groups = all_groups


@contextmanager
def _no_hooks(base: Optimizer) -> Iterator[None]:
    tables: list[Any] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
        base._optimizer_step_pre_hooks,
        base._optimizer_step_post_hooks,
    ]
    saved_hooks = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, saved_hooks, strict=True):
            table.update(hooks)
