"""Puts an optimizer, its parameters and their gradients back as they were, bit for bit and in place.

Tensors and containers stay the same objects, so that whoever holds one (a scheduler, a model) still has the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective import ChainedOptimizer, SelectiveUpdate
from selective.base.lent_gradients import set_gradient
from selective.doctor.subject import has_values

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


@contextmanager
def restored(optimizer: Optimizer) -> Iterator[None]:
    """Put everything back at the end: parameters, gradients, groups, state, attributes of the optimizer, step counts.

    This takes a copy of the parameters, and of the state that there is. What an optimizer keeps in objects of its own
    classes, beside tensors, dictionaries, lists, sets and generators, stays as the steps have left it.
    """
    before = _Before()
    before.keep_optimizer(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [(p, p.grad) for p in params if has_values(p)]
    try:
        yield
    finally:
        with torch.no_grad():
            before.put_back()
        for p, gradient in gradients:
            set_gradient(p, gradient)


class _Before:
    """The contents of containers and tensors, by the order in which they are put back."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}  # by `id`, so that nothing is kept twice; no `id` is used again meanwhile
        self._undo: list[Callable[[], None]] = []

    def put_back(self) -> None:
        """Put all contents back. If one can't be, the others are, and then its error is raised."""
        errors: list[Exception] = []
        for undo in self._undo:
            try:
                undo()
            except Exception as error:  # a tensor of a class that can't be copied to
                errors.append(error)
        if errors:
            raise errors[0]

    def keep_optimizer(self, optimizer: Optimizer) -> None:
        """Keep what an optimizer has, and what is inside of it."""
        self._keep(vars(optimizer))
        if isinstance(optimizer, ChainedOptimizer):
            for member in optimizer.members:
                self._keep(member)
        elif isinstance(optimizer, SelectiveUpdate):
            self._keep_wrapper(optimizer)

    def _keep_wrapper(self, optimizer: SelectiveUpdate) -> None:
        self._keep(optimizer.base)  # before the groups, whose plans follow it
        self._keep(optimizer.store.table)
        runner, count, store = optimizer.runner, optimizer.count, optimizer.store
        report, skipped = runner.report, count.skipped
        # The table is put back first: another one may have taken its place. Then its copy is noticed as a new one.
        self._undo += [count.snapshot(), optimizer.groups.snapshot(), store.snapshot(), store.mark_replaced]

        def undo() -> None:
            runner.report, count.skipped = report, skipped

        self._undo.append(undo)

    def _keep(self, value: Any) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._kept:
            return
        self._kept[id(value)] = value
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(partial(_set_state, value, state))
        elif isinstance(value, Optimizer):
            self.keep_optimizer(value)
        elif isinstance(value, (dict, list, set)):
            self._keep_container(value)
        elif isinstance(value, tuple):
            for each in value:
                self._keep(each)

    def _keep_container(self, value: dict[Any, Any] | list[Any] | set[Any]) -> None:
        contents = dict(value) if isinstance(value, dict) else list(value)

        def undo() -> None:
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)

        self._undo.append(undo)
        for each in contents.values() if isinstance(contents, dict) else contents:
            self._keep(each)
        if hasattr(value, "__dict__"):  # a subclass with attributes
            self._keep(vars(value))

    def _keep_tensor(self, value: Tensor) -> None:
        if not has_values(value) or _repeats_itself(value):
            return
        if type(value) not in (Tensor, torch.nn.Parameter):  # of a subclass there may be no pointer to its memory
            whole = value.detach().clone()
            self._undo.append(partial(_copy, value, whole))
            return
        own = value.data  # a second tensor over the same memory
        contents = own.clone()

        def undo() -> None:
            if value.data_ptr() != own.data_ptr() or value.shape != own.shape or value.dtype != own.dtype:
                value.data = own
            own.copy_(contents)

        self._undo.append(undo)


def _repeats_itself(value: Tensor) -> bool:
    """True if several elements share memory: no step can write to such a tensor."""
    return value.layout == torch.strided and value.numel() > 1 and 0 in value.stride()


def _copy(value: Tensor, contents: Tensor) -> None:
    value.copy_(contents)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)
