"""The step of shards that looks at whole tensors: a fixed number of launches between its collectives.

It does what `kernels/sharded` does one tensor after the other in plain torch, and sends the same numbers: the K-th
scores by a radix search (`top_k.py`), sums (`sums.py`), and at the end the pass over everything of any other step.
Nothing but the step counters moves before the last collective. With top-K it takes 4 bytes an element while it lasts,
32 KiB a tensor at least.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...reference.strengths import Parts, multipliers
from ...sharded.strengths import correct_first_step_sums, names_of_sums, needs_sums, sums_with_ties, waits_for_selection
from ...spec import Item, StepSpec, Sums, SumsTable
from ..device import config
from ..device.config import derived
from ..launch import Step, on, run
from ..tables import power_of_two
from . import sums as shard_sums
from . import top_k as ranking
from .plan import ShardPlan, planned

BLOCK = 1024  # elements that a program works on at a time
TABLE_BLOCK = 1024
Asking = Generator[Tensor, Tensor, Sequence[Sums] | None]
Columns = dict[str, Tensor]  # the sums of all tensors, float64 [tensors], by their names


class ShardStep:
    """One step of one plan: the memory that its launches share, and the launches."""

    def __init__(self, plan: ShardPlan, items: Sequence[Item], spec: StepSpec) -> None:
        self.plan, self.items, self.spec = plan, items, spec
        self.batch, self.tables, self.tensors = plan.batch, plan.batch.tables, len(plan.numels)
        self.looks = derived(self.batch.cfg, writes=False)
        self.ranks = self.tables.ranks
        plan.update(items, spec)
        self.step = Step(self.batch)
        self.step.begin()
        self.moving: Tensor | None = None
        if spec.keeps_previous:
            seen = self.ranks[:, config.SEEN.value]
            self.moving = seen.to(torch.float64) * self.plan.spans[:, 3]
            seen.fill_(1)  # until those of all ranks are known

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.plan.device)

    # --- the K-th score ---

    def count_first(self) -> Tensor:
        """Keep the keys, and count their highest bytes: int32, 1-d."""
        plan, tables = self.plan, self.tables
        bins = ranking.BINS.value
        self.counts = torch.zeros(4, self.tensors * bins, dtype=torch.int32, device=plan.device)
        self.keys = self.empty(plan.programs * plan.span, torch.int32)
        run(ranking.keys_kernel, plan.programs, self.keys, self.counts[0], plan.work, tables.pointers, tables.numbers,
            tables.facts, SPAN=plan.span, BLOCK=BLOCK, CFG=self.looks)  # fmt: skip
        return self._of_counted_shards(self.counts[0])

    def count_next(self, level: int, answer: Tensor) -> Tensor:
        """Take the next byte of the K-th key from everybody's counts, and count the byte after it: int32, 1-d."""
        plan = self.plan
        run(ranking.narrow_kernel, self.tensors, self.ranks, answer, FIRST=level == 1, FINAL=False)
        run(ranking.count_kernel, plan.programs, self.counts[level], self.keys, plan.work, self.ranks,
            SHIFT=24 - 8 * level, SPAN=plan.span, BLOCK=BLOCK)  # fmt: skip
        return self._of_counted_shards(self.counts[level])

    def _of_counted_shards(self, counts: Tensor) -> Tensor:
        if self.plan.counted:
            return counts
        return (counts.view(self.tensors, -1) * self.plan.spans[:, 3:].to(torch.int32)).view(-1)

    def count_ties(self, answer: Tensor) -> Tensor:
        """Take the last byte of the K-th key, and count the keys equal to it in each tensor's cell here: int32, 1-d."""
        plan = self.plan
        run(ranking.narrow_kernel, self.tensors, self.ranks, answer, FIRST=False, FINAL=True)
        self.equals = self.empty(plan.programs, torch.int32)
        run(ranking.equals_kernel, plan.programs, self.equals, self.keys, plan.work, self.ranks, SPAN=plan.span,
            BLOCK=BLOCK)  # fmt: skip
        table = torch.zeros(self.tensors * plan.cells, dtype=torch.int32, device=plan.device)
        run(ranking.cells_kernel, self.tensors, table, self.equals, plan.spans, plan.cells, BLOCK=TABLE_BLOCK)
        return table

    def cut_ties(self, answer: Tensor) -> None:
        """Find the index up to which keys that equal the K-th are selected."""
        plan = self.plan
        run(ranking.cutoff_kernel, self.tensors, self.ranks, answer, self.equals, self.keys, plan.spans, plan.cells,
            CELLS=power_of_two(plan.cells), SPAN=plan.span, BLOCK=BLOCK)  # fmt: skip

    # --- sums ---

    def sums(self) -> Tensor:
        """This rank's part of the sums, as digits: int32, 1-d."""
        plan, tables, spec = self.plan, self.tables, self.spec
        rows = self.empty(plan.programs * shard_sums.WIDTH.value, torch.float32)
        run(shard_sums.shard_sums_kernel, plan.programs, rows, plan.work, tables.pointers, tables.numbers, self.ranks,
            tables.facts, tables.keys, STATISTICS=spec.statistics, SPAN=plan.span, BLOCK=BLOCK,
            CFG=self.looks)  # fmt: skip
        out = torch.empty(self.tensors, shard_sums.TOTALS.value, dtype=torch.float64, device=plan.device)
        run(shard_sums.totals_kernel, self.tensors, out, rows, plan.spans, STATISTICS=spec.statistics,
            NORM=spec.strength.kind == "norm_preserving", BLOCK=TABLE_BLOCK)  # fmt: skip
        if self.moving is not None:
            out[:, shard_sums.NAMES.index("moving")] = self.moving
        return shard_sums.as_digits(out, plan.columns)

    def complete(self, answer: Tensor) -> Columns:
        """The sums of all ranks by their names, with those that follow from them."""
        spec = self.spec
        table = shard_sums.as_numbers(answer, self.tensors)
        sums = dict(zip(names_of_sums(spec), table.unbind(1), strict=True))
        if spec.selection.kind == "top_k" and not waits_for_selection(spec.strength):  # ties were not settled yet
            need = self.ranks[:, config.LEFT.value]
            sums["selected"] = sums["selected"] + need
            if spec.statistics:  # of the ties' squares, the share of the ties that is selected
                share = need / self.ranks[:, config.TIED.value].clamp(min=1)
                sums["selected_update_sq"] = sums["selected_update_sq"] + share * sums["tied_update_sq"]
        if spec.statistics:
            sums["rest_update_sq"] = (sums["update_sq"] - sums["selected_update_sq"]).clamp(
                min=0
            )  # rounding may be < 0
        if self.moving is not None:
            first = correct_first_step_sums(sums, self.plan.lengths.to(torch.float64))
            self.ranks[:, config.SEEN.value].copy_(~first)
        return sums

    def finish(self, sums: Columns | None) -> SumsTable | None:
        """Write the strengths to the tables, and take the pass over everything. Returns the report, if asked for."""
        known, spec, numbers = sums or {}, self.spec, self.tables.numbers
        parts = Parts(self.plan.lengths, selected=known.get("selected"), selected_sq=known.get("selected_sq"),
                      rest_sq=known.get("rest_sq"))  # fmt: skip
        wanted = spec.strength.kind != "fixed" or spec.statistics
        selected, rest = multipliers(spec.strength, parts, {}, self.plan.device) if wanted else (None, None)
        if spec.strength.kind != "fixed":
            assert selected is not None and rest is not None
            numbers[:, config.STRENGTH_SELECTED.value].copy_(selected)
            numbers[:, config.STRENGTH_REST.value].copy_(rest)
        self.step.finish()
        self.batch.stepped(self.items)
        if sums is None or not spec.statistics:
            return None
        assert selected is not None and rest is not None
        masked = selected * selected * sums["selected_update_sq"] + rest * rest * sums["rest_update_sq"]
        strengths = [x.expand(self.tensors) for x in (selected, rest)]
        table = [sums["selected"], *strengths, *(sums[n] for n in ("update_sq", "grad_sq", "update_grad")), masked]
        return SumsTable(torch.stack(table, 1), self.plan.numels)


