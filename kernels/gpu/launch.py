"""The launches of a step: a fixed number, in one order, for any number of tensors. The host never waits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import batch as sizes
from . import control as controls
from .batch import Batch
from .configure import forms_update_again
from .device.config import CONTROL_COLUMNS, PARTIALS, SUM_COLUMNS, Config, derived
from .device.control import control_kernel
from .device.limit import limit_kernel
from .device.numbers import numbers_kernel
from .device.scores import DIGIT
from .device.selective_step import selective_step_kernel
from .device.strengths import ranked_strengths_kernel, strengths_kernel
from .device.sums import report_kernel, seen_kernel, sums_kernel
from .device.top_k.bracket import SLOTS, bracket_kernel, digits_kernel, sample_kernel, spread_kernel
from .device.top_k.repair import repair_kernel
from .device.top_k.settle import TINY, find_kernel, settle_kernel, ties_kernel
from .device.top_k.small import whole_kernel
from .device.top_k.two_passes import FIELDS, count_kernel, finish_kernel, narrow_kernel
from .direct import DirectLaunches, are_possible
from .tables import cdiv, power_of_two

STEP_WARPS = 4  # of a program of `BLOCK` elements
# Registers of a thread in passes with brackets or statistics, which would take up to 140: seven programs on a
# multiprocessor instead of four or five, for some spilling. docs/internals/gpu-kernels.md has the measurements.
STEP_REGISTERS = 72
MOVE_REGISTERS = None  # of a thread that forms sums and stores moments
# The same of a thread that ranks besides, and of a thread of the step after either of these two.
RANK_AND_MOVE_REGISTERS, MOVED_REGISTERS = 64, None
COUNT_WARPS, COUNT_REGISTERS = 4, None  # of a program that counts scores and writes nothing
# The same of the step after it, without statistics. Of 16 bits 8 or 16 elements of a thread are less than of float32.
PENDING_WARPS, PENDING_REGISTERS = 4, 72
BINS = 2048  # of a bracket's histogram: see `bin_of`
WHOLE_BLOCK = 4096  # scores that are looked at together by the program that ranks a small tensor
SETTLE_ROOM, SETTLE_BLOCK = (
    1024,
    128,
)  # undecided elements whose indices a settling program stores, and works on, together
REPAIR_BLOCK = 1024  # of 4 warps
# Rows of sums that one program adds up together: the largest tensor has tens of thousands, and all others wait for it.
TABLE_BLOCK, TABLE_WARPS = 4096, 16
REPAIR_PROGRAMS = 2  # on each multiprocessor: as many as fit with any number of registers a thread (255 at most)
# Programs that wait for each other have to run at the same time: the driver refuses a cooperative launch that can't.
TOGETHER: dict[str, dict[str, Any]] = {"cuda": {"launch_cooperative_grid": True}, "cpu": {}}
WIDTH = 3.75  # half the bracket, in standard deviations of the sampled rank


DIRECT = DirectLaunches(are_possible())


def _nothing(*arguments: Any) -> bool:
    raise AssertionError("no selection is a function here")


def run(
    kernel: Any, programs: int, *arguments: Any, warps: int = 4, registers: int | None = None, **constants: Any
) -> None:
    """Launch a kernel, without contraction to fused multiply-adds: that would differ between kernels that form scores.

    `registers` limits those of a thread, if the compiler knows such a limit (NVIDIA's does).
    """
    if programs <= 0:
        return
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if registers is not None and torch.version.cuda is not None:
        options["maxnreg"] = registers
    DIRECT.launch(kernel, programs, arguments, options, constants)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context for launches: it makes the tensors' device the current one."""
    if DIRECT.enabled:
        DIRECT.look_at_settings()
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def _can_settle(cfg: Config) -> bool:
    """True if elements that a pass leaves undecided can be stepped after it, which takes exactly the same update.

    Adam's update can be formed from the stored moments, if these were not rounded. A given update is still there, if
    the pass does not write over it. Only for float32 parameters, because a miss is corrected in the stored parameter.
    """
    if cfg.decay_of == "masked":  # a coordinate that is selected after all may decay no more, and it has decayed
        return False
    return cfg.param == tl.float32 and ((forms_update_again(cfg) and not cfg.coupled) or cfg.in_place)


def _registers_of(cfg: Config) -> int | None:
    """The limit on the registers of a thread in the pass over everything; None if there is none."""
    if cfg.sums:
        return RANK_AND_MOVE_REGISTERS
    if cfg.bracketed or cfg.statistics:
        return STEP_REGISTERS
    if cfg.pending:
        return PENDING_REGISTERS
    return MOVED_REGISTERS if cfg.marked else None


class Step:
    """One step of one batch: the memory that its launches share, and the launches."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.cfg, self.tables, self.groups = batch, batch.cfg, batch.tables, batch.groups
        self.function: Any = _nothing if batch.function is None else batch.function
        self.fixed = self.cfg.strength == "fixed"
        known = self.fixed or self.cfg.share_known  # the strength is known before anything is looked at
        self.bracketed = batch.top_k is not None and batch.top_k.bracketed
        self.one_pass = self.bracketed and known and batch.control is None and _can_settle(self.cfg)
        # The step after a count leaves a few elements to a list. A step after other sums needs the very threshold.
        waits = self.bracketed and known and not self.one_pass and batch.control is None
        self.pending = waits and self.cfg.writes
        # A control of an exact top-K draws in the pass that counts the scores, which then has the control's blocks.
        control = batch.control
        self.ranked = self.bracketed and self.fixed and control is not None and control.ranks_and_draws
        # The count of an exact top-K stores moments, and adds up the sums of the strength.
        self.sums_while_counting = self.bracketed and batch.moves
        self.nothing = torch.empty(0, dtype=torch.int32, device=batch.device)
        self.drawn: list[Tensor] = []  # the sums, indices and squares of a control
        self.marks = self.partials = self.settled = self.tied = self.repaired = self.nothing
        self.repairers = 1  # programs that repair
        self.nbytes = 0  # of the memory that was asked for

    def empty(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.nbytes += count * dtype.itemsize
        return torch.empty(count, dtype=dtype, device=self.batch.device)

    def zeros(self, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.empty(count, dtype).zero_()

    def __call__(self) -> Tensor | None:
        """Step the batch. Returns the sums of `spec.Sums`, float64 [tensors, 7], if statistics are asked for."""
        cfg, batch = self.cfg, self.batch
        if cfg.statistics:
            self.partials = self.empty(batch.programs * PARTIALS)
        self.find_thresholds()
        if batch.sum_work is not None and self._has_sums_of_its_own():
            self._sum(batch.sum_work)
        if batch.control is not None:
            self._pass(self._draw(batch.control), self.nothing, self.nothing)
        elif batch.moves:
            self._pass(derived(cfg, recomputed=True, marked=True), self.marks, self.nothing)
        elif self.one_pass:
            self._count_and_settle(derived(cfg, bracketed=True))
        elif self.pending:
            self._step_and_finish(derived(cfg, pending=True))
        else:
            self._pass(cfg, self.nothing, self.nothing)
        return self._report() if cfg.statistics else None

    def find_thresholds(self) -> None:
        """Launch all that finds the thresholds; of one pass, the brackets; of two, brackets that hold very few scores.

        Nothing has moved afterwards. But where the sums of the strength are formed in the same pass the moments have,
        and the strengths are known.
        """
        self.begin()
        if self.batch.top_k is not None:
            self._rank()
        if self.pending:
            self._count()
        elif self.bracketed and not self.one_pass:
            counts = derived(self.cfg, bracketed=True, writes=False, statistics=False, ranked=self.ranked,
                             sums=self.sums_while_counting or self.ranked)  # fmt: skip
            self._count_and_settle(counts)

    def _has_sums_of_its_own(self) -> bool:
        """True if a pass of its own forms the sums of the strength, and neither a control nor the count of a top-K."""
        in_control = self.batch.control is not None and self.cfg.estimate != "sampled"
        return not in_control and not self.sums_while_counting

    def begin(self) -> None:
        """Fill in each tensor's numbers and, if the selection reads it, whether its previous momentum is all zero."""
        batch, tables = self.batch, self.tables
        run(numbers_kernel, cdiv(tables.tensors, 128), tables.numbers, tables.keys, self.groups.hyper,
            self.groups.clocks, tables.pointers, tables.facts, tables.ranks, tables.tensors, FIXED=self.fixed,
            CFG=self.cfg, BLOCK=128)  # fmt: skip
        if batch.seen_work is not None:
            for work, parts in ((batch.peek_work, 1), (batch.seen_work, sizes.SEEN_PARTS)):
                run(seen_kernel, work.shape[0], tables.ranks, work, tables.pointers, tables.facts,
                    BLOCK=sizes.SEEN_BLOCK, PARTS=parts, CFG=self.cfg)  # fmt: skip

    def finish(self) -> None:
        """Launch the pass over everything, once thresholds and strengths are in the tables."""
        self._pass(self.cfg, self.nothing, self.nothing)

    def _pass(self, cfg: Config, marks: Tensor, histograms: Tensor, sums: Tensor | None = None) -> None:
        batch, tables = self.batch, self.tables
        partials = self.partials if sums is None else sums
        registers, warps, bins = _registers_of(cfg), STEP_WARPS, BINS
        if cfg.pending:
            warps, bins = PENDING_WARPS, FIELDS.value * TINY
        run(selective_step_kernel, batch.programs, marks, histograms, partials, batch.chunks, tables.pointers,
            tables.numbers, tables.ranks, tables.facts, tables.keys, batch.programs, FUNCTION=self.function, BINS=bins,
            CFG=cfg, warps=warps, registers=registers)  # fmt: skip

    def _rank(self) -> None:
        """Sample scores, and rank them: to thresholds (small tensors, sampled quantiles) or brackets."""
        top_k, tables = self.batch.top_k, self.tables
        assert top_k is not None
        cfg = derived(self.cfg, bracketed=False, writes=False, statistics=False, ranked=self.ranked)
        samples = self.empty(top_k.total_samples, torch.int32)
        slots = SLOTS.value
        count = 0 if top_k.large is None else top_k.large.shape[0]
        counts = self.zeros(count * (slots + 2))
        histograms, spreads = counts[: count * slots], counts[count * slots :]
        run(sample_kernel, top_k.sample_work.shape[0], samples, histograms, top_k.sample_work, tables.pointers,
            tables.numbers, tables.facts, tables.keys, SAMPLED=top_k.sampled, CFG=cfg,
            BLOCK=sizes.SAMPLE_BLOCK)  # fmt: skip
        if top_k.whole is not None:
            run(whole_kernel, top_k.whole.shape[0], tables.ranks, samples, tables.facts, top_k.whole,
                tables.numbers, self.groups.hyper, CFG=cfg, BLOCK=WHOLE_BLOCK)  # fmt: skip
        if top_k.large is None:
            return
        work, programs, sampled = top_k.drawn_work, top_k.drawn_work.shape[0], top_k.sampled
        if not sampled:
            run(spread_kernel, programs, spreads, samples, histograms, work, tables.ranks, tables.facts,
                BLOCK=sizes.SAMPLE_BLOCK)  # fmt: skip
        for level in (1, 2) if sampled else (1,):
            run(digits_kernel, programs, histograms, spreads, samples, work, tables.ranks, tables.facts, WIDTH,
                SAMPLED=sampled, LEVEL=level, BLOCK=sizes.SAMPLE_BLOCK)  # fmt: skip
        run(bracket_kernel, count, tables.ranks, histograms, spreads, samples, tables.facts, top_k.large, WIDTH,
            SAMPLED=sampled)  # fmt: skip

    def _count_and_settle(self, cfg: Config) -> None:
        """Launch the pass over everything, then settle the undecided. Without `cfg.writes` only find thresholds."""
        batch, tables, top_k = self.batch, self.tables, self.batch.top_k
        assert top_k is not None
        assert top_k.large is not None
        count = top_k.large.shape[0]
        zeros = self.zeros(2 + count + 6 * DIGIT.value + count * BINS)
        broken, meeting = zeros[: 1 + count], zeros[1 + count : 2 + count]
        exact, histograms = zeros[2 + count :][: 6 * DIGIT.value], zeros[2 + count + 6 * DIGIT.value :]
        words = batch.programs * (cfg.block // 32)
        marks = self.empty(2 * words if cfg.sums else words, torch.int32)
        self.marks, sums = marks[words:], self.empty(2 * batch.programs if cfg.sums and not cfg.ranked else 0)
        tiny = self.empty(count * 2 * TINY, torch.int32)
        if cfg.statistics or cfg.sums:
            self.settled = self.empty(top_k.settle_work.shape[0] * 2)
            self.tied = self.zeros(tables.tensors * 2, torch.float32)
        if cfg.ranked:
            self._look(cfg, True, True, marks, histograms)
        else:
            self._pass(cfg, marks, histograms, sums if cfg.sums else None)
        again = derived(cfg, recomputed=cfg.writes or cfg.sums)
        run(find_kernel, count, tables.ranks, histograms, broken, top_k.large, tables.facts, BINS=BINS, TINY=TINY)
        settles = top_k.settle_work.shape[0]
        todo = self.empty(settles * SETTLE_ROOM, torch.int32)
        run(settle_kernel, settles, self.settled, tiny, todo, marks, self.marks, top_k.settle_work, tables.pointers,
            tables.numbers, tables.ranks, tables.facts, TINY=TINY, BINS=BINS, WORDS=sizes.SETTLE_WORDS,
            ROOM=SETTLE_ROOM, BLOCK=SETTLE_BLOCK, CFG=again)  # fmt: skip
        run(ties_kernel, count, self.tied, tiny, broken, self.marks, top_k.large, tables.pointers, tables.numbers,
            tables.ranks, tables.facts, TINY=TINY, BINS=BINS, CFG=again)  # fmt: skip
        self._repair(again, broken, meeting, exact)
        if cfg.sums and not cfg.ranked:
            run(ranked_strengths_kernel, tables.tensors, tables.numbers, sums, self.settled, self.tied, self.repaired,
                self.groups.hyper, tables.ranks, tables.facts, self.repairers, batch.programs, BLOCK=TABLE_BLOCK,
                warps=TABLE_WARPS)  # fmt: skip

    def _count(self) -> None:
        """Launch the count of all scores, which narrows each bracket to a bin, and mends those that have missed."""
        tables, top_k = self.tables, self.batch.top_k
        assert top_k is not None
        assert top_k.large is not None
        count, cfg = top_k.large.shape[0], derived(self.cfg, writes=False, statistics=False)
        zeros = self.zeros(2 + count + 6 * DIGIT.value + count * BINS)
        broken, meeting = zeros[: 1 + count], zeros[1 + count : 2 + count]
        exact, histograms = zeros[2 + count :][: 6 * DIGIT.value], zeros[2 + count + 6 * DIGIT.value :]
        run(count_kernel, top_k.count_work.shape[0], histograms, top_k.count_work, tables.pointers, tables.numbers,
            tables.ranks, tables.facts, BINS=BINS, CFG=cfg, BLOCK=sizes.COUNT_BLOCK, warps=COUNT_WARPS,
            registers=COUNT_REGISTERS)  # fmt: skip
        run(narrow_kernel, count, tables.ranks, histograms, broken, top_k.large, tables.facts, BINS=BINS, TINY=TINY)
        self._repair(cfg, broken, meeting, exact)

    def _step_and_finish(self, cfg: Config) -> None:
        """Launch the pass over everything, which lists the elements of narrow brackets, and finish those."""
        tables, top_k = self.tables, self.batch.top_k
        assert top_k is not None
        assert top_k.large is not None
        count, fields = top_k.large.shape[0], FIELDS.value
        lists = self.empty(count * fields * TINY, torch.int32)
        if cfg.statistics:
            self.tied = self.zeros(tables.tensors * 2, torch.float32)
        self._pass(cfg, self.nothing, lists)
        run(finish_kernel, count, self.tied, lists, top_k.large, tables.pointers, tables.numbers, tables.ranks,
            tables.facts, tables.keys, TINY=TINY, CFG=cfg)  # fmt: skip

    def _repair(self, cfg: Config, broken: Tensor, meeting: Tensor, histograms: Tensor) -> None:
        programs = 1
        if self.batch.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.batch.device).multi_processor_count
            programs = REPAIR_PROGRAMS * processors
        if cfg.statistics or cfg.sums:
            self.repaired = self.empty(self.tables.tensors * programs * 2)
        self.repairers = programs
        equals = self.empty(2 * programs, torch.int64)
        tables = self.tables
        run(repair_kernel, programs, self.repaired, self.marks, broken, meeting, histograms, equals, tables.pointers,
            tables.numbers, tables.ranks, tables.facts, self.groups.hyper, programs, BINS=BINS,
            PROGRAMS=power_of_two(programs), BLOCK=REPAIR_BLOCK, CFG=cfg,
            **TOGETHER[self.batch.device.type])  # fmt: skip

    def _sum(self, work: Tensor) -> None:
        batch, tables = self.batch, self.tables
        cfg = derived(self.cfg, writes=batch.moves, statistics=False)
        sums = self.empty(work.shape[0] * SUM_COLUMNS.value)
        if batch.moves:
            self.marks = self.empty(batch.programs * (cfg.block // 32), torch.int32)
        run(sums_kernel, work.shape[0], sums, self.marks, work, tables.pointers, tables.numbers, tables.ranks,
            tables.facts, tables.keys, FUNCTION=self.function, MOVES=batch.moves, CFG=cfg, BLOCK=batch.sum_block,
            registers=MOVE_REGISTERS if batch.moves else None)  # fmt: skip
        run(strengths_kernel, tables.tensors, tables.numbers, sums, self.groups.hyper, tables.pointers, tables.ranks,
            tables.facts, CFG=cfg, BLOCK=TABLE_BLOCK, warps=TABLE_WARPS)  # fmt: skip

    def _look(self, cfg: Config, counts: bool, draws: bool, marks: Tensor, histograms: Tensor) -> None:
        """Launch a control's look at everything: at what the policy selects, at the control's coordinates, or both."""
        plan, tables = self.batch.control, self.tables
        assert plan is not None
        if not self.drawn:
            sums, indices = self.empty(plan.programs * CONTROL_COLUMNS.value), self.empty(plan.room, torch.int32)
            self.drawn = [sums, indices, self.empty(plan.room if cfg.control_norm else 0)]
        run(control_kernel, plan.programs, *self.drawn, marks, histograms, plan.work, tables.pointers, tables.numbers,
            tables.ranks, tables.facts, tables.keys, plan.table, plan.programs, controls.WIDTH, FUNCTION=self.function,
            COUNTS=counts, DRAWS=draws, MOVES=counts and plan.moves, BINS=BINS, CFG=cfg, BLOCK=controls.LOOK_BLOCK,
            registers=controls.LOOK_REGISTERS)  # fmt: skip

    def _draw(self, plan: controls.ControlPlan) -> Config:
        """Find a matched control's limit and multipliers. Returns the constants of the pass over everything."""
        tables, nothing = self.tables, self.nothing
        again = derived(self.cfg, statistics=False, recomputed=plan.moves, ranked=self.ranked)
        if not self.ranked:
            self._look(derived(self.cfg, statistics=False), True, plan.at_once, nothing, nothing)
        if not plan.at_once:
            self._look(again, False, True, nothing, nothing)
        run(limit_kernel, tables.tensors, *self.drawn, self.settled, self.tied, self.repaired, tables.numbers,
            self.groups.hyper, tables.pointers, tables.ranks, tables.facts, tables.keys, plan.table, self.repairers,
            plan.programs, CFG=again, BLOCK=controls.LIMIT_BLOCK, warps=controls.LIMIT_WARPS)  # fmt: skip
        return derived(self.cfg, recomputed=plan.moves, drawn=True)

    def _report(self) -> Tensor:
        tables, cfg = self.tables, derived(self.cfg, bracketed=self.one_pass, pending=self.pending)
        out = torch.empty(tables.tensors, 7, dtype=torch.float64, device=self.batch.device)
        run(report_kernel, tables.tensors, out, self.partials, self.settled, self.tied, self.repaired, tables.numbers,
            self.groups.hyper, tables.ranks, tables.facts, self.repairers, self.batch.programs,
            FIXED=self.fixed and not cfg.control_norm, CFG=cfg, BLOCK=TABLE_BLOCK, warps=TABLE_WARPS)  # fmt: skip
        return out
