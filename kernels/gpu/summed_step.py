"""The step where a strength needs sums over the whole tensor: both passes in one launch, ordered for the L2 cache.

The sums read gradient and moments, and the step reads them again. In two launches, that is 8 bytes an element more for
AdamW in float32. Here a tensor's sums are directly followed by its step, which goes through the tensor backwards: what
was read last is still in the cache, all of it where the tensor is small enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import CHUNKS, FACTS, KEYS, NUMBERS, NUMEL, RANKS, SUM_AT, SUM_COLUMNS, SUMS
from .elements import is_aligned, load_moved, pointers_of, row_of, select
from .selective_step import step_chunk
from .statistics import store_sums, terms
from .strengths import strengthen


@triton.jit
def _sums_of(
    start, end, pointers, row, ranks, facts, keys, FUNCTION: tl.constexpr, FAST: tl.constexpr, PARTS: tl.constexpr,
    CFG: tl.constexpr,
):  # fmt: skip
    """The terms of PARTS blocks, added up element by element."""
    BLOCK: tl.constexpr = CFG.block
    first, second = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    third = tl.zeros([BLOCK], tl.float32)
    for i in range(PARTS):
        offs = tl.multiple_of(start + i * BLOCK, BLOCK) + tl.arange(0, BLOCK)
        mask = offs < end
        _, g, u, m, previous, _, _, _ = load_moved(pointers, offs, mask, row, False, FAST, CFG)
        chosen, _, _ = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, CFG)
        one, two, three = terms(chosen, g, u, m, mask, CFG)
        first += one
        second += two
        third += three
    return first, second, third


@triton.jit
def _sum_part(
    t, part, sums_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, PARTS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """One program's row of sums of tensor `t`."""
    BLOCK: tl.constexpr = CFG.block
    facts, row, keys = row_of(facts_ptr, t, FACTS), row_of(numbers_ptr, t, NUMBERS), row_of(keys_ptr, t, KEYS)
    ranks, pointers = row_of(ranks_ptr, t, RANKS), pointers_of(pointers_ptr, t)
    start, numel = part.to(tl.int64) * (PARTS * BLOCK), tl.load(facts + NUMEL)
    out = sums_ptr + (tl.load(facts + SUM_AT) + part) * SUM_COLUMNS
    if (start + PARTS * BLOCK <= numel) & is_aligned(pointers):
        first, second, third = _sums_of(start, numel, pointers, row, ranks, facts, keys, FUNCTION, True, PARTS, CFG)
        store_sums(out, first, second, third, CFG)
    else:
        first, second, third = _sums_of(start, numel, pointers, row, ranks, facts, keys, FUNCTION, False, PARTS, CFG)
        store_sums(out, first, second, third, CFG)


@triton.jit
def summed_step_kernel(
    partials_ptr, sums_ptr, ticket_ptr, arrived_ptr, ready_ptr,
    work_ptr, pointers_ptr, numbers_ptr, hyper_ptr, ranks_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, CFG: tl.constexpr, SUMS_CFG: tl.constexpr,
):  # fmt: skip
    """`work_ptr` lists sums (of PARTS blocks; the tensor as -1 - t) and steps (of STEPS), sums of a tensor first.

    Programs take their work in the order in which they begin, so that whoever waits for a tensor's sums waits for
    programs that have begun; the last of those makes the strengths. Reads what `selective_step_kernel` does, and before
    that what the sums are made of (agreement and mean, or norm of the momentum: gradient and first moment), as far as
    it is not in the cache any more. `ticket_ptr`, `arrived_ptr` and `ready_ptr` are zero before.
    """
    program = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    t, part = tl.load(work_ptr + 2 * program), tl.load(work_ptr + 2 * program + 1)
    if t < 0:
        t = -1 - t
        _sum_part(t, part, sums_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr, FUNCTION, PARTS,
                  SUMS_CFG)  # fmt: skip
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + t, 1, sem="acq_rel")
        if before + 1 == tl.load(row_of(facts_ptr, t, FACTS) + SUMS):
            strengthen(t, numbers_ptr, sums_ptr, hyper_ptr, pointers_ptr, ranks_ptr, facts_ptr, 512, SUMS_CFG)
            tl.debug_barrier()
            tl.atomic_xchg(ready_ptr + t, 1, sem="release")
    else:
        while tl.atomic_add(ready_ptr + t, 0, sem="acquire") == 0:
            pass
        tl.debug_barrier()
        chunks = tl.load(row_of(facts_ptr, t, FACTS) + CHUNKS)
        for i in range(STEPS):
            chunk = part * STEPS + STEPS - 1 - i
            if chunk < chunks:
                step_chunk(t, chunk, partials_ptr, partials_ptr, partials_ptr, pointers_ptr, numbers_ptr, ranks_ptr,
                           facts_ptr, keys_ptr, FUNCTION, 1, CFG)  # fmt: skip
