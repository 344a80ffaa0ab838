"""Runs of a twin from chosen values on chosen gradients, recorded in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy_clone import StepFailed, clone_with_stand_ins, reseed
from selective.capture.stepping import call_step

STEPS = 10  # RAdam's rectification begins at step 6, SOAP moves from the second, Prodigy's scale shows after four
LR = 1e-2
Grads = Callable[[int, int, Tensor], Tensor]  # (step, stand-in, its value) -> gradient


def stand_in_shape(ndim: int, power: int = 12) -> tuple[int, ...]:
    """2^`power` elements in `ndim` dimensions, the sides different as far as that goes; () stays ().

    4,096 by default because 8-bit states begin there (torchao, bitsandbytes). Sides differ so that a Gram matrix or a
    row of statistics does not look like the parameter: 32×128, 8×16×32, 4×8×8×16.
    """
    powers = [(power + i) // ndim for i in range(ndim)]  # they sum to `power`, by Hermite's identity
    if 2 <= ndim <= 4 and powers[0] > 1:
        powers[0], powers[-1] = powers[0] - 1, powers[-1] + 1
    return tuple(2**p for p in powers)


def values(shapes: Sequence[tuple[int, ...]], seed: int, scale: float = 1.0, spread: float = 0.0) -> list[Tensor]:
    """Normal numbers in float64; with `spread`, each coordinate has a size of its own (log-normal, the same seeds)."""
    out = []
    for i, shape in enumerate(shapes):
        make = torch.Generator().manual_seed(1000 * seed + i)
        x = torch.randn(shape, generator=make, dtype=torch.float64, device="cpu") * scale
        other = torch.Generator().manual_seed(7 + i)
        size = torch.randn(shape, generator=other, dtype=torch.float64, device="cpu")
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
    largest_state: int = 0  # elements of the largest tensor in the state
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
    construct: bool = False,
) -> Run:
    """Step a twin `steps` times and record everything. Inside `unnoticed()`.

    Raises `StepFailed` where the step of the base does.
    """
    params: list[Tensor] = [torch.nn.Parameter(s.to(device, dtype, copy=True)) for s in starts]
    twin = clone_with_stand_ins(base, [params], overrides, groups=[group])
    if construct:
        twin.state.update(constructed_state(twin))
    record = Run(params=[[_flat(p) for p in params]])
    reseed(0)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = grads(t, i, p.detach().to("cpu", torch.float64)).to(device, dtype, copy=True)
        given = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        record.grads.append([_flat(g) for _, g in given])
        if before is not None:
            before(twin, params)
        try:
            call_step(twin)
        except Exception as error:  # a foreign step may raise anything
            raise StepFailed from error
        for p, (same, content) in zip(params, given, strict=True):
            record.clears_grad |= p.grad is None
            written = not torch.equal(same, content) or (p.grad is not None and p.grad is not same)
            record.writes_grad |= written
        record.params.append([_flat(p) for p in params])
        record.states.append([_snapshot(twin.state.get(p, {}), p, record) for p in params])
    return record


def constructed_state(twin: Optimizer) -> Mapping[Any, Any]:
    """The state that the class fills in its constructor (torch's Adagrad, in some versions only there)."""
    group = twin.param_groups[0]
    accepted = inspect.signature(type(twin).__init__).parameters
    try:
        return type(twin)([group], **{k: v for k, v in group.items() if k in accepted and k != "params"}).state
    except Exception as error:  # a foreign constructor may raise anything
        raise StepFailed from error


def _snapshot(state: Mapping[str, Any], param: Tensor, record: Run) -> dict[str, Tensor]:
    out = {}
    for key, value in state_entries(state):
        if value is None:
            continue
        record.kept.add(key)
        record.largest_state = max([record.largest_state, *(x.numel() for x in _tensors(value))])
        if not isinstance(value, Tensor) or value.numel() != param.numel() or value.dtype == torch.bool:
            continue
        plain = dequantized(value)
        if plain is not value:
            record.dequantized.add(key)
        out[key] = _flat(plain)
    return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _flat(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True).to(torch.float64).reshape(-1)
