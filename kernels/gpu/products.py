"""Launches of the products of float32 matrices: averages of Gram matrices, and products by themselves."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .device.products import product_kernel
from .launch import on, run
from .tables import cdiv


class Tiles(NamedTuple):
    """The sizes of a program. `rows` is a multiple of `columns`; all of them are powers of two, and 16 at least."""

    rows: int  # of the result
    columns: int
    depth: int  # terms that a tensor core adds up
    warps: int
    stages: int  # of the pipeline that loads what comes next
    registers: int | None = None  # of a thread, at most


PRECISION = "tf32x3"  # "ieee" does not use tensor cores; "tf32" has 11 bits
LARGE, SMALL = Tiles(128, 64, 32, 4, 4), Tiles(64, 64, 32, 4, 3)
FROM = 256  # rows and columns of a result from which LARGE tiles are taken
SHARED = 128 << 10  # bytes of shared memory that a program may take where LARGE has its four stages, of 24 KiB each


def tiles_for(rows: int, columns: int, device: torch.device) -> Tiles:
    """The tiles for results of this size, on this device. GPUs for desktops have room for three stages."""
    if min(rows, columns) < FROM:
        return SMALL
    return LARGE if device.type != "cuda" or _shared_bytes(device) >= SHARED else LARGE._replace(stages=3)


@cache
def _shared_bytes(device: torch.device) -> int:
    """The shared memory that a program may take; 0 where torch does not tell."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def multiplies(*tensors: Tensor) -> bool:
    """True if the kernels can multiply these tensors [count, rows, columns], on this device."""
    if tensors[0].is_cuda and not _has_tf32(tensors[0].device):
        return False
    if tensors[0].dim() == 3 and tensors[0].shape[1] * tensors[-1].shape[-1] >= 1 << 31:  # of a product, its elements
        return False
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 and x.dim() == 3 and _spans(x) < 1 << 31
        for x in tensors
    )


@cache
def _has_tf32(device: torch.device) -> bool:
    """True if this GPU has tensor cores that multiply TF32: NVIDIA's, since Ampere."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _spans(x: Tensor) -> int:
    """The elements of memory from the first to the last of a matrix: places in it are 32-bit numbers."""
    return x.shape[1] * x.stride(1) + x.shape[2] * x.stride(2)


@torch.no_grad()
def average_grams_(
    rows: Tensor | None, columns: Tensor | None, x: Tensor, *, factors: Tensor, left_out: Tensor, weight: float
) -> None:
    """See `selective.kernels.average_grams_`: one launch for each side. The host does not wait.

    Read are x, once for each tile of a result that needs it, and the lower half of the averages. Written are the
    averages: 4 bytes an element.
    """
    for average, a in ((rows, x), (columns, x.mT)):
        if average is not None:
            assert average.is_contiguous()
            _launch(average, a, a.mT, (factors, left_out.view(torch.int8), weight), SYMMETRIC=True)


@torch.no_grad()
def float32_product(
    a: Tensor, b: Tensor, *, symmetric: bool = False, upper_a: bool = False, lower_b: bool = False
) -> Tensor:
    """See `selective.kernels.float32_product`: one launch. The host does not wait."""
    out = torch.empty((len(a), a.shape[1], b.shape[2]), dtype=torch.float32, device=a.device)
    _launch(out, a, b, None, SYMMETRIC=symmetric, UPPER_A=upper_a, LOWER_B=lower_b)
    return out


def _launch(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    average: tuple[Tensor, Tensor, float] | None,
    *,
    SYMMETRIC: bool,
    UPPER_A: bool = False,
    LOWER_B: bool = False,
) -> None:
    """Launch the kernel; `average` has its factors, flags and weight, or is None for a product by itself."""
    count, rows, columns = out.shape
    tile = tiles_for(rows, columns, out.device)
    down = cdiv(rows, tile.rows)
    if SYMMETRIC:
        tiles = down * (down + 1) // 2 * (tile.rows // tile.columns)
    else:
        tiles = down * cdiv(columns, tile.columns)
    numbers = (out, out, 1.0) if average is None else average  # without an average they are not read
    with on(out.device):
        run(
            product_kernel, count * tiles, out, a, b, *numbers, rows, columns, a.shape[2], tiles,
            out.stride(0), out.stride(1), *a.stride(), *b.stride(),
            warps=tile.warps, registers=tile.registers, num_stages=tile.stages,
            SYMMETRIC=SYMMETRIC, AVERAGE=average is not None, UPPER_A=UPPER_A, LOWER_B=LOWER_B,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=PRECISION,
        )  # fmt: skip
