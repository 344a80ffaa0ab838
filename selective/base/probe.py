"""Runs of a clone from chosen parameter values on chosen gradients, recorded in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import StepFailed, clone_with_stand_ins
from selective.base.generators import seed_all
from selective.base.state_entries import dequantized, state_entries
from selective.base.step_base import call_step
from selective.parameter import initialized

STEPS = 10  # RAdam's rectification begins at step 6, SOAP moves from the second, Prodigy's scale shows after four
LR = 1e-2
LARGE, SMALL = 12, 6  # elements of a stand-in, as powers of 2
SIZABLE = 16  # a state may have at most this many times the elements of the stand-in, or stand-ins stay small
Grads = Callable[[int, int, Tensor], Tensor]  # (step, stand-in, its value) -> gradient


def stand_in_shape(ndim: int, power: int = 12) -> tuple[int, ...]:
    """Return a shape of 2^`power` elements in `ndim` dimensions, of different lengths if possible; () stays ().

    The default is 4,096 elements because some packages keep 8-bit states from there on (torchao, bitsandbytes). The
    lengths differ (32×128, 8×16×32, 4×8×8×16), so that a Gram matrix or a statistic of the rows does not have the shape
    of the parameter.
    """
    powers = [(power + i) // ndim for i in range(ndim)]  # they sum to `power`, by Hermite's identity
    if 2 <= ndim <= 4 and powers[0] > 1:
        powers[0], powers[-1] = powers[0] - 1, powers[-1] + 1
    return tuple(2**p for p in powers)


def values(shapes: Sequence[tuple[int, ...]], seed: int, scale: float = 1.0, spread: float = 0.0) -> list[Tensor]:
    """Return float64 tensors of normal numbers times `scale`.

    With `spread`, each coordinate is also multiplied by a size of its own. The sizes are log-normal and do not depend
    on `seed`.
    """
    out = []
    for i, shape in enumerate(shapes):
        of_values = torch.Generator().manual_seed(1000 * seed + i)
        x = torch.randn(shape, generator=of_values, dtype=torch.float64, device="cpu") * scale
        of_sizes = torch.Generator().manual_seed(7 + i)
        size = torch.randn(shape, generator=of_sizes, dtype=torch.float64, device="cpu")
        out.append(x * torch.exp(spread * size))
    return out


@dataclass
class Recording:
    """The record of some steps of a clone: parameters, gradients and states, as flat float64 tensors.

    `params[t][i]` is stand-in i after t steps. `grads[t][i]` and `states[t][i]` are of step t + 1.
    """

    params: list[list[Tensor]] = field(default_factory=list)
    states: list[list[dict[str, Tensor]]] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    dequantized: set[str] = field(default_factory=set)
    entry_names: set[str] = field(default_factory=set)  # all state entries that are not None
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
) -> Recording:
    """Step a clone `steps` times, and record everything. Call it inside `unnoticed()`.

    Raises:
        CannotClone: `base` holds something that cannot be copied.
        StepFailed: the base's own step raised.
    """
    params: list[Tensor] = [torch.nn.Parameter(s.to(device, dtype, copy=True)) for s in starts]
    clone = clone_with_stand_ins(base, [params], overrides, groups=[group])
    if construct:
        clone.state.update(constructed_state(clone))
    record = Recording(params=[[_flat(p) for p in params]])
    seed_all(0)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = grads(t, i, p.detach().to("cpu", torch.float64)).to(device, dtype, copy=True)
        given_grads = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        record.grads.append([_flat(g) for _, g in given_grads])
        if before is not None:
            before(clone, params)
        try:
            call_step(clone)
        except Exception as error:  # broad: the step of an unknown class may raise anything
            raise StepFailed from error
        for p, (grad, before_step) in zip(params, given_grads, strict=True):
            record.clears_grad |= p.grad is None
            written = not torch.equal(grad, before_step) or (p.grad is not None and p.grad is not grad)
            record.writes_grad |= written
        record.params.append([_flat(p) for p in params])
        record.states.append([_snapshot(clone.state.get(p, {}), p, record) for p in params])
    return record


def constructed_state(clone: Optimizer) -> Mapping[Any, Any]:
    """Return the state that the constructor makes (some versions of torch's Adagrad make it only there)."""
    group = clone.param_groups[0]
    accepted = inspect.signature(type(clone).__init__).parameters
    try:
        return type(clone)([group], **{k: v for k, v in group.items() if k in accepted and k != "params"}).state
    except Exception as error:  # broad: the constructor of an unknown class may raise anything
        raise StepFailed from error


def _snapshot(state: Mapping[str, Any], param: Tensor, record: Recording) -> dict[str, Tensor]:
    """Return flat copies of the entries with as many elements as `param`; note in `record` what else there is."""
    out = {}
    for key, value in state_entries(state):
        if value is None:
            continue
        record.entry_names.add(key)
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


DECAY = 0.5  # large, so that decay changes a parameter about as much as the gradient does


LOW = (torch.float16, torch.bfloat16)


# Bound on the rounding errors of ten steps, in units of eps·max(|p|, |u|). At most 4 were measured for updates that do
# not depend on the parameter. The weakest dependence found (Prodigy's, relative 2e-6) is nine orders above in float64.
ROUNDING = 256.0


class Prober:
    """Makes runs of clones of `base`, on stand-ins for the parameters of `group`. Used inside `unnoticed()`."""

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
        """Make stand-ins of 2^`power` elements, which are stepped in `dtype`, and their gradients."""
        self.dtype, self.shapes = dtype, [stand_in_shape(n, power) for n in self.ndims]
        # RMS 0.02 and 0.1: below LAMB's clamp at a norm of 10, and above Adafactor's floor of 1e-3.
        self.small, self.large = values(self.shapes, 1, 0.02), values(self.shapes, 2, 0.1)
        self.zeros = [torch.zeros_like(x) for x in self.small]
        series = [values(self.shapes, 10 + t, 0.1 * (1 + t % 3), spread=1.0) for t in range(STEPS)]
        self.grads: Grads = lambda t, i, p: series[t][i]

    def run(self, starts: list[Tensor], grads: Grads | None = None, *, decay: float = 0.0, **options: Any) -> Recording:
        overrides = {"lr": options.pop("lr", LR), "weight_decay": decay}
        options = {"dtype": self.dtype, "construct": self.construct, **options}
        record = run(
            self.base, self.group, starts, grads or self.grads, device=self.device, overrides=overrides, **options
        )
        self.writes_grad |= record.writes_grad
        self.clears_grad |= record.clears_grad
        return record

    def find_who_makes_state(self) -> None:
        """Step a clone once; if an entry is missing from its state, let the constructor make the state from now on."""
        try:
            self.run(self.small, steps=1)
        except StepFailed as error:
            if not isinstance(error.__cause__, KeyError):
                raise
            self.construct = True

    def eps(self, record: Recording) -> float:
        """Return the machine epsilon of the base's arithmetic: some classes compute in float32 for any dtype."""
        last = record.params[-1]
        coarse = self.dtype != torch.float64 or all(torch.equal(p, p.float().double()) for p in last)
        return torch.finfo(torch.float32 if coarse else torch.float64).eps

    @property
    def maximize(self) -> bool:
        """True if the base maximizes, by an option of the group or an attribute of the base (pytorch_optimizer)."""
        return bool(self.group.get("maximize", getattr(self.base, "maximize", False)))


def largest(x: Tensor) -> float:
    """Return the largest absolute value; 0 for an empty tensor."""
    return float(x.abs().max()) if x.numel() else 0.0


def cosine(x: Tensor, y: Tensor) -> float:
    """Return the cosine of the angle between two flat tensors; 0 if either is zero."""
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else 0.0
