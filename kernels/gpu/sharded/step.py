"""A step of shards that looks at whole tensors: a fixed number of launches between its collectives.

What `kernels/sharded` does one tensor after the other in plain torch, with the same numbers sent: the K-th scores by a
radix search (`counting.py`), sums (`shard_sums.py`), and in the end the pass over everything of any other step.
Nothing but the step counters moves before the last collective. Memory while it lasts, with top-K: 4 bytes an element,
32 KiB a tensor at least.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...reference.strengths import Parts, multipliers
from ...sharded.how import How
from ...sharded.tensor_step import select_everything
from ...spec import Item, Sums, SumsTable
from ..device import config
from ..device.config import derived
from ..launch import Step, on, run
from ..tables import power_of_two
from . import sums as shard_sums
from . import top_k as counting
from .plan import ShardPlan, planned

BLOCK = 1024  # elements that a program works on at a time
TABLE_BLOCK = 1024
Asking = Generator[Tensor, Tensor, Sequence[Sums] | None]
Row = dict[str, Tensor]  # the sums of all tensors, float64 [tensors], by their names


class ShardStep:
    """One step of one plan: the memory that its launches share, and the launches."""

    def __init__(self, plan: ShardPlan, items: Sequence[Item], how: How) -> None:
        self.plan, self.items, self.how = plan, items, how
        self.batch, self.tables, self.tensors = plan.batch, plan.batch.tables, len(plan.numels)
        self.looks = derived(self.batch.cfg, writes=False)
        self.ranks = self.tables.ranks
        self.step = Step(self.batch, None, plan.update(items, how))
        self.step.begin()
        self.moving: Tensor | None = None
        if how.by_previous:
            seen = self.ranks[:, config.SEEN.value]
            self.moving = seen.to(torch.float64) * self.plan.spans[:, 3]
            seen.fill_(1)  # until everybody's is known

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.plan.device)

    # --- the K-th score ---

    def count_first(self) -> Tensor:
        """Keep the keys, and count their highest bytes: int32, flat."""
        plan, tables = self.plan, self.tables
        bins = counting.BINS.value
        self.counts = torch.zeros(4, self.tensors * bins, dtype=torch.int32, device=plan.device)
        self.keys = self.empty(plan.programs * plan.span, torch.int32)
        run(counting.keys_kernel, plan.programs, self.keys, self.counts[0], plan.work, tables.pointers, tables.numbers,
            tables.facts, SPAN=plan.span, BLOCK=BLOCK, CFG=self.looks)  # fmt: skip
        return self._of_those_that_count(self.counts[0])

    def count_next(self, level: int, answer: Tensor) -> Tensor:
        """One byte more of the K-th key is known; count the next."""
        plan = self.plan
        run(counting.narrow_kernel, self.tensors, self.ranks, answer, FIRST=level == 1, FINAL=False)
        run(counting.count_kernel, plan.programs, self.counts[level], self.keys, plan.work, self.ranks,
            SHIFT=24 - 8 * level, SPAN=plan.span, BLOCK=BLOCK)  # fmt: skip
        return self._of_those_that_count(self.counts[level])

    def _of_those_that_count(self, counts: Tensor) -> Tensor:
        if self.plan.counted:
            return counts
        return (counts.view(self.tensors, -1) * self.plan.spans[:, 3:].to(torch.int32)).view(-1)

    def count_ties(self, answer: Tensor) -> Tensor:
        """The K-th key is known: count, in this process's cell of each tensor, what equals it. int32, flat."""
        plan = self.plan
        run(counting.narrow_kernel, self.tensors, self.ranks, answer, FIRST=False, FINAL=True)
        self.equals = self.empty(plan.programs, torch.int32)
        run(counting.equals_kernel, plan.programs, self.equals, self.keys, plan.work, self.ranks, SPAN=plan.span,
            BLOCK=BLOCK)  # fmt: skip
        table = torch.zeros(self.tensors * plan.cells, dtype=torch.int32, device=plan.device)
        run(counting.cells_kernel, self.tensors, table, self.equals, plan.spans, plan.cells, BLOCK=TABLE_BLOCK)
        return table

    def cut_ties(self, answer: Tensor) -> None:
        """What equals the K-th is selected up to the index that is found here."""
        plan = self.plan
        run(counting.cutoff_kernel, self.tensors, self.ranks, answer, self.equals, self.keys, plan.spans, plan.cells,
            CELLS=power_of_two(plan.cells), SPAN=plan.span, BLOCK=BLOCK)  # fmt: skip

    # --- sums ---

    def sums(self) -> Tensor:
        """This process's part of `How.columns`, as int32 digits: flat."""
        plan, tables, how = self.plan, self.tables, self.how
        rows = self.empty(plan.programs * shard_sums.WIDTH.value, torch.float32)
        run(shard_sums.shard_sums_kernel, plan.programs, rows, plan.work, tables.pointers, tables.numbers, self.ranks,
            tables.facts, tables.keys, STATISTICS=how.statistics, SPAN=plan.span, BLOCK=BLOCK,
            CFG=self.looks)  # fmt: skip
        out = torch.empty(self.tensors, shard_sums.TOTALS.value, dtype=torch.float64, device=plan.device)
        run(shard_sums.totals_kernel, self.tensors, out, rows, plan.spans, STATISTICS=how.statistics,
            NORM=how.strength.kind == "norm_preserving", BLOCK=TABLE_BLOCK)  # fmt: skip
        if self.moving is not None:
            out[:, shard_sums.NAMES.index("moving")] = self.moving
        return shard_sums.as_digits(out, plan.columns)

    def complete(self, answer: Tensor) -> Row:
        """Everybody's sums by their names, with what follows of them."""
        how = self.how
        table = shard_sums.as_numbers(answer, self.tensors)
        row = dict(zip(how.columns, table.unbind(1), strict=True))
        if how.selection.kind == "top_k" and not how.strength_waits:  # the ties that are taken were not known yet
            need = self.ranks[:, config.LEFT.value]
            row["selected"] = row["selected"] + need
            if how.statistics:  # of the ties' squares the share that is taken
                share = need / self.ranks[:, config.TIED.value].clamp(min=1)
                row["chosen_u"] = row["chosen_u"] + share * row["equal_u"]
        if how.statistics:
            row["others_u"] = (row["update_sq"] - row["chosen_u"]).clamp(min=0)  # where nothing else is left
        if self.moving is not None:
            first = select_everything(row, self.plan.lengths.to(torch.float64))
            self.ranks[:, config.SEEN.value].copy_(~first)
        return row

    def finish(self, row: Row | None) -> SumsTable | None:
        """Strengths, and the pass over everything."""
        known, how, numbers = row or {}, self.how, self.tables.numbers
        parts = Parts(self.plan.lengths, selected=known.get("selected"), selected_sq=known.get("chosen_sq"),
                      rest_sq=known.get("others_sq"))  # fmt: skip
        wanted = how.strength.kind != "fixed" or how.statistics
        above, below = multipliers(how.strength, parts, {}, self.plan.device) if wanted else (None, None)
        if how.strength.kind != "fixed":
            assert above is not None and below is not None
            numbers[:, config.ABOVE.value].copy_(above)
            numbers[:, config.BELOW.value].copy_(below)
        self.step.finish()
        self.batch.stepped(self.items)
        if row is None or not how.statistics:
            return None
        assert above is not None and below is not None
        masked = above * above * row["chosen_u"] + below * below * row["others_u"]
        strengths = [x.expand(self.tensors) for x in (above, below)]
        table = [row["selected"], *strengths, *(row[n] for n in ("update_sq", "grad_sq", "update_grad")), masked]
        return SumsTable(torch.stack(table, 1), self.plan.numels)


