"""Helpers that the checks share: they build, train and compare wrappers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective.base.generators import generators_restored
from selective.testing.model import ConformanceModel
from selective.testing.subject import Subject

Bits = dict[str, Tensor]


class CheckFailed(AssertionError):
    """Raised if a wrapper does not do what a check asks for. The message says what it did, and why that matters."""


class NotApplicable(Exception):
    """Raised if a check does not apply to this subject. The message says why."""


class Skipped(Exception):
    """Raised if a check applies, but can't be run here. The message says why."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


@contextmanager
def isolated() -> Iterator[None]:
    """Run with one thread, and restore every global generator afterwards, because trainers seed them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with generators_restored():
            yield
    finally:
        torch.set_num_threads(threads)


def build(
    subject: Subject, *, dtype: torch.dtype = torch.float32, late: bool = True, seed: int = 0
) -> tuple[ConformanceModel, Optimizer]:
    """A fresh model and wrapper. Seeds the global generator, so that only the checks of row 30 notice its users."""
    model = ConformanceModel(subject.model, dtype=dtype, late=late, seed=seed)
    torch.manual_seed(0)
    return model, subject.build(list(model.parameters()))


def build_over(subject: Subject, base: Callable[[Any], Optimizer], **model: Any) -> tuple[ConformanceModel, Optimizer]:
    """The subject's wrapper over another base than its own."""
    if subject.wrap is None:
        raise NotApplicable("needs `Subject.wrap`, to wrap a base that misbehaves in a known way")
    net = ConformanceModel(subject.model, **model)
    torch.manual_seed(0)
    return net, subject.wrap(base(list(net.parameters())))


def base_of(subject: Subject, wrapper: Optimizer) -> Optimizer:
    if subject.get_base is None:
        raise NotApplicable(
            "there is no way to its base: no attribute of the wrapper holds the one that it was given (`get_base`)"
        )
    return subject.get_base(wrapper)


def train(model: ConformanceModel, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """The usual training loop, over the batches `steps`."""
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def step_alike(*optimizers: Optimizer) -> None:
    """Step each with the global generator in the same state. The checks of row 30 find wrappers that draw from it."""
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for optimizer in optimizers:
            torch.set_rng_state(state)
            optimizer.step()


def values(model: nn.Module) -> Bits:
    """A copy of every parameter, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trajectory(model: ConformanceModel, optimizer: Optimizer, steps: Iterable[int]) -> list[Bits]:
    """The parameters after each step."""
    points = []
    for step in steps:
        train(model, optimizer, [step])
        points.append(values(model))
    return points


def through_a_file(state: Any) -> Any:
    """Save and load `state` as a checkpoint is, without running code from the file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@dataclass(frozen=True)
class CopiedParts:
    """A copy of a tensor subclass (8-bit states) as the tensors inside of it, because few subclasses have `clone`."""

    kind: type
    parts: dict[str, Any]


def keep(value: Any) -> Any:
    """A copy that later steps do not change."""
    if not isinstance(value, Tensor):
        return value
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()  # type: ignore[operator]
        return CopiedParts(type(value), {name: getattr(value, name).clone() for name in names})
    return value.detach().clone()


def _differs(found: Any, expected: Any) -> str | None:
    """The difference between two plain values, in words; None if there is none."""
    if isinstance(expected, Tensor) != isinstance(found, Tensor):
        return f"is a {type(found).__name__}, was a {type(expected).__name__}"
    if not isinstance(expected, Tensor):
        return None if found == expected else f"is {found!r}, was {expected!r}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"is {found.dtype} {tuple(found.shape)}, was {expected.dtype} {tuple(expected.shape)}"
    unequal = ~((found == expected) | (torch.isnan(found) & torch.isnan(expected)))  # NaN equals NaN here
    if not unequal.any():
        return None
    worst = (found.double() - expected.double()).abs().max().item()
    return f"differs in {int(unequal.sum())} of {found.numel()} elements, by up to {worst:.3g}"


def difference(found: Any, expected: Any) -> str | None:
    """The difference between two values, which may be tensor subclasses, in words; None if there is none."""
    found, expected = keep(found), keep(expected)
    if not isinstance(expected, CopiedParts):
        return _differs(found, expected)
    if not isinstance(found, CopiedParts) or found.kind is not expected.kind:
        return f"is a {type(found).__name__}, was a {expected.kind.__name__}"
    for name, value in expected.parts.items():
        text = _differs(found.parts[name], value)
        if text is not None:
            return f"({name}) {text}"
    return None


def require_same_values(found: Bits, expected: Bits, context: str) -> None:
    """Require the same bits. The message names the first parameter that differs."""
    for name, value in expected.items():
        text = _differs(found[name], value)
        require(text is None, f"{context}: parameter {name!r} {text}.")


def require_same_path(found: list[Bits], expected: list[Bits], context: str) -> None:
    """Require the same bits after every step. The message names the first step that differs."""
    require(len(found) == len(expected), f"{context}: {len(found)} steps, expected {len(expected)}.")
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        require_same_values(ours, theirs, f"{context}, step {index + 1} after the fork")


Entries = dict[Any, dict[Any, Any]]


def entries_in(saved: Any) -> Entries:
    """The entries of each parameter in a `state_dict`.

    Of a dict that does not have torch's form, which row 7 checks, it returns every number and tensor by its path.
    """
    if "state" in saved:
        return saved["state"]
    by_path: dict[Any, Any] = {}

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        if isinstance(value, (dict, list)):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, (*path, key))
        else:
            by_path[path] = value

    walk(saved, ())
    return {"any": by_path}


def entries(optimizer: Optimizer) -> Entries:
    """A copy of the entries of each parameter in `state_dict()`."""
    return {i: {k: keep(v) for k, v in entry.items()} for i, entry in entries_in(optimizer.state_dict()).items()}


def require_same_entries(found: Entries, expected: Entries, context: str) -> None:
    """Require every entry of `expected` in `found`, bit for bit. `found` may have further entries."""
    for index, entry in expected.items():
        for key, value in entry.items():
            require(key in found.get(index, {}), f"{context}: state entry {key!r} of parameter {index} is missing.")
            text = difference(found[index][key], value)
            require(text is None, f"{context}: state entry {key!r} of parameter {index} {text}.")


def own_entries(subject: Subject, wrapper: Optimizer) -> Entries:
    """The entries of the wrapper's state that are not in its base's."""
    if "state" not in wrapper.state_dict():
        raise NotApplicable("its state_dict is not of torch's form (row 7): its own part can't be told from the base's")
    theirs = entries(base_of(subject, wrapper))
    return {i: {k: v for k, v in e.items() if k not in theirs.get(i, {})} for i, e in entries(wrapper).items()}


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the rate of all groups; in place if it is a tensor, because some base optimizers refuse a number then."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
