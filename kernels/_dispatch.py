"""The public functions, and the one place that picks an implementation by device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from . import cpu, reference, sharded
from .reference.rules import Advanced, has_momentum
from .spec import Draw, GivenRule, Item, ItemList, Rule, Selection, Strength, Sums

Backend = Literal["auto", "reference", "cpu", "gpu"]  # Which implementation; "auto" picks by device.
_standard: ContextVar[Backend] = ContextVar("standard", default="auto")
_triton_missing: list[str] = []  # why ("" where it is there), once it was looked for; "said", once the user was told
NO_CONTROL = "there is no Triton kernel for a matched random control"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """What `backend="auto"` means inside of the block (in this thread): for checks of whole optimizers."""
    token = _standard.set(backend)
    try:
        yield
    finally:
        _standard.reset(token)


def backend_in_use() -> Backend:
    """What `backend="auto"` means here and now."""
    return _standard.get()


def _gpu() -> ModuleType:
    """The GPU path, imported when the first GPU tensor asks for it, because it imports Triton."""
    from . import gpu

    return gpu


def why_no_triton() -> str | None:
    """Why the GPU path cannot be imported; None where it can."""
    if not _triton_missing:
        try:
            _gpu()
            _triton_missing.append("")
        except ImportError as error:
            _triton_missing.append(f"Triton can't be imported ({error}); to have it: pip install triton")
    return _triton_missing[0] or None


def _warn_without_triton() -> None:
    """Say once that tensors on a GPU are stepped without kernels, where that is for want of Triton."""
    why = why_no_triton()
    if why is not None and len(_triton_missing) == 1:
        _triton_missing.append("said")
        warnings.warn(
            f"selective: {why}. Until then tensors on the GPU are stepped in plain torch: the same results, in several "
            "times the time (torch's CUDA builds for Linux bring Triton)",
            stacklevel=2,
        )


def why_reference(item: Item, rule: Rule, selection: Selection | None = None) -> str | None:
    """Why a tensor on a GPU is stepped by the reference instead of by a kernel, in words; None where it is not."""
    if selection is not None and selection.control is not None:
        return NO_CONTROL
    return why_no_triton() or _gpu().unsupported(item, rule, selection)


def why_own_code(selection: Selection, param: Tensor) -> str | None:
    """Why this parameter can't be stepped by this selection here, but its policy's own code has to; None where it can.

    For the two kinds that have no implementation everywhere, in words: a user's Triton function, which only the Triton
    kernels can call, and a matched control, which they don't have.
    """
    if selection.control is not None and _path_of(param) == "gpu":
        return NO_CONTROL
    return why_no_function(param) if selection.kind == "function" else None


def _path_of(param: Tensor) -> Backend:
    """Where a step of this parameter goes, as far as its device and the backend say."""
    path = _standard.get()
    if path != "auto":
        return path
    return {"cpu": "cpu", "cuda": "gpu"}.get(param.device.type, "reference")  # type: ignore[return-value]


def why_no_function(param: Tensor) -> str | None:
    """Why a Triton function can't select in this parameter's step, in words; None where it can."""
    path = _standard.get()
    if path in ("reference", "cpu"):
        return f"the backend is {path!r}"
    if path == "auto" and param.device.type != "cuda":
        return f"the parameter is on the {'CPU' if param.device.type == 'cpu' else param.device.type + ' device'}"
    return why_reference(Item(param, param, {}, 0), GivenRule())


def _chosen(backend: Backend) -> Backend:
    backend = _standard.get() if backend == "auto" else backend
    if backend not in ("auto", "reference", "cpu", "gpu"):
        raise ValueError(f"backend is {backend!r}, must be 'auto', 'reference', 'cpu' or 'gpu'")
    return backend


def _implementation(item: Item, rule: Rule, selection: Selection, backend: Backend) -> Backend:
    """Which path takes this item: the kernels of its device, the reference where there are none."""
    backend, device = _chosen(backend), item.param.device
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' got a tensor on {device}; pass backend='auto'")
    if backend == "gpu":
        reason = why_reference(item, rule, selection)
        if reason is not None:
            raise ValueError(f"backend 'gpu' can't take parameter {item.address}: {reason}; pass backend='auto'")
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        _warn_without_triton()
        return "gpu" if why_reference(item, rule, selection) is None else "reference"
    return "reference"


def _momentum_wanted(selection: Selection, strength: Strength) -> str | None:
    """What asks for a momentum, in words; None if nothing does."""
    if selection.kind == "agreement" and selection.product != "update":
        return f"agreement of the {selection.product}"
    if selection.kind == "top_k" and selection.score != "update":
        return f"top-K by the {selection.score} score"
    if selection.kind == "function" and selection.reads_momentum:
        return "the selection's function"
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


def _check_function(items: Sequence[Item], paths: dict[Backend, list[int]], rule: Rule) -> None:
    """Refuse a selection by a function where it can't run. Elsewhere there is its twin, but not in the kernels."""
    for path, chosen in paths.items():
        if path != "gpu":
            item = items[chosen[0]]
            why = why_no_function(item.param) or why_reference(item, rule) or f"the backend is {path!r}"
            raise ValueError(
                f"the selection is a Triton function, which runs on a GPU only, and can't for parameter "
                f"{item.address}: {why}; advance the moments, select in torch and apply the mask instead"
            )


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
        ValueError, TypeError: before anything has moved, where a gradient does not fit, where the selection or
            the strength needs a momentum that the rule does not have, or where the selection is a Triton function and
            a tensor is not stepped by Triton kernels.

    On a CPU, tensor hyper-parameters are read; elsewhere the host never waits for the device. Arithmetic is float32
    (float64 for float64 parameters), state and parameter are rounded once. Agrees with torch's Adam, AdamW and SGD,
    where the mask is 1, to rounding (not bit for bit: torch fuses multiply-adds that are separate here).
    """
    how: Any = {"rule": rule, "selection": selection, "strength": strength, "draw": draw, "statistics": statistics}
    if any(item.shard is not None for item in items):
        return _with_shards(items, how, backend)
    return _step_here(items, how, backend)


def begin_sharded(
    items: Sequence[Item],
    *,
    rule: Rule,
    selection: Selection,
    strength: Strength,
    draw: Draw,
    statistics: bool = False,
    backend: Backend = "auto",
) -> list[sharded.Steps]:
    """`selective_step` of items that are all shards, not yet run: for an `Exchange` with those of other calls."""
    how: Any = {"rule": rule, "selection": selection, "strength": strength, "draw": draw, "statistics": statistics}
    _check(items, rule, selection, strength)

    def kernels(item: Item) -> Any:
        return _gpu().ShardKernels if _implementation(item, rule, selection, backend) == "gpu" else None

    return sharded.sharded_step(items, **how, local_step=partial(_local, backend=backend), kernels=kernels)


def _local(items: Sequence[Item], *, backend: Backend, **how: Any) -> Sequence[Sums] | None:
    return _step_here(items, how, backend)


def _with_shards(items: Sequence[Item], how: Any, backend: Backend) -> Sequence[Sums] | None:
    """Shards and whole tensors in one list."""
    shards = [i for i, item in enumerate(items) if item.shard is not None]
    others = [i for i, item in enumerate(items) if item.shard is None]
    steps = begin_sharded([items[i] for i in shards], **how, backend=backend)
    for one in steps:
        one.go_on()
    found: dict[int, Sums] = {}
    if others:
        found.update(zip(others, _step_here([items[i] for i in others], how, backend) or (), strict=False))
    sharded.run(steps)
    found.update(zip(shards, sharded.in_order(steps, len(shards)) or (), strict=False))
    return [found[i] for i in range(len(items))] if how["statistics"] else None


@torch.no_grad()
def _step_here(items: Sequence[Item], how: Any, backend: Backend) -> Sequence[Sums] | None:
    """The step of tensors as they are, or of shards of which no more than that is asked."""
    rule, selection, strength, statistics = how["rule"], how["selection"], how["strength"], how["statistics"]
    if selection.kind == "function" and why_no_triton() is None:
        selection = replace(selection, function=_gpu().jitted(selection.function))
        how = {**how, "selection": selection}
    planned = isinstance(items, ItemList) and bool(items.cache) and bool(items)
    asked = _chosen(backend)
    if planned and (asked == "gpu" or (asked == "auto" and items[0].param.is_cuda)):
        again = _gpu().step_again(items, **how)  # everything below was found out in an earlier step
        if again is not None:
            return again if statistics else None
    _check(items, rule, selection, strength)
    paths: dict[Backend, list[int]] = {}
    for i, item in enumerate(items):
        paths.setdefault(_implementation(item, rule, selection, backend), []).append(i)
    if selection.kind == "function":
        _check_function(items, paths, rule)
    results: list[Sums | None] = [None] * len(items)
    for path, chosen in paths.items():
        module = {"cpu": cpu, "reference": reference}[path] if path != "gpu" else _gpu()
        part = items if len(paths) == 1 else [items[i] for i in chosen]
        sums = module.selective_step(part, **how)
        if len(paths) == 1:
            return sums if statistics else None
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
    path = _chosen(backend)
    if path == "cpu" and score.device.type != "cpu":
        raise ValueError(f"backend 'cpu' got a tensor on {score.device}; pass backend='auto'")
    if path == "auto":
        path = "cpu" if score.device.type == "cpu" else "reference"
        if score.device.type == "cuda" and why_no_triton() is None and _gpu().ranks(score):
            path = "gpu"
    return (_gpu() if path == "gpu" else {"cpu": cpu, "reference": reference}[path]).top_k(score, k)
