"""Runs of a clone from chosen values on chosen gradients, recorded in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import StepFailed, clone_with_stand_ins, reseed
from selective.base.state_entries import dequantized, state_entries
from selective.base.step_base import call_step
from selective.parameter import initialized

STEPS = 10  # RAdam's rectification begins at step 6, SOAP moves from the second, Prodigy's scale shows after four
LR = 1e-2
LARGE, SMALL, SIZABLE = 12, 6, 16  # elements of a stand-in, as powers of 2; how many times those a state may have
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
    """Step a clone `steps` times and record everything. Inside `unnoticed()`.

    Raises `StepFailed` where the step of the base does.
    """
    params: list[Tensor] = [torch.nn.Parameter(s.to(device, dtype, copy=True)) for s in starts]
    clone = clone_with_stand_ins(base, [params], overrides, groups=[group])
    if construct:
        clone.state.update(constructed_state(clone))
    record = Run(params=[[_flat(p) for p in params]])
    reseed(0)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = grads(t, i, p.detach().to("cpu", torch.float64)).to(device, dtype, copy=True)
        given = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        record.grads.append([_flat(g) for _, g in given])
        if before is not None:
            before(clone, params)
        try:
            call_step(clone)
        except Exception as error:  # a foreign step may raise anything
            raise StepFailed from error
        for p, (same, content) in zip(params, given, strict=True):
            record.clears_grad |= p.grad is None
            written = not torch.equal(same, content) or (p.grad is not None and p.grad is not same)
            record.writes_grad |= written
        record.params.append([_flat(p) for p in params])
        record.states.append([_snapshot(clone.state.get(p, {}), p, record) for p in params])
    return record


def constructed_state(clone: Optimizer) -> Mapping[Any, Any]:
    """The state that the class fills in its constructor (torch's Adagrad, in some versions only there)."""
    group = clone.param_groups[0]
    accepted = inspect.signature(type(clone).__init__).parameters
    try:
        return type(clone)([group], **{k: v for k, v in group.items() if k in accepted and k != "params"}).state
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


DECAY = 0.5  # large, so that decay is not small beside the gradient


LOW = (torch.float16, torch.bfloat16)


# Rounding of ten steps, in units of eps·max(|p|, |u|): measured at most 4 where the update does not look at the
# parameter. The weakest dependence met (Prodigy's, relative 2e-6) is nine orders above in float64.
ROUNDING = 256.0


class Prober:
    """Steps clones of `base` on stand-ins for the parameters of `group`. Used inside `unnoticed()`."""

    def __init__(self, base: Optimizer, group: Mapping[str, Any]) -> None:
        params = initialized(group["params"])
        self.base, self.group = base, group
        self.ndims = sorted({p.ndim for p in params}) or [2]
        device = params[0].device if params else torch.device("cpu")
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.low = sorted({p.dtype for p in params} & set(LOW), key=str)
        self.writes_grad = self.clears_grad = self.construct = False
        self.prepare(torch.float64, SMALL)

    def prepare(self, dtype: torch.dtype, power: int) -> None:
        """Stand-ins of 2^`power` elements, to be stepped in `dtype`, and their gradients."""
        self.dtype, self.shapes = dtype, [stand_in_shape(n, power) for n in self.ndims]
        # RMS 0.02 and 0.1: LAMB's clamp at a norm of 10 is not reached, Adafactor's floor of 1e-3 is passed.
        self.small, self.large = values(self.shapes, 1, 0.02), values(self.shapes, 2, 0.1)
        self.zeros = [torch.zeros_like(x) for x in self.small]
        series = [values(self.shapes, 10 + t, 0.1 * (1 + t % 3), spread=1.0) for t in range(STEPS)]
        self.grads: Grads = lambda t, i, p: series[t][i]

    def run(self, starts: list[Tensor], grads: Grads | None = None, *, decay: float = 0.0, **options: Any) -> Run:
        overrides = {"lr": options.pop("lr", LR), "weight_decay": decay}
        options = {"dtype": self.dtype, "construct": self.construct, **options}
        record = run(
            self.base, self.group, starts, grads or self.grads, device=self.device, overrides=overrides, **options
        )
        self.writes_grad |= record.writes_grad
        self.clears_grad |= record.clears_grad
        return record

    def find_who_makes_state(self) -> None:
        """Step a clone once; where an entry is missing, have the constructor make the state from now on."""
        try:
            self.run(self.small, steps=1)
        except StepFailed as error:
            if not isinstance(error.__cause__, KeyError):
                raise
            self.construct = True

    def eps(self, record: Run) -> float:
        """Of the arithmetic that the class used: some compute in float32 whatever the parameter's dtype is."""
        last = record.params[-1]
        coarse = self.dtype != torch.float64 or all(torch.equal(p, p.float().double()) for p in last)
        return torch.finfo(torch.float32 if coarse else torch.float64).eps

    @property
    def maximize(self) -> bool:
        """Whether the base climbs: an option of the group, or an attribute of the base (pytorch_optimizer)."""
        return bool(self.group.get("maximize", getattr(self.base, "maximize", False)))


def largest(x: Tensor) -> float:
    """The largest absolute value; 0 for an empty tensor."""
    return float(x.abs().max()) if x.numel() else 0.0


def cosine(x: Tensor, y: Tensor) -> float:
    """Of the angle between two flat tensors; 0 where either is zero."""
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else 0.0
