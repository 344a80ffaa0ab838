"""Rows 20 and 23: costs that must not come back in every step, namely compilations and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective.testing.harness import NotApplicable, build, require, set_learning_rate, train
from selective.testing.report import conformance_checks
from selective.testing.subject import Subject

_WARM = 4  # steps that may compile: once for the first learning rate, and again for any other


@conformance_checks.register(
    20, "under a schedule, every step compiles again: minutes of waiting, then torch gives up."
)
def schedules_do_not_recompile(subject: Subject) -> None:
    """A learning rate that is another in every step compiles nothing any more after the first 4 of 20 steps."""
    compiled: list[int] = []  # the step of each compilation

    def note(graph: Any, _: Any) -> Any:
        """A backend that makes no kernels, because kernels need a C++ compiler, and time."""
        compiled.append(step)
        return graph.forward

    torch.compiler.reset()  # else torch no longer compiles functions that it has recompiled too often before
    model, wrapper = build(subject, late=False)
    with torch.compiler.set_stance("default", force_backend=note):
        for step in range(20):
            set_learning_rate(wrapper, 1e-2 * (1 - step / 20))
            train(model, wrapper, [step])
    again = sorted({step + 1 for step in compiled if step >= _WARM})
    require(not again, f"with another learning rate in each, something was compiled again in steps {again}.")


@contextmanager
def _new_objects_only() -> Iterator[None]:
    """Leave existing objects out of the garbage collector's lists, which are long in a large process.

    `unfreeze` would also bring back what the process has frozen itself. There, all objects stay frozen.
    """
    was_frozen = gc.get_freeze_count() > 0
    if was_frozen:
        gc.collect()  # what is garbage now would never be freed
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


def _living_bytes() -> int:
    """The bytes of all living tensors that were made since `_new_objects_only`. Shared memory counts once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Tensor) and candidate.layout == torch.strided and candidate.device.type == "cpu":
            try:
                storage = candidate.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            except (
                NotImplementedError,
                RuntimeError,
            ):  # a fake tensor or a subclass, without own memory
                continue
    return sum(sizes.values())


@conformance_checks.register(23, "memory fills up step by step, and the run ends hours later.")
def memory_does_not_grow(subject: Subject) -> None:
    """Between steps, as many bytes of tensors are alive after 40 steps as after 10."""
    alive = []
    with _new_objects_only():
        model, wrapper = build(subject)
        for steps in (range(10), range(10, 40)):
            train(model, wrapper, steps)
            wrapper.zero_grad()
            alive.append(_living_bytes())
    more = alive[1] - alive[0]
    require(more <= 0, f"after 40 steps, tensors of {more} bytes more are alive than after 10.")


def _kept_copies(make: Callable[[Any], Optimizer]) -> float:
    """The bytes that are alive after three steps on a matrix, in copies of the matrix."""
    with _new_objects_only():
        p = nn.Parameter(torch.ones(256, 256))
        optimizer = make([p])
        for step in range(3):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        optimizer.zero_grad()
        return _living_bytes() / (p.numel() * p.element_size())


@conformance_checks.register(23, "a model that just fits with the base is out of memory with the wrapper.")
def memory_is_as_claimed(subject: Subject) -> None:
    """Between steps, the wrapper keeps no more beside its base than `Subject.copies` copies of the parameters.

    Memory that it needs during a step is not seen here, nor buffers that a process keeps once for all optimizers.
    Without a claim, the check reports the measured number.
    """
    _kept_copies(subject.build)  # makes these buffers
    extra = _kept_copies(subject.build) - _kept_copies(subject.base)
    text = f"beside the base it keeps {extra:.2f} copies of the parameters"
    if subject.copies is None:
        raise NotApplicable(f"nothing is claimed; {text}")
    # The hundredth allows for counters, averages and coins of one number each.
    require(extra <= subject.copies + 0.01, f"{text}, and claims {subject.copies:g}.")
