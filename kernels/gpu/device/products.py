"""Products of float32 matrices on tensor cores, as exact as float32: whole ones, and symmetric ones by half.

Note [three products]: a tensor core multiplies numbers of 11 bits (TF32). A float32 number is the sum of two of them,
big and small, up to a rest of 2^-24 of it. `tl.dot(..., input_precision="tf32x3")` adds up big * big, big * small and
small * big. The products are exact. The sums are not: a tensor core rounds them towards zero, so that all errors of a
sum of squares have one sign, and grow with the number of terms, and not with its root. Three products over 2,048 terms
in one sum gave an orthogonal Q an error of 5e-4 in Q^T Q, where float32 has 3e-5. Therefore only `DEPTH` terms are
added up in a tensor core. These sums are added to each other in float32, which rounds to the nearest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_tile(number):
    """Row and column of tile `number` of a lower triangle: (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)  # the root may be off by its last bit
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def product_kernel(
    out_ptr, a_ptr, b_ptr, factors_ptr, left_out_ptr, weight, rows, columns, inner, tiles,
    out_batch, out_row, a_batch, a_row, a_inner, b_batch, b_inner, b_column,
    SYMMETRIC: tl.constexpr, AVERAGE: tl.constexpr, UPPER_A: tl.constexpr, LOWER_B: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out <- A B, or with AVERAGE out <- factor out + weight A B, for each matrix of a stack; float32 in memory.

    A program computes a tile of one matrix, ROWS x COLUMNS. With SYMMETRIC, the product is known to be symmetric, and
    ROWS is a multiple of COLUMNS: tiles above the diagonal are not computed. Each element below it is written a second
    time, transposed. Of `out` only the lower half is read then, and the result is symmetric to the bit.

    With AVERAGE, `factors_ptr` has a float32 for each matrix, and `left_out_ptr` a byte: where it is not 0, A and B
    are not read, and the product counts as zeros. A NaN or an infinity there does no harm.

    With UPPER_A, A is upper triangular, and with LOWER_B, B is lower triangular: terms that are 0 for all of a tile are
    left out.

    Reads, for a tile, 4 * (ROWS + COLUMNS) bytes for each of the `inner` terms, and with AVERAGE 4 bytes for each
    element. Writes 4 bytes for each element of the result. Multiplies and adds ROWS * COLUMNS times for each term,
    three times with "tf32x3". `tiles` are those of a matrix. `a_row`, `b_column`, ... are strides, in elements; a row
    of `out` is contiguous.
    """
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    tile = program % tiles
    if SYMMETRIC:
        wide: tl.constexpr = ROWS // COLUMNS  # tiles beside each other in a square of the lower triangle
        row, square = lower_tile(tile // wide)
        column = square * wide + tile % wide
    else:
        across = tl.cdiv(columns, COLUMNS)
        row, column = tile // across, tile % across
    r, c = row * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS)
    first = 0
    if UPPER_A:
        first = row * ROWS
    elif LOWER_B:
        first = column * COLUMNS
    k = first + tl.arange(0, DEPTH)
    terms = tl.where(column * COLUMNS < columns, inner, 0)
    if AVERAGE:
        terms = tl.where(tl.load(left_out_ptr + matrix) != 0, 0, terms)
    a_ptrs = a_ptr + matrix * a_batch + r[:, None] * a_row + k[None, :] * a_inner
    b_ptrs = b_ptr + matrix * b_batch + k[:, None] * b_inner + c[None, :] * b_column
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, terms - first, DEPTH):
        here = k < terms - start
        a = tl.load(a_ptrs, mask=(r < rows)[:, None] & here[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=here[:, None] & (c < columns)[None, :], other=0.0)
        sums += tl.dot(a, b, input_precision=PRECISION)
        a_ptrs += DEPTH * a_inner
        b_ptrs += DEPTH * b_inner
    out_ptr += matrix * out_batch
    ptrs = out_ptr + r[:, None] * out_row + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    if SYMMETRIC:
        inside = inside & (r[:, None] >= c[None, :])
    if AVERAGE:
        old = tl.load(ptrs, mask=inside, other=0.0)
        sums = tl.fma(sums, weight, tl.load(factors_ptr + matrix) * old)
    tl.store(ptrs, sums, mask=inside)
    if SYMMETRIC:
        below = (r < rows)[None, :] & (c[:, None] < r[None, :])
        tl.store(out_ptr + c[:, None] * out_row + r[None, :], tl.trans(sums), mask=below)