class ShardKernels:
    """What `kernels/sharded` takes from here."""

    @staticmethod
    def step(items: Sequence[Item], how: How, cache: dict[Any, Any]) -> Asking:
        return step_shards(items, how, cache)

    @staticmethod
    def digits(table: Tensor) -> Tensor:
        """Of float64 [rows, columns]: int32, flat."""
        with on(table.device):
            columns = torch.arange(table.shape[1], device=table.device)
            return shard_sums.as_digits(table.contiguous(), columns)

    @staticmethod
    def number(digits: Tensor, rows: int) -> Tensor:
        """Back, summed: float64 [rows, columns]."""
        with on(digits.device):
            return shard_sums.as_numbers(digits, rows)


def step_shards(items: Sequence[Item], how: How, cache: dict[Any, Any]) -> Asking:
    """A part of a sharded step (`kernels/sharded/exchange.py`), of items that one kernel can step together.

    `cache`: the same in every step of these tensors.
    """
    plan, back = cache.get("plan"), []
    if plan is None or not plan.fits(items, how):
        plan, items, back = planned(items, how, cache)
    device, extra = plan.device, torch.empty(0, dtype=torch.int32, device=plan.device)

    def here(work: Callable[..., Any], *arguments: Any) -> Any:
        with on(device):
            return work(*arguments)

    step: ShardStep = here(ShardStep, plan, items, how)
    rides = how.needs_sums and not how.strength_waits
    if how.selection.kind == "top_k":
        answer = yield here(step.count_first)
        for level in (1, 2, 3):
            answer = yield here(step.count_next, level, answer)
        ties = here(step.count_ties, answer)
        if rides:  # the sums travel with the ties
            extra = here(step.sums)
        answer = yield torch.cat([ties, extra])
        here(step.cut_ties, answer[: ties.numel()])
        extra = answer[ties.numel() :]
    if how.needs_sums and (how.selection.kind != "top_k" or how.strength_waits):
        extra = yield here(step.sums)
    sums = here(step.finish, here(step.complete, extra) if how.needs_sums else None)
    for tensor, copy in back:
        tensor.copy_(copy)
    return sums
