"""The public functions, and the one place that picks an implementation by device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from . import cpu, reference
from .reference.rules import Advanced, has_momentum
from .spec import Draw, Item, Rule, Selection, Strength, Sums

Backend = Literal["auto", "reference", "cpu"]
_standard: ContextVar[Backend] = ContextVar("standard", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """What `backend="auto"` means inside of the block (in this thread): for checks of whole optimizers."""
    token = _standard.set(backend)
    try:
        yield
    finally:
        _standard.reset(token)


def _uses_cpu(tensor: Tensor, backend: Backend) -> bool:
    """Whether `kernels/cpu` takes this tensor; `kernels/reference` takes the others."""
    backend = _standard.get() if backend == "auto" else backend
    if backend not in ("auto", "reference", "cpu"):
        raise ValueError(f"backend is {backend!r}, must be 'auto', 'reference' or 'cpu'")
    if backend == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"backend 'cpu' got a tensor on {tensor.device}; pass backend='auto'")
    return backend != "reference" and tensor.device.type == "cpu"


def _momentum_wanted(selection: Selection, strength: Strength) -> str | None:
    """What asks for a momentum, in words; None if nothing does."""
    if selection.kind == "agreement" and selection.product != "update":
        return f"agreement of the {selection.product}"
    if selection.kind == "top_k" and selection.score != "update":
        return f"top-K by the {selection.score} score"
    if strength.kind == "alignment":
        return "the alignment strength"
    if strength.kind == "norm_preserving" and strength.of == "momentum":
        return "preserving the norm of the momentum"
    return None


def _check(items: Sequence[Item], rule: Rule, selection: Selection, strength: Strength) -> None:
    """Refuse what cannot work, before anything moves."""
    wanted = _momentum_wanted(selection, strength)
    for item in items:
        if item.grad.shape != item.param.shape:
            raise ValueError(
                f"the gradient of parameter {item.address} has shape {tuple(item.grad.shape)}, "
                f"the parameter {tuple(item.param.shape)}: every element needs its own gradient"
            )
        if not item.param.is_floating_point() or not item.grad.is_floating_point():
            raise TypeError(f"parameter {item.address} is {item.param.dtype}, its gradient {item.grad.dtype}: "
                            "only real floating point tensors can be stepped")  # fmt: skip
        if wanted is None:
            continue
        previous = selection.kind == "agreement" and selection.product == "previous_momentum"
        by_strength = strength.kind == "alignment" or (strength.kind == "norm_preserving" and strength.of == "momentum")
        if previous and not by_strength and item.state.get("previous_momentum") is not None:
            continue  # a capture that kept only what is read
        if not has_momentum(item, rule):
            raise ValueError(
                f"{wanted} needs a momentum, and {type(rule).__name__} has none for parameter {item.address}: "
                "use a base with momentum, or a policy that reads the update"
            )
        if previous and hasattr(rule, "negated") and item.state.get("previous_momentum") is None:
            raise ValueError(f"{wanted} needs state['previous_momentum'] of parameter {item.address}; it was not kept")


@torch.no_grad()
def selective_step(
    items: Sequence[Item],
    *,
    rule: Rule,
    selection: Selection,
    strength: Strength,
    draw: Draw,
    statistics: bool = False,
    backend: Backend = "auto",
) -> Sequence[Sums] | None:
    """The complete step of these tensors, in place: moments, mask, decay, parameter (docs/design.md, steps 5 to 7).

    Args:
        items: one for each parameter: real floating point tensors of any shape, layout and size, empty and 0-d ones
            included. The gradient has the parameter's shape; its dtype and layout may differ. `item.state` has the
            base's own entries as `rule` names them; SGD's `momentum_buffer` is made in its first step.
        rule: how the moments move; its hyper-parameters hold for all items.
        selection, strength: which coordinates, and the two multipliers.
        draw: where random selections and samples take their numbers from.
        statistics: also return one `Sums` for each item, in order, on the item's device.
        backend: "auto" picks by device; the others are for tests.

    Raises:
        ValueError, TypeError: before anything has moved, where a gradient does not fit, or where the selection or
            the strength needs a momentum that the rule does not have.

    On a CPU, tensor hyper-parameters are read; elsewhere the host never waits for the device. Arithmetic is float32
    (float64 for float64 parameters), state and parameter are rounded once. Agrees with torch's Adam, AdamW and SGD,
    where the mask is 1, to rounding (not bit for bit: torch fuses multiply-adds that are separate here).
    """
    _check(items, rule, selection, strength)
    results: list[Sums | None] = [None] * len(items)
    for module in (cpu, reference):
        chosen = [i for i, item in enumerate(items) if _uses_cpu(item.param, backend) == (module is cpu)]
        if not chosen:
            continue
        sums = module.selective_step([items[i] for i in chosen], rule=rule, selection=selection, strength=strength,
                                     draw=draw, statistics=statistics)  # fmt: skip
        for i, s in zip(chosen, sums or [], strict=bool(sums)):
            results[i] = s
    return [s for s in results if s is not None] if statistics else None


def advance(item: Item, rule: Rule, *, keep_previous: bool = False) -> Advanced:
    """Move the moments of one tensor, in place, and return what a custom policy reads.

    Gradient (after `maximize` and coupled decay), update, momentum, and with `keep_previous` the momentum before it
    moved: whole tensors shaped like the parameter, float32 (float64 for float64 parameters), None where the rule has
    none. They may share memory with the gradient or the state: read only. The parameter is not touched;
    `apply_mask` does that.
    """
    return reference.advance(item, rule, keep_previous=keep_previous)


def apply_mask(item: Item, rule: Rule, update: Tensor, mask: Tensor, draw: Draw | None = None) -> None:
    """Step 7, in place: `p <- factor p - mask u` (GivenRule: `factor start + (offset - mask) u`), rounded once.

    `update` is what `advance` returned; `mask` any tensor that broadcasts to it (bool counts as 0 and 1). `draw` is
    read where it asks for stochastic rounding.
    """
    reference.apply_mask(item, rule, update, mask, draw)


def top_k(score: Tensor, k: int, *, backend: Backend = "auto") -> Tensor:
    """A bool tensor shaped like `score`, true at exactly its `k` largest elements.

    +0 and -0 are equal; equal scores go to the lower flat (row-major) index; NaN is never selected, so that fewer
    than `k` are true only where fewer than `k` scores are not NaN. `score` is real floating point of any shape.
    """
    return (cpu if _uses_cpu(score, backend) else reference).top_k(score, k)
