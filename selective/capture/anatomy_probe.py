"""Runs of a twin from chosen values on chosen gradients, recorded in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy_clone import call_step, clone_with_stand_ins, reseed

STEPS = 10  # RAdam's rectification begins at step 6, SOAP moves from the second, Prodigy's scale shows after four
LR = 1e-2
Grads = Callable[[int, int, Tensor], Tensor]  # (step, stand-in, its value) -> gradient


def stand_in_shape(ndim: int) -> tuple[int, ...]:
    """4,096 elements in `ndim` dimensions, all sides different as far as that goes; () stays ().

    4,096 because 8-bit states begin there (torchao, bitsandbytes). Sides differ so that a Gram matrix or a row of
    statistics does not look like the parameter: 32×128, 8×16×32, 4×8×8×16.
    """
    powers = {0: (), 1: (12,), 2: (5, 7), 3: (3, 4, 5), 4: (2, 3, 3, 4)}.get(ndim)
    if powers is None:
        powers = tuple(12 // ndim + (i < 12 % ndim) for i in range(ndim))
    return tuple(2**p for p in powers)


def values(shapes: Sequence[tuple[int, ...]], seed: int, scale: float = 1.0, spread: float = 0.0) -> list[Tensor]:
    """Normal numbers in float64; with `spread`, each coordinate has a size of its own (log-normal, the same seeds)."""
    out = []
    for i, shape in enumerate(shapes):
        make = torch.Generator().manual_seed(1000 * seed + i)
        x = torch.randn(shape, generator=make, dtype=torch.float64) * scale
        size = torch.randn(shape, generator=torch.Generator().manual_seed(7 + i), dtype=torch.float64)
        out.append(x * torch.exp(spread * size))
    return out


@dataclass
class Run:
    """`params[t][i]`: flat float64, t = 0 is the start. `states[t][i]`: entries after step t + 1."""

    params: list[list[Tensor]] = field(default_factory=list)
    states: list[list[dict[str, Tensor]]] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    dequantized: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)  # all state entries that are not None
    writes_grad: bool = False
    clears_grad: bool = False


def state_entries(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All entries, those in nested dictionaries as "outer.inner"."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from state_entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dequantized(value: Tensor) -> Tensor:
    """A tensor subclass with a `dequantize()` of its own (torchao's 8-bit states) as a plain tensor."""
    if type(value) is not Tensor and hasattr(value, "dequantize"):
        return value.dequantize()
    return value


def run(
    base: Optimizer,
    group: Mapping[str, Any],
    starts: Sequence[Tensor],
    grads: Grads,
    *,
    dtype: torch.dtype,
    device: torch.device,
    overrides: Mapping[str, Any],
    steps: int = STEPS,
    before: Callable[[Optimizer, list[Tensor]], None] | None = None,
) -> Run:
    """Step a twin `steps` times and record everything. Inside `unnoticed()`; raises what the base's step raises."""
    params: list[Tensor] = [torch.nn.Parameter(s.to(device, dtype, copy=True)) for s in starts]
    twin = clone_with_stand_ins(base, [params], overrides, groups=[group])
    record = Run(params=[[_flat(p) for p in params]])
    reseed(0)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = grads(t, i, p.detach().to("cpu", torch.float64)).to(device, dtype, copy=True)
        given = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        record.grads.append([_flat(g) for _, g in given])
        if before is not None:
            before(twin, params)
        call_step(twin)
        for p, (same, content) in zip(params, given):
            record.clears_grad |= p.grad is None
            written = not torch.equal(same, content) or (p.grad is not None and p.grad is not same)
            record.writes_grad |= written
        record.params.append([_flat(p) for p in params])
        record.states.append([_snapshot(twin.state.get(p, {}), p, record) for p in params])
    return record


def _snapshot(state: Mapping[str, Any], param: Tensor, record: Run) -> dict[str, Tensor]:
    out = {}
    for key, value in state_entries(state):
        if value is None:
            continue
        record.kept.add(key)
        if not isinstance(value, Tensor) or value.numel() != param.numel() or value.dtype == torch.bool:
            continue
        plain = dequantized(value)
        if plain is not value:
            record.dequantized.add(key)
        out[key] = _flat(plain)
    return out


def _flat(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True).to(torch.float64).reshape(-1)
