"""The step of every element: moments, mask, decay, parameter in one pass, for any number of tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import CHUNK_AT, FACTS, KEYS, LARGE, NUMBERS, NUMEL, PARTIALS, RANKS
from .elements import (
    is_aligned,
    load_moved,
    multiplier,
    pointers_of,
    row_of,
    select,
    stepped,
    store_moments,
    store_param,
)
from .top_k import count_scores


@triton.jit
def _report(partial_ptr, chosen, undecided, g, u, masked, inside):
    """One program's row of partial statistics, float32. What is undecided is counted by a later kernel."""
    tl.store(partial_ptr + 0, tl.sum((chosen & inside).to(tl.float32)))
    tl.store(partial_ptr + 1, tl.sum(u * u))
    tl.store(partial_ptr + 2, tl.sum(g * g))
    tl.store(partial_ptr + 3, tl.sum(u * g))
    tl.store(partial_ptr + 4, tl.sum(tl.where(undecided, 0.0, masked * masked)))


@triton.jit
def _block(
    offs, mask, pointers, row, ranks, facts, keys, marks_ptr, histogram_ptr, partial_ptr,
    FUNCTION: tl.constexpr, FAST: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    p, g, u, m, previous, x, y, z = load_moved(pointers, offs, mask, row, CFG.writes and CFG.rule != "given", FAST, CFG)
    chosen, undecided, key = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION, CFG)
    if not FAST:
        undecided = undecided & mask
    if CFG.bracketed:
        count_scores(chosen & mask, undecided, key, ranks, marks_ptr, histogram_ptr, BINS, CFG)
    if CFG.writes:
        multiples = multiplier(chosen, u, g, row, CFG)
        new = stepped(p, y, u, multiples, row, CFG)
        if CFG.bracketed:  # stays as it was until it is decided: rounded once, then
            new = tl.where(undecided, p, new)
        store_moments(pointers, offs, x, y, z, mask, FAST, CFG)
        store_param(pointers, offs, new, mask, keys, FAST, CFG)
        if CFG.statistics:
            if not FAST:
                g, u = tl.where(mask, g, 0.0), tl.where(mask, u, 0.0)
            _report(partial_ptr, chosen, undecided, g, u, multiples * u, mask)


@triton.jit
def step_chunk(
    t, chunk, marks_ptr, histograms_ptr, partials_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """One block of `CFG.block` elements of tensor `t`: vector loads where it is complete and aligned, else masked."""
    BLOCK: tl.constexpr = CFG.block
    pointers, row = pointers_of(pointers_ptr, t), row_of(numbers_ptr, t, NUMBERS)
    ranks, facts, keys = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS), row_of(keys_ptr, t, KEYS)
    start = chunk.to(tl.int64) * BLOCK
    numel, at = tl.load(facts + NUMEL), tl.load(facts + CHUNK_AT) + chunk
    marks, partial = marks_ptr + at * (BLOCK // 32), partials_ptr + at * PARTIALS
    histogram = histograms_ptr + tl.load(facts + LARGE) * BINS
    offs = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    if (start + BLOCK <= numel) & is_aligned(pointers):
        _block(offs, offs >= 0, pointers, row, ranks, facts, keys, marks, histogram, partial,
               FUNCTION, True, BINS, CFG)  # fmt: skip
    else:
        _block(offs, offs < numel, pointers, row, ranks, facts, keys, marks, histogram, partial,
               FUNCTION, False, BINS, CFG)  # fmt: skip


@triton.jit
def selective_step_kernel(
    marks_ptr, histograms_ptr, partials_ptr,
    chunks_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr,
    FUNCTION: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """One block of `CFG.block` elements of one tensor a program; `chunks_ptr` says which.

        moments <- rule(g);  u <- rule(moments);  mask <- where(selected, above, below);  p <- factor p - mask u

    Reads p, g and the rule's state once, writes p and the state that moves once: AdamW in float32 reads 16 and writes
    12 bytes an element. Besides, a few hundred bytes a program: its row of each table. `CFG.bracketed` adds one bit an
    element (marks) and an atomic addition for each of the few scores inside of the bracket; `CFG.statistics` 20 bytes
    a program. Arithmetic in float32, one rounding at each store. In place: every element is read and written by the
    one program that owns it; a given update may lie in the parameter's memory.
    """
    program = tl.program_id(0)
    t, chunk = tl.load(chunks_ptr + 2 * program), tl.load(chunks_ptr + 2 * program + 1)
    step_chunk(t, chunk, marks_ptr, histograms_ptr, partials_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr,
               keys_ptr, FUNCTION, BINS, CFG)  # fmt: skip
