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

from . import checked, cpu, reference, sharded
from ._refusals import check_items
from .reference.rules import Advanced
from .spec import (
    Decay,
    Draw,
    GivenRule,
    Item,
    ItemList,
    Rule,
    Selection,
    StepCall,
    StepSpec,
    Strength,
    Sums,
)

Backend = Literal["auto", "reference", "cpu", "gpu"]  # The implementation; "auto" picks by device.
_standard: ContextVar[Backend] = ContextVar("standard", default="auto")
_imported: list[ModuleType] = []  # the GPU path, as soon as it is imported
_triton_missing: list[str] = []  # once looked for: why it is missing ("" if it is not); "said", once the user was told


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Let `backend="auto"` mean `backend` inside of the block (in this thread): for checks of whole optimizers."""
    token = _standard.set(backend)
    try:
        yield
    finally:
        _standard.reset(token)


def backend_in_use() -> Backend:
    """The implementation that `backend="auto"` means here and now."""
    return _standard.get()


def _gpu() -> ModuleType:
    """The GPU path, imported when the first GPU tensor asks for it, because it imports Triton."""
    if not _imported:
        from . import gpu

        _imported.append(gpu)
    return _imported[0]


def why_no_triton() -> str | None:
    """The reason why the GPU path can't be imported; None if it can."""
    if not _triton_missing:
        try:
            _gpu()
            _triton_missing.append("")
        except ImportError as error:
            _triton_missing.append(f"Triton can't be imported ({error}); to have it: pip install triton")
    return _triton_missing[0] or None


def _warn_without_triton() -> None:
    """Warn, once, that tensors on a GPU are stepped without kernels because Triton is missing."""
    why = why_no_triton()
    if why is not None and len(_triton_missing) == 1:
        _triton_missing.append("said")
        warnings.warn(
            f"selective: {why}. Until then tensors on the GPU are stepped in plain torch: the same results, in several "
            "times the time (torch's CUDA builds for Linux bring Triton)",
            stacklevel=2,
        )


def why_reference(item: Item, rule: Rule, selection: Selection | None = None) -> str | None:
    """The reason why a tensor on a GPU is stepped by the reference, in words; None if a kernel steps it."""
    return why_no_triton() or _gpu().unsupported(item, rule, selection)


def why_own_code(selection: Selection, param: Tensor) -> str | None:
    """The reason why no kernel has this selection for this parameter, in words; None if one has it.

    If there is a reason, the policy's own code has to run. There is one for a user's Triton function only, which only
    Triton kernels can call.
    """
    return why_no_function(param) if selection.kind == "function" else None


def why_no_function(param: Tensor) -> str | None:
    """The reason why a Triton function can't select in this parameter's step, in words; None if it can."""
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
    """The implementation for this item: the kernels of its device, or the reference if there are none for it."""
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


def _check_function(items: Sequence[Item], paths: dict[Backend, list[int]], rule: Rule) -> None:
    """Refuse a selection by a Triton function for items that are not stepped by Triton kernels."""
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
    decay: Decay | None = None,
    graphs: bool = False,
) -> Sequence[Sums] | None:
    """The complete step of these tensors, in place: moments, mask, decay, parameter (steps 5 to 7 of the design).

    Args:
        items: one for each parameter: real floating point tensors of any shape, layout and size, empty and 0-d ones
            included. The gradient has the parameter's shape; its dtype and layout may differ. `item.state` has the
            base's own entries as `rule` names them; SGD's `momentum_buffer` is made in its first step.
        rule: how the moments move; its hyper-parameters hold for all items.
        selection, strength: which coordinates are selected, and the two multipliers.
        draw: the source of the random numbers of selections, samples and rounding.
        statistics: also return one `Sums` for each item, in order, on the item's device.
        backend: "auto" picks by device; the others are for tests.
        decay: the coordinates that the rule's factor of decoupled decay reaches; None: all.
        graphs: on a GPU, launches that repeat those of the same `ItemList` may be replayed as a CUDA graph.

    Raises:
        ValueError, TypeError: before anything has moved, if a gradient does not fit, if the selection or the strength
            needs a momentum that the rule does not have, or if the selection is a Triton function and a tensor is not
            stepped by Triton kernels.

    On a CPU, tensor hyper-parameters are read; elsewhere the host never waits for the device. Arithmetic is float32
    (float64 for float64 parameters), state and parameter are rounded once. Where the mask is 1, the step agrees with
    torch's Adam, AdamW and SGD to rounding (not bit for bit: torch fuses multiply-adds that are separate here).
    """
    spec = StepSpec(rule, selection, strength, draw, statistics, decay)
    if [item for item in items if item.shard is not None]:  # a list, because every step comes here
        return _with_shards(items, spec, backend)
    return _step_here(items, spec, backend, graphs)


