"""Launches of norm control, for all parameters of one shape at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.matrices import noise_of
from ..spec import Matrices
from .device.config import DTYPES
from .device.matrices import hold_kernel, norm_sums_kernel, turn_kernel
from .launch import on, run
from .tables import cdiv, upload

BLOCK = 4096  # elements of a program, or of a turn of its loop
BLOCKS = 8  # turns of the loop of a program that adds up
ALIGNED = 16  # bytes: then a thread reads 16 at once


def holds(params: Sequence[Tensor]) -> bool:
    """True if the kernels take these tensors, which are alike."""
    first = params[0]
    most = (1 << 31) - BLOCK * BLOCKS  # places are 32-bit numbers, also behind the end
    if type(first) not in (Tensor, torch.nn.Parameter) or first.dtype not in DTYPES or not 0 < first.numel() < most:
        return False
    return all(p.is_contiguous() for p in params)


@torch.no_grad()
def hold_matrices_(params: Sequence[Tensor], *, zero: bool) -> Tensor:
    """See `selective.kernels.hold_matrices_`: one launch."""
    first, numel = params[0], params[0].numel()
    old = torch.empty((len(params), *first.shape), dtype=first.dtype, device=first.device)
    tiles, (table, aligned) = cdiv(numel, BLOCK), _pointers(params, numel)
    with on(first.device):
        run(
            hold_kernel, len(params) * tiles, table, old, numel, tiles,
            ZERO=zero, ALIGNED=aligned, DTYPE=DTYPES[first.dtype], BLOCK=BLOCK,
        )  # fmt: skip
    return old


@torch.no_grad()
def norm_sums(params: Sequence[Tensor], old: Tensor, *, matrices: Matrices, from_zero: bool) -> Tensor:
    """See `selective.kernels.norm_sums`: a launch, and a sum of what its programs have stored."""
    first, numel = params[0], matrices.rows * matrices.columns
    tiles, (table, aligned) = cdiv(numel, BLOCK * BLOCKS), _pointers(params, numel)
    found = torch.empty((3, len(params), matrices.count, tiles), dtype=torch.float64, device=first.device)
    with on(first.device):
        run(
            norm_sums_kernel, len(params) * matrices.count * tiles, table, old, found, numel, matrices.count, tiles,
            found[0].numel(),
            FROM_ZERO=from_zero, ALIGNED=aligned, DTYPE=DTYPES[first.dtype], BLOCK=BLOCK, BLOCKS=BLOCKS,
        )  # fmt: skip
    return found[..., 0] if tiles == 1 else found.sum(-1)


@torch.no_grad()
def turn_matrices_(
    params: Sequence[Tensor],
    old: Tensor,
    totals: Tensor,
    *,
    matrices: Matrices,
    from_zero: bool,
    rate: float | Tensor,
) -> None:
    """See `selective.kernels.turn_matrices_`: one launch."""
    first, numel = params[0], matrices.rows * matrices.columns
    tiles, (table, aligned) = cdiv(numel, BLOCK), _pointers(params, numel)
    given = isinstance(rate, Tensor)
    totals = totals.contiguous()
    with on(first.device):
        run(
            turn_kernel, len(params) * matrices.count * tiles, table, old, totals, rate if given else totals,
            0.0 if given else float(rate), noise_of(old.dtype, from_zero), numel, matrices.count, tiles,
            totals[0].numel(),
            GIVEN=given, FROM_ZERO=from_zero, ALIGNED=aligned, DTYPE=DTYPES[first.dtype], BLOCK=BLOCK,
        )  # fmt: skip


def _pointers(params: Sequence[Tensor], numel: int) -> tuple[Tensor, bool]:
    """The addresses as a table on the device, and True if each `numel` elements begin at a multiple of `ALIGNED`."""
    pointers, first = tuple(map(Tensor.data_ptr, params)), params[0]
    if first.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph's replays fill it: nothing else shares it
        table = upload(pointers, torch.int64, first.device)
    else:
        table = _table(pointers, first.device)
    return table, not any(at % ALIGNED for at in (*pointers, numel * first.element_size()))


@functools.lru_cache(maxsize=64)  # parameters stay where they are from step to step
def _table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(pointers, torch.int64, device)
