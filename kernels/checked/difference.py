"""The error that a kernel's wrong result raises, and the file with all that went into the step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec import Item, StepSpec


@dataclass
class Place:
    """The element of an entry that is furthest from what is right."""

    entry: str
    index: tuple[int, ...]
    value: float
    expected: float  # the reference's
    allowed: tuple[float, float]  # the smallest and the largest right value
    differing: int  # the number of elements that are not right
    numel: int

    def __str__(self) -> str:
        low, high = self.allowed
        return (
            f"{self.entry!r} is not what the reference computes, at {self.differing} of {self.numel} elements. The "
            f"largest difference is {abs(self.value - self.expected):.3g}, at {list(self.index)}: {self.value!r} "
            f"instead of {self.expected!r}, and rounding explains {low!r} to {high!r}"
        )


class KernelDifference(RuntimeError):
    """Raised by a checked step (`SELECTIVE_CHECK=1`) if a kernel's result is not the reference's.

    `before` has the tensors of the step as they were, `after` as the kernel left them, and `expected` the reference's.
    The same is in the file `path`, for `torch.load(path)`. The parameter, and others of this step, have moved.
    """

    def __init__(self, place: Place, before: Item, spec: StepSpec, path: str, content: dict[str, Any]) -> None:
        self.place, self.spec, self.path, self.address, self.step = place, spec, path, before.address, spec.draw.step
        self.before, self.after, self.expected = content["before"], content["after"], content["expected"]
        self.name: str | None = None  # of the parameter; the optimizer sets it
        super().__init__(place, before, spec, path, content)  # all of it, so that copies and pickles can be made

    def __str__(self) -> str:
        rule, selection, strength = self.spec.rule, self.spec.selection, self.spec.strength
        param = self.before["param"]
        which = f"number {self.address}" if self.name is None else repr(self.name)
        return (
            f"step {self.step}, parameter {which} ({param.dtype}, {tuple(param.shape)}, {param.device}): {self.place}. "
            f"The step was {type(rule).__name__}, selection {selection.kind!r}, strength {strength.kind!r}. This is a "
            f"fault of a kernel: please report it, with the file {self.path}"
        )


def difference(
    place: Place, before: Item, after: Item, expected: dict[str, Tensor], spec: StepSpec, folder: str
) -> KernelDifference:
    """Write the file, and return the error to raise."""
    content = {
        "place": str(place), "address": before.address, "spec": repr(spec), "torch": str(torch.__version__),
        "before": _tensors(before), "after": _tensors(after), "expected": expected,
    }  # fmt: skip
    path = os.path.abspath(os.path.join(folder, f"selective-check-{os.getpid()}-step-{spec.draw.step}.pt"))
    try:
        os.makedirs(folder, exist_ok=True)
        torch.save({key: _on_host(value) for key, value in content.items()}, path)
    except (OSError, RuntimeError) as error:  # the difference is the news, also where nothing can be written
        path = f"that could not be written ({error})"
    return KernelDifference(place, before, spec, path, content)


def _tensors(item: Item) -> dict[str, Tensor]:
    """All tensors of an item by name, the gradient as "grad"; of its state only tensors."""
    named = {**item.state, **item.policy_state, "param": item.param, "grad": item.grad}
    return {name: x.detach().clone() for name, x in named.items() if isinstance(x, Tensor)}


def _on_host(value: Any) -> Any:
    return {name: x.cpu() for name, x in value.items()} if isinstance(value, dict) else value