def begin_sharded(
    items: Sequence[Item],
    *,
    rule: Rule,
    selection: Selection,
    strength: Strength,
    draw: Draw,
    statistics: bool = False,
    backend: Backend = "auto",
    decay: Decay | None = None,
) -> list[sharded.RunningPart]:
    """`selective_step` of items that are all shards, not yet run.

    Takes and refuses the same as `selective_step`. Give the result to an `Exchange`, so that these items share their
    collectives with those of other calls.
    """
    return _begin_sharded(items, StepSpec(rule, selection, strength, draw, statistics, decay), backend)


def _begin_sharded(items: Sequence[Item], spec: StepSpec, backend: Backend) -> list[sharded.RunningPart]:
    asked = _chosen(backend)
    buckets = sharded.kept_buckets(items, spec, asked)
    if buckets is None:
        check_items(items, spec)
    if checked.is_on() and not sharded.is_local(spec):
        checked.refuse_shards()

    def kernels(item: Item) -> Any:
        return _gpu().ShardKernels if _implementation(item, spec.rule, spec.selection, backend) == "gpu" else None

    if buckets is None:
        buckets = sharded.buckets_of(items, spec, kernels)
        sharded.keep_buckets(items, spec, asked, buckets)
    local_step = partial(_step_here, backend=backend)
    return sharded.sharded_step(items, spec, local_step=local_step, kernels=kernels, buckets=buckets)


def _with_shards(items: Sequence[Item], spec: StepSpec, backend: Backend) -> Sequence[Sums] | None:
    """The step of a list that has both shards and whole tensors."""
    shards = [i for i, item in enumerate(items) if item.shard is not None]
    others = [i for i, item in enumerate(items) if item.shard is None]
    mine = items if len(shards) == len(items) else [items[i] for i in shards]  # a kept list knows its buckets
    steps = _begin_sharded(mine, spec, backend)
    for one in steps:
        one.resume()
    sums: dict[int, Sums] = {}
    if others:
        sums.update(zip(others, _step_here([items[i] for i in others], spec, backend) or (), strict=False))
    sharded.run(steps)
    sums.update(zip(shards, sharded.in_order(steps, len(shards)) or (), strict=False))
    return [sums[i] for i in range(len(items))] if spec.statistics else None


def _with_triton_function(spec: StepSpec) -> StepSpec:
    """The spec with a selection's function compiled, if it has one and Triton can be imported."""
    selection = spec.selection
    if selection.kind != "function" or why_no_triton() is not None:
        return spec
    return replace(spec, selection=replace(selection, function=_gpu().jitted(selection.function)))


@torch.no_grad()
def _step_here(items: Sequence[Item], spec: StepSpec, backend: Backend, graphs: bool = False) -> Sequence[Sums] | None:
    """The step of whole tensors, or of shards that can be stepped as if they were whole."""
    spec = _with_triton_function(spec)
    call = StepCall(items, spec, graphs=graphs)
    if checked.is_on():
        return checked.compared([call], lambda: [_by_plan_or_paths(call, backend)])[0]
    return _by_plan_or_paths(call, backend)


