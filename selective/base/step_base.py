"""Running a base's own step, with each hook fired as often as it should be.

torch wraps `step` once a class to fire hooks around it, the optimizer's own and the global ones. The global ones fire
around the whole of the wrapper's step, so the base must not fire them a second time; the base's own fire around its
part, also where that runs in our kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.optim.optimizer as torch_optimizer
from torch.optim import Optimizer


@contextmanager
def base_hooks(base: Optimizer) -> Iterator[None]:
    """Fire the hooks registered on the base around its part of a step, however that part is computed.

    A scheduler that was built on the base learns that a step was taken.
    """
    for hook in list(base._optimizer_step_pre_hooks.values()):
        hook(base, (), {})
    yield
    for hook in list(base._optimizer_step_post_hooks.values()):
        hook(base, (), {})
    if hasattr(vars(base).get("step"), "_wrapped_by_lr_sched"):
        vars(base)["_opt_called"] = True


def replaced_step(base: Optimizer) -> Callable[[], Any] | None:
    """Somebody's own step on the instance, which is to run instead of the class's; a scheduler's counter is none."""
    replaced = vars(base).get("step")
    return None if hasattr(replaced, "_wrapped_by_lr_sched") else replaced


def run_step(base: Optimizer) -> None:
    """The base's step without any hooks, its own included."""
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
    with _no_hooks(base):  # not patched, or a step that calls its parent's: torch has patched both
        step(base)


def call_step(base: Optimizer) -> None:
    """`base.step()` with the base's own step hooks, without torch's global ones."""
    with base_hooks(base):
        run_step(base)


def run_step_on(base: Optimizer, groups: list[dict[str, Any]]) -> None:
    """`run_step` on these of the base's groups."""
    everything = base.param_groups
    if len(groups) < len(everything):
        base.param_groups = groups
    try:
        run_step(base)
    finally:
        base.param_groups = everything


@contextmanager
def _no_hooks(base: Optimizer) -> Iterator[None]:
    tables: list[Any] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
        base._optimizer_step_pre_hooks,
        base._optimizer_step_post_hooks,
    ]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
