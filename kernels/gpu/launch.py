"""The launches of a step: a fixed number, in one order, for any number of tensors. Never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import batch as sizes
from .batch import Batch
from .config import PARTIALS, SUM_COLUMNS, Config
from .numbers import numbers_kernel
from .repair import repair_kernel
from .selective_step import selective_step_kernel
from .settle import TINY, find_kernel, settle_kernel, ties_kernel
from .statistics import report_kernel, seen_kernel, strengths_kernel, sums_kernel
from .tables import cdiv, power_of_two
from .top_k import DIGIT, rank_kernel, sample_kernel

BINS = 2048  # parts of a bracket's histogram
RANK_BLOCK = 4096  # scores that a ranking program looks at at a time
REPAIR_BLOCK = 2048
WIDTH = 4.0  # half the bracket, in standard deviations of the sampled rank


def _nothing(*arguments: Any) -> bool:
    raise AssertionError("no selection is a function here")


def run(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """One launch. No contraction to fused multiply-adds: it would depend on the kernel that a score is formed in."""
    if programs > 0:
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False, **constants)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


class Step:
    """One step of one batch: the memory that its launches share, and the launches."""

    def __init__(self, batch: Batch, function: Callable[..., Any] | None, clock: Tensor | None) -> None:
        self.batch, self.cfg, self.tables = batch, batch.cfg, batch.tables
        self.function: Any = _nothing if function is None else function
        self.clock = self.tables.clock if clock is None else clock
        self.fixed = self.cfg.strength == "fixed"
        # where nothing is undecided, one pass can do all: the rule has to be one whose update can be formed again from
        # the state that it has stored, exactly
        whole = all(d == tl.float32 for d in (self.cfg.param, self.cfg.first, self.cfg.second))
        bracketed = batch.top_k is not None and batch.top_k.bracketed is not None
        self.one_pass = bracketed and self.fixed and self.cfg.rule == "adam" and whole and not self.cfg.coupled
        self.bracketed = bracketed
        self.nothing = torch.empty(0, dtype=torch.int32, device=batch.device)
        self.partials = self.settled = self.tied = self.repaired = self.nothing

    def empty(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.batch.device)

    def __call__(self) -> Tensor | None:
        """Everything; the sums of `spec.Sums` by tensor, float64 [tensors, 7], where statistics are wanted."""
        cfg = self.cfg
        if cfg.statistics:
            self.partials = self.empty(self.batch.programs * PARTIALS.value)
        self.find_thresholds()
        if not self.fixed:
            self._sum()
        if self.one_pass:
            self._count_and_settle(replace(cfg, bracketed=True))
        else:
            self._pass(cfg, self.nothing, self.nothing)
        return self._report() if cfg.statistics else None

    def find_thresholds(self) -> None:
        """All that comes before the moments move, but the strengths: afterwards it is known what is selected.

        Except where one pass does all: there, only the brackets are known.
        """
        batch, tables = self.batch, self.tables
        run(numbers_kernel, cdiv(tables.tensors, 128), tables.numbers, tables.keys, tables.hyper, self.clock,
            tables.pointers, tables.facts, tables.ranks, tables.tensors, FIXED=self.fixed, CFG=self.cfg,
            BLOCK=128)  # fmt: skip
        if batch.seen_work is not None:
            run(seen_kernel, batch.seen_work.shape[0], tables.ranks, batch.seen_work, tables.pointers, tables.facts,
                BLOCK=sizes.SEEN_BLOCK, PARTS=sizes.SEEN_PARTS, CFG=self.cfg)  # fmt: skip
        if batch.top_k is not None:
            self._rank()
        if self.bracketed and not self.one_pass:
            self._count_and_settle(replace(self.cfg, bracketed=True, writes=False, statistics=False))

    def _pass(self, cfg: Config, marks: Tensor, histograms: Tensor) -> None:
        batch, tables = self.batch, self.tables
        run(selective_step_kernel, batch.programs, marks, histograms, self.partials, batch.chunks, tables.pointers,
            tables.numbers, tables.ranks, tables.facts, tables.keys, FUNCTION=self.function, BINS=BINS,
            CFG=cfg)  # fmt: skip

    def _rank(self) -> None:
        top_k, tables = self.batch.top_k, self.tables
        assert top_k is not None
        samples = self.empty(top_k.total_samples, torch.int32)
        cfg = replace(self.cfg, bracketed=False, writes=False, statistics=False)
        run(sample_kernel, top_k.sample_work.shape[0], samples, top_k.sample_work, tables.pointers, tables.numbers,
            tables.facts, tables.keys, CFG=cfg, BLOCK=sizes.SAMPLE_BLOCK)  # fmt: skip
        run(rank_kernel, top_k.ranked.shape[0], tables.ranks, samples, tables.facts, top_k.ranked, WIDTH,
            SAMPLED=top_k.bracketed is None, BLOCK=RANK_BLOCK, warps=8)  # fmt: skip

    def _count_and_settle(self, cfg: Config) -> None:
        """The pass over everything, then the undecided elements. Without `cfg.writes` only thresholds are found."""
        batch, tables, top_k = self.batch, self.tables, self.batch.top_k
        assert top_k is not None
        assert top_k.bracketed is not None
        zeros = torch.zeros(2 + tables.tensors + 6 * DIGIT.value + tables.tensors * BINS, dtype=torch.int32,
                            device=batch.device)  # fmt: skip
        at = 2 + tables.tensors
        broken, meeting = zeros[: at - 1], zeros[at - 1 : at]
        exact, histograms = zeros[at : at + 6 * DIGIT.value], zeros[at + 6 * DIGIT.value :]
        marks = self.empty(batch.programs * (cfg.block // 32), torch.int32)
        tiny = self.empty(tables.tensors * 2 * TINY, torch.int32)
        if cfg.statistics:
            self.settled = self.empty(top_k.settle_work.shape[0] * PARTIALS.value)
            self.tied = torch.zeros(tables.tensors * PARTIALS.value, dtype=torch.float32, device=batch.device)
        self._pass(cfg, marks, histograms)
        again = replace(cfg, recomputed=cfg.writes)
        count = top_k.bracketed.shape[0]
        run(find_kernel, count, tables.ranks, histograms, broken, top_k.bracketed, BINS=BINS)
        run(settle_kernel, top_k.settle_work.shape[0], self.settled, tiny, marks, top_k.settle_work, tables.pointers,
            tables.numbers, tables.ranks, tables.facts, TINY=TINY, BINS=BINS, WIDE=sizes.SETTLE_WIDE, CFG=again,
            warps=8)  # fmt: skip
        run(ties_kernel, count, self.tied, tiny, broken, top_k.bracketed, tables.pointers, tables.numbers,
            tables.ranks, TINY=TINY, BINS=BINS, CFG=again)  # fmt: skip
        self._repair(again, broken, meeting, exact)

    def _repair(self, cfg: Config, broken: Tensor, meeting: Tensor, histograms: Tensor) -> None:
        programs = 1
        if self.batch.device.type == "cuda":
            programs = torch.cuda.get_device_properties(self.batch.device).multi_processor_count
        if cfg.statistics:
            self.repaired = self.empty(self.tables.tensors * programs * 2)
        self.repairers = programs
        equals = self.empty(programs, torch.int64)
        tables = self.tables
        run(repair_kernel, programs, self.repaired, broken, meeting, histograms, equals, tables.pointers,
            tables.numbers, tables.ranks, tables.facts, programs, BINS=BINS, PROGRAMS=power_of_two(programs),
            BLOCK=REPAIR_BLOCK, CFG=cfg, warps=8)  # fmt: skip

    def _sum(self) -> None:
        batch, tables = self.batch, self.tables
        assert batch.sum_work is not None
        sums = self.empty(batch.sum_work.shape[0] * SUM_COLUMNS.value)
        cfg = replace(self.cfg, writes=False, statistics=False)
        run(sums_kernel, batch.sum_work.shape[0], tables.ranks, sums, batch.sum_work, tables.pointers, tables.numbers,
            tables.facts, tables.keys, FUNCTION=self.function, CFG=cfg, BLOCK=sizes.SUM_BLOCK)  # fmt: skip
        run(strengths_kernel, tables.tensors, tables.numbers, sums, tables.hyper, tables.pointers, tables.ranks,
            tables.facts, CFG=cfg, BLOCK=512)  # fmt: skip

    def _report(self) -> Tensor:
        tables, cfg = self.tables, replace(self.cfg, bracketed=self.one_pass)
        out = torch.empty(tables.tensors, 7, dtype=torch.float64, device=self.batch.device)
        run(report_kernel, tables.tensors, out, self.partials, self.settled, self.tied, self.repaired, tables.numbers,
            tables.hyper, tables.ranks, tables.facts, getattr(self, "repairers", 1), FIXED=self.fixed, CFG=cfg,
            BLOCK=512)  # fmt: skip
        return out