class ShardKernels:
    """The interface for `kernels/sharded`."""

    @staticmethod
    def step(items: Sequence[Item], spec: StepSpec, cache: dict[Any, Any]) -> Asking:
        """The part of a sharded step for these items."""
        return step_shards(items, spec, cache)

    @staticmethod
    def digits(table: Tensor) -> Tensor:
        """Cut float64 numbers [rows, columns] into digits: int32, 1-d."""
        with on(table.device):
            columns = torch.arange(table.shape[1], device=table.device)
            return shard_sums.as_digits(table.contiguous(), columns)

    @staticmethod
    def number(digits: Tensor, rows: int) -> Tensor:
        """Put summed digits together again: float64 [rows, columns]."""
        with on(digits.device):
            return shard_sums.as_numbers(digits, rows)


def step_shards(items: Sequence[Item], spec: StepSpec, cache: dict[Any, Any]) -> Asking:
    """A part of a sharded step (`kernels/sharded/exchange.py`), of items that one launch can step together.

    `cache` is the same dictionary in every step of these tensors.
    """
    plan, back = cache.get("plan"), []
    if plan is None or not plan.fits(items, spec):
        plan, items, back = planned(items, spec, cache)
    device, extra = plan.device, torch.empty(0, dtype=torch.int32, device=plan.device)

    def here(work: Callable[..., Any], *arguments: Any) -> Any:
        with on(device):
            return work(*arguments)

    step: ShardStep = here(ShardStep, plan, items, spec)
    top_k = spec.selection.kind == "top_k"
    if top_k:
        answer = yield here(step.count_first)
        for level in (1, 2, 3):
            answer = yield here(step.count_next, level, answer)
        ties = here(step.count_ties, answer)
        if sums_with_ties(spec):
            extra = here(step.sums)
        answer = yield torch.cat([ties, extra])
        here(step.cut_ties, answer[: ties.numel()])
        extra = answer[ties.numel() :]
    if needs_sums(spec) and not (top_k and sums_with_ties(spec)):
        extra = yield here(step.sums)
    sums = here(step.finish, here(step.complete, extra) if needs_sums(spec) else None)
    for tensor, copy in back:
        tensor.copy_(copy)
    return sums
