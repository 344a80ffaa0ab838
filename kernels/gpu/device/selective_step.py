"""The step of every element: moments, mask, decay, parameter in one pass, for any number of tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import BRACKET, DENSE, FACTS, KEYS, LARGE, MODE, NUMBERS, NUMEL, RANKS
from .elements import is_aligned, load_moved, multiplier, pointers_of, row_of, stepped, store_moments, store_param
from .rounding import INTERPRETED
from .rules import score_of
from .scores import count_scores, load_marks
from .selections import select
from .sums import sums_of_squares
from .top_k.two_passes import FIELDS, borders_of, has_one_border, list_undecided


@triton.jit
def _add_five(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def _report(partial_ptr, rows, chosen, undecided, g, u, masked):
    """Store one program's partial statistics, float32, in a table of columns. A later kernel adds the undecided."""
    masked = tl.where(undecided, 0.0, masked * masked)
    count = chosen.to(tl.float32)
    if INTERPRETED:  # one element after the other there
        selected, update_sq, grad_sq = tl.sum(count), tl.sum(u * u), tl.sum(g * g)
        update_grad, masked_sq = tl.sum(u * g), tl.sum(masked)
    else:  # five sums in one reduction share its barriers
        five = (count, u * u, g * g, u * g, masked)
        selected, update_sq, grad_sq, update_grad, masked_sq = tl.reduce(five, 0, _add_five)
    tl.store(partial_ptr, selected)
    tl.store(partial_ptr + rows, update_sq)
    tl.store(partial_ptr + 2 * rows, grad_sq)
    tl.store(partial_ptr + 3 * rows, update_grad)
    tl.store(partial_ptr + 4 * rows, masked_sq)


