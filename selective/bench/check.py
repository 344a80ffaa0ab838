"""Whether a contender does what its time would be taken for."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from selective.bench.contenders import Contender
from selective.bench.shapes import Shape
from selective.bench.workload import Workload
from selective.kernels import use_backend

CHECKED: list[Shape] = [(), (1,), (63,), (37, 61), (3, 5, 3, 3)]
UNALIGNED: list[Shape] = [(129,), (65, 67)]
LARGE: dict[str, list[Shape]] = {"cpu": [(300_007,)], "cuda": [(1_000_003,)]}  # many chunks, and a sampled bracket
PEERS_CHECKED: list[Shape] = [(63,), (64, 128), (256, 64), (3, 5, 3, 3)]  # scalars and views are not all of theirs
CHECK_STEPS = 3
# Two ways to round one update differ by some eps of it; a product or a score on the border may then fall to the other
# side, which moves that coordinate by a whole update. More than this share of them is another rule.
ON_THE_BORDER = 1e-4
NEAR = 1e-3  # of how far the parameters moved: where eps is added, how moments are debiased


class Mismatch(RuntimeError):
    """A contender's result is not what its reference says."""


def check(contender: Contender, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Three steps from the same start by the contender and by its reference, on other gradients in each.

    Raises:
        Mismatch: with the parameter's shape and how much of it differs.
    """
    ours, theirs = _workload(contender, device, dtype), _workload(contender, device, dtype)
    start = [p.detach().clone() for p in ours.params]
    mine = contender.make_optimizer(ours.params)
    reference = None
    if contender.agrees != "own":
        reference = (contender.make_reference or contender.make_optimizer)(theirs.params)
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
    """What is wrong with one parameter, in the words before "of a parameter of shape"; None where nothing is."""
    infinite = int((~torch.isfinite(ours)).sum())
    if infinite:
        return f"{infinite} of {ours.numel()} elements are not finite"
    if contender.agrees == "own":
        return "no element has moved" if torch.equal(start, ours) else None
    if contender.agrees == "near":
        eps = torch.finfo(start.dtype).eps
        start, ours, theirs = start.double(), ours.double(), theirs.double()
        moved, apart = float((theirs - start).norm()), float((ours - theirs).norm())
        # Low precision: moments are rounded in each step, and parameters by as much as an ulp.
        allowed = (NEAR + 8 * eps) * moved + CHECK_STEPS * eps * float(start.norm())
        return None if apart <= allowed else f"elements differ from AdamW by {apart / moved:.1e} of the movement"
    differing = int(((ours - theirs).abs() > _rounding(ours, theirs)).sum())
    if differing > ON_THE_BORDER * ours.numel():
        return f"{differing} of {ours.numel()} elements differ from the reference, and so is the step"
    return None


def _rounding(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far two ways to round the same steps may be apart, for each element."""
    size = torch.maximum(ours.abs(), theirs.abs()) + 4e-3  # parameter, and updates of lr × 2 a step
    if ours.dtype == torch.float32:
        return 16 * CHECK_STEPS * torch.finfo(ours.dtype).eps * size
    return torch.finfo(ours.dtype).eps * size  # both compute in float32, and round to a neighbour at most
