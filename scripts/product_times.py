"""Time averages of Gram matrices, and products, on a GPU: the Triton kernel with several tiles, and torch in float32.

    python scripts/product_times.py [--count 16] [--more]

For each shape: microseconds of one call (median of 20, after the caches were overwritten), and the distance from
float64 over the norm. `--more` tries more tiles. What is best goes into `LARGE` and `SMALL` in
`kernels/gpu/products.py`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from selective.kernels import Backend, average_grams_, float32_product
from selective.kernels.gpu import products
from selective.kernels.gpu.products import Tiles

SHAPES = [(512, 512), (512, 1376), (1376, 512), (768, 2048), (2048, 768)]
SIDES = [512, 1376, 2048]
TILES = [
    Tiles(128, 64, 32, 8, 3, 128), Tiles(128, 64, 32, 8, 3), Tiles(128, 64, 32, 4, 3), Tiles(64, 64, 32, 4, 3),
    Tiles(64, 64, 32, 4, 3, 128), Tiles(128, 128, 32, 8, 3), Tiles(128, 128, 16, 8, 4),
]  # fmt: skip
MORE = [
    Tiles(rows, columns, depth, warps, stages)
    for (rows, columns), depth, warps, stages in itertools.product(
        [(64, 64), (128, 64), (128, 128)], [16, 32, 64], [4, 8], [2, 3, 4]
    )
]


def microseconds(call: Callable[[], Any], flush: Tensor) -> float:
    """The median time of a call on the device."""
    times = []
    for _ in range(25):
        flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return sorted(times[5:])[10]


def compare(title: str, call: Callable[[Backend], Tensor], wanted: Tensor, candidates: list[Tiles]) -> None:
    """Time `call`, which returns its result, by torch and by the kernel with each of the tiles, and print it."""
    flush = torch.empty(2**26, device="cuda")  # 256 MiB, more than the L2
    rows: list[tuple[float, float, str]] = []
    print(title)
    for each in [None, *candidates]:
        name, backend = (str(tuple(each)), "gpu") if each else ("torch, float32", "reference")
        products.LARGE = products.SMALL = each or candidates[0]
        try:
            error = float((call(backend).double() - wanted).norm() / wanted.norm())
            rows.append((microseconds(partial(call, backend), flush), error, name))
        except (RuntimeError, triton.TritonError) as reason:  # too much shared memory, or no such tile in this Triton
            print(f"  {name}: {type(reason).__name__} {reason}")
    for time, error, name in rows[:1] + sorted(rows[1:]):
        print(f"  {time:9.1f} us  {rows[0][0] / time:5.2f} x  error {error:.2e}  {name}", flush=True)


def average(count: int, rows: int, columns: int, side: str, candidates: list[Tiles]) -> None:
    """Compare averages of one side. The factor is 0, so that each call gives the same result."""
    x, n = torch.randn(count, rows, columns, device="cuda"), rows if side == "rows" else columns
    result, outer = torch.zeros(count, n, n, device="cuda"), (x if side == "rows" else x.mT).double()
    factors = torch.zeros(count, device="cuda")

    def call(backend: Backend) -> Tensor:
        rows_average, columns_average = (result, None) if side == "rows" else (None, result)
        average_grams_(
            rows_average, columns_average, x, factors=factors, left_out=factors > 0, weight=0.05, backend=backend
        )
        return result

    compare(f"average of {count} x {rows} x {columns}, {side}", call, 0.05 * (outer @ outer.mT), candidates)


def product(count: int, n: int, symmetric: bool, candidates: list[Tiles]) -> None:
    """Compare products of square matrices."""
    a = torch.randn(count, n, n, device="cuda")
    b = a.mT if symmetric else torch.randn_like(a)

    def call(backend: Backend) -> Tensor:
        return float32_product(a, b, symmetric=symmetric, backend=backend)

    title = f"product of {count} x {n} x {n}{', symmetric' if symmetric else ''}"
    compare(title, call, a.double() @ b.double(), candidates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="matrices in a stack")
    parser.add_argument("--more", action="store_true", help="try more tiles")
    given = parser.parse_args()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    candidates = TILES + [tile for tile in MORE if tile not in TILES] if given.more else TILES
    for (rows, columns), side in itertools.product(SHAPES, ("rows", "columns")):
        average(given.count, rows, columns, side, candidates)
    for n, symmetric in itertools.product(SIDES, (False, True)):
        product(given.count, n, symmetric, candidates)


if __name__ == "__main__":
    main()
