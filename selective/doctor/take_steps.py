"""Steps on random gradients, with the time that they take on the host and on an NVIDIA GPU."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.lent_gradients import gradient_dtype
from selective.doctor.place import said
from selective.doctor.subject import has_values

TIMED = 3
TO_WARM_UP = {"cpu": 2, "cuda": 7}
"""Steps before those that are timed. Rotated parameters get their bases in the first two. On a GPU kernels are compiled
in the first ones, and a CUDA graph is recorded after two steps that have compiled nothing."""
SIZE = 0.01
"""The standard deviation of the gradients."""


@dataclass
class Taken:
    """The steps that were taken. Times are in milliseconds."""

    times: list[tuple[float, float | None]] = field(default_factory=list)  # on the host, and on a GPU
    failure: str | None = None
    not_finite: list[str] = field(default_factory=list)
    warm_up: int = 2

    @property
    def timed(self) -> list[tuple[float, float | None]]:
        """The times of the steps after those that warm up."""
        return self.times[self.warm_up :]


def take_steps(optimizer: Optimizer, names: Mapping[Tensor, str]) -> Taken:
    """Take steps on random gradients, the same for each call. An error of the optimizer ends them, and is reported."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    ready = [p for p in params if has_values(p)]
    if len(ready) < len(params):
        return Taken(failure=f"{len(params) - len(ready):,} parameters have no shape or no memory yet")
    if not params:
        return Taken(failure="no parameter of its groups requires a gradient")
    device = next((p.device for p in params if p.is_cuda), params[0].device)
    taken = Taken(warm_up=TO_WARM_UP.get(device.type, 2))
    for number in range(taken.warm_up + TIMED):
        generators = {p.device: torch.Generator(p.device).manual_seed(number) for p in params}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of schedulers, which were not told about these steps, and DTensors
                for p in params:
                    p.grad = _random_gradient(p, generators[p.device])
                taken.times.append(_time(optimizer.step, device))
        except Exception as error:  # a base, a policy or a hook of the user's may raise anything
            taken.failure = f"step {number + 1} raises {said(error)}"
            break
    taken.not_finite = not_finite(params, names)
    return taken


def not_finite(params: Sequence[Tensor], names: Mapping[Tensor, str]) -> list[str]:
    """Return the names of the parameters that have a NaN or an infinity."""
    return [names[p] for p in params if has_values(p) and not bool(torch.isfinite(p).all())]


def _random_gradient(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return a gradient for `p`, in its layout. That of a subclass (DTensor) is drawn from the global generator."""
    dtype = gradient_dtype(p) or p.dtype
    if type(p) in (Tensor, torch.nn.Parameter):
        return torch.empty_like(p, dtype=dtype, requires_grad=False).normal_(0.0, SIZE, generator=generator)
    return torch.randn_like(p, dtype=dtype, requires_grad=False).mul_(SIZE)


def _time(step: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Return the milliseconds until the call returned, and until the GPU was done."""
    if device.type != "cuda":
        begun = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begun), None
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        first.record()
        begun = time.perf_counter()
        step()
        host = 1e3 * (time.perf_counter() - begun)
        last.record()
        last.synchronize()
    return host, first.elapsed_time(last)