def _by_plan_or_paths(call: StepCall, backend: Backend) -> Sequence[Sums] | None:
    """The step by the plan that an earlier step has made, or by the implementation of each item."""
    items, spec = call.items, call.spec
    planned = isinstance(items, ItemList) and bool(items.cache) and bool(items)
    asked = _chosen(backend)
    if planned and (asked == "gpu" or (asked == "auto" and items[0].param.is_cuda)):
        plan = _gpu().plan_of([call])
        if plan is not None:  # all that follows below was settled in an earlier step
            return plan.run([call])[0]
    return _step_by(_paths(items, spec, backend), items, spec)


def _paths(items: Sequence[Item], spec: StepSpec, backend: Backend) -> dict[Backend, list[int]]:
    """The indices of the items by the implementation that steps them. Refuses what can't be stepped."""
    check_items(items, spec)
    paths: dict[Backend, list[int]] = {}
    on_cpu = _chosen(backend) in ("auto", "cpu")
    for i, item in enumerate(items):
        known = on_cpu and item.param.is_cpu
        path = "cpu" if known else _implementation(item, spec.rule, spec.selection, backend)
        paths.setdefault(path, []).append(i)
    if spec.selection.kind == "function":
        _check_function(items, paths, spec.rule)
    return paths


def _step_by(paths: dict[Backend, list[int]], items: Sequence[Item], spec: StepSpec) -> Sequence[Sums] | None:
    """The step of these items, each by the implementation that `paths` says."""
    results: list[Sums | None] = [None] * len(items)
    for path, places in paths.items():
        module = {"cpu": cpu, "reference": reference}[path] if path != "gpu" else _gpu()
        part = items if len(paths) == 1 else [items[i] for i in places]
        sums = module.selective_step(part, spec)
        if len(paths) == 1:
            return sums if spec.statistics else None
        for i, s in zip(places, sums or [], strict=bool(sums)):
            results[i] = s
    return [s for s in results if s is not None] if spec.statistics else None


def advance(item: Item, rule: Rule, *, keep_previous: bool = False) -> Advanced:
    """Move the moments of one tensor, in place, and return the tensors that a custom policy reads.

    These are the gradient (after `maximize` and coupled decay), the update, the momentum, and with `keep_previous` the
    momentum before it moved: whole tensors shaped like the parameter, float32 (float64 for float64 parameters). The
    momenta are None if the rule has none. They may share memory with the gradient or the state: read them, don't
    write. The parameter is not changed; `apply_mask` does that.
    """
    return reference.advance(item, rule, keep_previous=keep_previous)


def apply_mask(
    item: Item, rule: Rule, update: Tensor, mask: Tensor, draw: Draw | None = None, decays: Tensor | None = None
) -> None:
    """Step 7, in place: `p <- factor p - mask u` (GivenRule: `factor start + (offset - mask) u`), rounded once.

    `update` is the update that `advance` returned; `mask` any tensor that broadcasts to it (bool counts as 0 and 1).
    `draw` is read if it asks for stochastic rounding. `decays` is True at the coordinates that the rule's factor of
    decoupled decay reaches (`decaying` computes it for a `Decay`); None: all.
    """
    reference.apply_mask(item, rule, update, mask, draw, decays)


def top_k(score: Tensor, k: int, *, backend: Backend = "auto") -> Tensor:
    """A bool tensor shaped like `score`, true at exactly its `k` largest elements.

    +0 and -0 are equal. Equal scores go to the lower flat (row-major) index. NaN is never selected, so that fewer than
    `k` are true only if fewer than `k` scores are not NaN. `score` is real floating point of any shape.

    Raises a ValueError for backend "cpu" and a tensor on another device.
    """
    path = _chosen(backend)
    if path == "cpu" and score.device.type != "cpu":
        raise ValueError(f"backend 'cpu' got a tensor on {score.device}; pass backend='auto'")
    if path == "auto":
        path = "cpu" if score.device.type == "cpu" else "reference"
        if score.device.type == "cuda" and why_no_triton() is None and _gpu().ranks(score):
            path = "gpu"
    return (_gpu() if path == "gpu" else {"cpu": cpu, "reference": reference}[path]).top_k(score, k)