@triton.jit
def _block(
    start, offs, mask, pointers, row, ranks, facts, keys, marks_ptr, histogram_ptr, partial_ptr, rows,
    FUNCTION: tl.constexpr, FAST: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Step one block. FAST promises that it is whole and aligned, and of a tensor that `CFG` has a short way for."""
    p, g, u, m, previous, x, y, z = load_moved(pointers, offs, mask, row, CFG.writes and CFG.rule != "given", FAST, CFG)
    if CFG.marked:
        chosen, undecided = load_marks(marks_ptr, CFG), offs < 0
    elif CFG.pending:
        score = score_of(g, u, m, row, CFG)
        border, low, last = borders_of(start, ranks, CFG.block, FAST)
        if not FAST:
            score = tl.where(mask, score, float("nan"))
        chosen = score > border
        undecided = (score >= low) & (chosen == 0)
        if not FAST:
            dense = offs * 0 + tl.load(ranks + MODE) == DENSE
            chosen = chosen | ((score == border) & (offs <= last)) | dense
        multiples = multiplier(chosen, u, g, row, CFG)  # so that one number of each element is kept, and not two bits
    else:
        chosen, undecided, key = select(offs, g, u, m, previous, row, ranks, facts, keys, FUNCTION,
                                        CFG.bracketed and FAST, CFG)  # fmt: skip
    if CFG.sums or (CFG.writes and not CFG.recomputed):
        store_moments(pointers, offs, x, y, z, mask, FAST, CFG)  # early: frees their registers
    if not FAST:
        undecided = undecided & mask
    if CFG.bracketed:
        selected_ptr = marks_ptr + rows * (CFG.block // 32)
        count_scores(chosen & mask, undecided, key, ranks, marks_ptr, selected_ptr, histogram_ptr, CFG)
    if CFG.sums:
        selected_sq, rest_sq = sums_of_squares(chosen, mask & (undecided == 0), g, u, m, CFG)
        tl.store(partial_ptr, selected_sq)
        tl.store(partial_ptr + rows, rest_sq)
    if not CFG.pending:
        multiples = multiplier(chosen, u, g, row, CFG)
    else:
        origin = p
        if CFG.rule == "given":
            origin = y
        list_undecided(undecided, histogram_ptr, score, offs, u, g, origin, ranks, BINS // FIELDS)
    if CFG.statistics:
        gradient, update = g, u
        if not FAST:
            gradient, update = tl.where(mask, g, 0.0), tl.where(mask, u, 0.0)
        _report(partial_ptr, rows, chosen & mask, undecided, gradient, update, multiples * update)
    if CFG.writes:
        new = stepped(p, y, g, u, multiples, row, CFG)
        if CFG.bracketed:  # stays as it was until it is decided: rounded once, then
            if CFG.rule == "given":
                p = y
            new = tl.where(undecided, p, new)
        store_param(pointers, offs, new, mask, keys, FAST, CFG)


@triton.jit
def selective_step_kernel(
    marks_ptr, histograms_ptr, partials_ptr,
    chunks_ptr, pointers_ptr, numbers_ptr, ranks_ptr, facts_ptr, keys_ptr, rows,
    FUNCTION: tl.constexpr, BINS: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """Step one block of `CFG.block` elements of one tensor a program: `chunks_ptr` has its tensor and its place in it.

        moments <- rule(g);  u <- rule(moments);  mask <- where(selected, a, b);  p <- factor p - mask u

    Reads p, g and the rule's state once, writes p and the state that moves once: AdamW in float32 reads 16 and writes
    12 bytes an element. Besides, each program reads its row of each table, a few hundred bytes. `CFG.bracketed` adds
    one bit an element (marks) and an atomic addition for each of the few scores inside of the bracket; `CFG.statistics`
    adds 20 bytes a program. Arithmetic is float32, with one rounding at each store. In place: every element is read and
    written by the one program that owns it; a given update may lie in the parameter's memory.

    With `CFG.recomputed` the moments have moved already: AdamW reads 12 bytes an element (p, m, v; 16 with g, where the
    decay, the mask or statistics need it) and writes 4. With `CFG.marked` it reads a bit an element, which says if it
    is selected, in the place of what the selection looks at.

    Without `CFG.writes` it looks and changes nothing: AdamW reads 12 bytes an element. With `CFG.sums` it also stores
    the moments and a second bit an element, behind the bits of all undecided ones, that says if the element is above
    the bracket: it writes 8.25 bytes an element, and 8 a program with the sums over what is decided.

    With `CFG.pending` the few elements in a tensor's bracket are written as if they were not selected, and appended to
    its list, 20 bytes and an atomic each. `histograms_ptr` has the lists then, BINS numbers a tensor.

    Whole blocks of tensors whose addresses are all multiples of 16 take vector loads, the others masked loads; if
    `CFG.bracketed`, tensors without a bracket take masked loads as well, and if `CFG.pending`, dense ones do.
    """
    BLOCK: tl.constexpr = CFG.block
    program = tl.program_id(0)
    t, chunk = tl.load(chunks_ptr + 2 * program), tl.load(chunks_ptr + 2 * program + 1)
    pointers, row = pointers_of(pointers_ptr, t), row_of(numbers_ptr, t, NUMBERS)
    ranks, facts, keys = row_of(ranks_ptr, t, RANKS), row_of(facts_ptr, t, FACTS), row_of(keys_ptr, t, KEYS)
    start, numel = chunk.to(tl.int64) * BLOCK, tl.load(facts + NUMEL)
    marks, partial = marks_ptr + program.to(tl.int64) * (BLOCK // 32), partials_ptr + program
    histogram = histograms_ptr + tl.load(facts + LARGE) * BINS
    offs = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    fast = (start + BLOCK <= numel) & is_aligned(pointers)
    if CFG.bracketed:
        fast = fast & (tl.load(ranks + MODE) == BRACKET)
    if CFG.pending:
        fast = fast & has_one_border(ranks, start, BLOCK)
    if fast:
        _block(start, offs, offs >= 0, pointers, row, ranks, facts, keys, marks, histogram, partial, rows,
               FUNCTION, True, BINS, CFG)  # fmt: skip
    else:
        _block(start, offs, offs < numel, pointers, row, ranks, facts, keys, marks, histogram, partial, rows,
               FUNCTION, False, BINS, CFG)  # fmt: skip
