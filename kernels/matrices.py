"""Norm control of lists of matrices: in Triton on a GPU, over chunks on a CPU, in plain torch elsewhere.

Three functions make it: `hold_matrices_` before a step, `norm_sums` and `turn_matrices_` after it. On a GPU each is one
launch for all matrices of a shape, and `norm_sums` adds up its parts in another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import reference
from ._dispatch import Backend, _chosen, _gpu, why_no_triton
from .cpu import matrices as by_cpu
from .spec import Matrices


def hold_matrices_(params: Sequence[Tensor], *, zero: bool, backend: Backend = "auto") -> Tensor:
    """Return a copy of parameters of one shape, dtype and device, [n, *size]. With `zero`, set them to 0.

    On a GPU it reads each element once, and writes it once, or twice with `zero`: 8 or 12 bytes of float32.
    """
    return _path(backend, params).hold_matrices_(params, zero=zero)


def norm_sums(
    params: Sequence[Tensor], old: Tensor, *, matrices: Matrices, from_zero: bool, backend: Backend = "auto"
) -> Tensor:
    """Return ‖W‖², W·d and ‖d‖² of each matrix: float64 [3, n, matrices.count].

    Args:
        params: n parameters of one shape, dtype and device, after a step.
        old: W, the same before it, [n, *size], contiguous.
        matrices: how one of them is read.
        from_zero: the step began at 0, so that d is what the parameters are now. Otherwise d is the difference.

    Added up in float64, in a fixed order. On a GPU it reads both once: 8 bytes of float32 an element.
    """
    return _path(backend, params, matrices).norm_sums(params, old, matrices=matrices, from_zero=from_zero)


def turn_matrices_(
    params: Sequence[Tensor],
    old: Tensor,
    totals: Tensor,
    *,
    matrices: Matrices,
    from_zero: bool,
    rate: float | Tensor,
    backend: Backend = "auto",
) -> None:
    """params <- W' ‖W‖ / ‖W'‖, where W' = W + rate ‖W‖ d / ‖d‖, rounded to nearest.

    The norm of W' follows from `totals`, the `norm_sums` over whole matrices: ‖W'‖² = ‖W‖² + 2 c W·d + c² ‖d‖², with
    c = rate ‖W‖ / ‖d‖. A matrix stays as it is if nothing has moved, that is if d is 0, or a difference no larger than
    rounding; and if W' would be next to 0, which takes a rate near 1. Other arguments are as for `norm_sums`. `rate` is
    at least 0, a number or a tensor of one.

    On a GPU it reads parameters and copy, and writes the parameters: 12 bytes of float32 an element.
    """
    path = _path(backend, params, matrices)
    path.turn_matrices_(params, old, totals, matrices=matrices, from_zero=from_zero, rate=rate)


def _path(backend: Backend, params: Sequence[Tensor], matrices: Matrices | None = None) -> Any:
    """The module that takes these tensors. Matrices side by side are no stretches of memory, and are left to torch.

    Raises a ValueError if the backend "gpu" is asked for, and there is none.
    """
    backend = _chosen(backend)
    if backend == "gpu" and why_no_triton() is not None:
        raise ValueError(f"backend 'gpu' can't keep norms: {why_no_triton()}; pass backend='auto'")
    if backend == "gpu" or (backend == "auto" and params[0].is_cuda and why_no_triton() is None):
        fits = matrices is None or matrices.beside == 1
        return _gpu() if fits and _gpu().holds(params) else reference
    return by_cpu if backend in ("auto", "cpu") and by_cpu.takes(params, matrices) else reference
