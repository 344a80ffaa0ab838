"""Checks that a contender's step gives the right result, before its time means anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from selective.bench.contenders import Contender
from selective.bench.shapes import Shape
from selective.bench.workload import Workload
from selective.kernels import use_backend

CHECKED: list[Shape] = [(), (1,), (63,), (37, 61), (3, 5, 3, 3)]
UNALIGNED: list[Shape] = [(129,), (65, 67)]
LARGE: dict[str, list[Shape]] = {"cpu": [(300_007,)], "cuda": [(1_000_003,)]}  # for many chunks and sampled brackets
PEERS_CHECKED: list[Shape] = [(63,), (64, 128), (256, 64), (3, 5, 3, 3)]  # not all of them take scalars and views
CHECK_STEPS = 3
# Two ways to round one update differ by a few eps of it. A product or a score on the border may then fall to the other
# side, which moves that coordinate by a whole update. If more than this share of coordinates differs, so does the rule.
ON_THE_BORDER = 1e-4
Arrange = Callable[[Sequence[Parameter]], Sequence[Any]]  # from parameters to what an optimizer is handed


class Mismatch(RuntimeError):
    """Raised if a contender's result is not its reference's."""


def check(
    contender: Contender,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    make_workload: Callable[[], Workload] | None = None,
    arrange: Arrange = list,
) -> None:
    """Take three steps with the contender and with its reference, from one start, on new gradients in each step.

    Args:
        contender: the contender.
        device: "cpu" or "cuda".
        dtype: the dtype of parameters, gradients and state.
        make_workload: makes the parameters; None for a list of shapes of all sorts.
        arrange: what the optimizers are handed, such as groups of these parameters.

    Raises:
        Mismatch: the results differ. The message has the parameter's shape and the number of differing elements.
    """
    make = make_workload or partial(_workload, contender, device, dtype)
    ours, theirs = make(), make()
    start = [p.detach().clone() for p in ours.params]
    mine = contender.make_optimizer(arrange(ours.params))
    reference = None
    if contender.agrees != "own":
        reference = (contender.make_reference or contender.make_optimizer)(arrange(theirs.params))
    for _ in range(CHECK_STEPS):
        ours.fresh_gradients()
        ours.hand_out()
        mine.step()
        if reference is not None:
            theirs.fresh_gradients()
            theirs.hand_out()
            with nullcontext() if contender.make_reference else use_backend("reference"):
                reference.step()
    for before, a, b in zip(start, ours.params, theirs.params, strict=True):
        problem = _problem(contender, before, a.detach(), b.detach())
        if problem:
            raise Mismatch(
                f"{contender.name}: {problem} of a parameter of shape {tuple(a.shape)} after {CHECK_STEPS} steps; a "
                f"time would be that of another step"
            )


def _workload(contender: Contender, device: str, dtype: torch.dtype) -> Workload:
    if contender.agrees == "same":
        return Workload(CHECKED + LARGE[device], device, dtype, unaligned=UNALIGNED)
    return Workload(PEERS_CHECKED, device, dtype)


def _problem(contender: Contender, start: Tensor, ours: Tensor, theirs: Tensor) -> str | None:
    """The fault of one parameter, in words that go before "of a parameter of shape"; None if there is none."""
    infinite = int((~torch.isfinite(ours)).sum())
    if infinite:
        return f"{infinite} of {ours.numel()} elements are not finite"
    if contender.agrees == "own":
        return "no element has moved" if torch.equal(start, ours) else None
    if contender.agrees == "near":
        eps = torch.finfo(start.dtype).eps
        start, ours, theirs = start.double(), ours.double(), theirs.double()
        moved, apart = float((theirs - start).norm()), float((ours - theirs).norm())
        # In low precision, each step rounds the moments, and the parameters by as much as an ulp.
        allowed = (contender.allowed + 8 * eps) * moved + CHECK_STEPS * eps * float(start.norm())
        return (
            None if apart <= allowed else f"elements differ from the reference by {apart / moved:.1e} of the movement"
        )
    differing = int(((ours - theirs).abs() > _rounding(ours, theirs)).sum())
    if differing > ON_THE_BORDER * ours.numel():
        return f"{differing} of {ours.numel()} elements differ from the reference, and so is the step"
    return None


def _rounding(ours: Tensor, theirs: Tensor) -> Tensor:
    """The largest distance between two ways to round the same steps, for each element."""
    size = torch.maximum(ours.abs(), theirs.abs()) + 4e-3  # the parameter, and updates of at most lr × 2 in a step
    if ours.dtype == torch.float32:
        return 16 * CHECK_STEPS * torch.finfo(ours.dtype).eps * size
    return torch.finfo(ours.dtype).eps * size  # both compute in float32, and round to a neighbour at most
