"""Tensors that one kernel steps together, with their tables, which are brought up to date in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.random import SAMPLE_RUN, SAMPLE_SIZE
from ..reference.rules import number
from ..spec import Draw, Item, Rule, Scalar, Selection, Strength
from . import config
from .config import Config
from .configure import hyper_parameters, samples_of
from .tables import Tables, cdiv, refill, state_columns, upload, work

SUM_BLOCK = 4096  # elements of a program that sums
SAMPLE_BLOCK = 1024  # scores of a program that samples
SETTLE_WIDE = 4  # chunks that a settling program looks at
SEEN_BLOCK, SEEN_PARTS = 1024, 16  # a program that looks for the first momentum that is not zero


class TopKPlan:
    """Which tensors of a batch are ranked and how: sampled scores, brackets, and the programs of each launch."""

    def __init__(self, numels: list[int], selection: Selection, cfg: Config, device: torch.device) -> None:
        self.samples = [samples_of(n, selection) for n in numels]
        self.samples_at, total = [], 0
        for count, _ in self.samples:
            self.samples_at.append(total)
            total += cdiv(count, 4) * 4
        self.total_samples = total
        self.sample_work, _ = work([cdiv(count, SAMPLE_BLOCK) for count, _ in self.samples], device)
        ranked = [i for i, n in enumerate(numels) if n > 0]
        exact = selection.quantile == "exact"
        bracketed = [i for i in ranked if self.samples[i][1] >= 0 and exact]
        self.ranked = upload(ranked, torch.int32, device)
        self.bracketed = upload(bracketed, torch.int32, device) if bracketed else None
        wide = SETTLE_WIDE * cfg.block
        self.settles = [cdiv(n, wide) if self.samples[i][1] >= 0 and exact else 0 for i, n in enumerate(numels)]
        self.settle_work, self.settle_at = work(self.settles, device)

    def rank_rows(self, numels: list[int], selection: Selection) -> list[list[int]]:
        """The rank table as a step begins with it: which rank is wanted, and which tensors are dense."""
        rows = []
        for numel, (count, shift) in zip(numels, self.samples, strict=True):
            row = [0] * config.RANKS.value
            wanted = int(selection.fraction * numel)
            row[config.MODE.value] = (config.EXACT if wanted else config.DENSE).value
            if selection.quantile == "sampled" and shift >= 0:
                wanted = max(int(selection.fraction * count), 1)
            row[config.WANTED.value] = wanted
            rows.append(row)
        return rows


class Batch:
    """The items of a list that share a `Config`, with their tables. `members` are their indices in the list."""

    def __init__(
        self, cfg: Config, items: Sequence[Item], members: list[int], rule: Rule, selection: Selection,
        strength: Strength,
    ) -> None:  # fmt: skip
        self.cfg, self.members, self.device = cfg, members, items[members[0]].param.device
        self.tables = Tables(len(members), self.device)
        self.numels = [items[i].param.numel() for i in members]
        self.chunks, self.chunk_at = work([cdiv(n, cfg.block) for n in self.numels], self.device)
        self.programs = self.chunks.shape[0]
        self.top_k = TopKPlan(self.numels, selection, cfg, self.device) if selection.kind == "top_k" else None
        self._plan_sums(strength)
        self.seen_work: Tensor | None = None
        if cfg.product == "previous_momentum":
            self.seen_work, _ = work([cdiv(n, SEEN_BLOCK * SEEN_PARTS) for n in self.numels], self.device)
        refill(self.tables.facts, self._facts(items))
        self.counters: Tensor | None = None  # on the device, for step counters that live on the host
        self.counted: list[float] = []  # what those say

    def _plan_sums(self, strength: Strength) -> None:
        self.sum_work: Tensor | None = None
        self.sum_samples, self.sums = [(n, -1) for n in self.numels], [0] * len(self.numels)
        self.sum_at = self.sums
        if strength.kind == "fixed":
            return
        if strength.estimate == "sampled" and strength.kind != "alignment":
            whole = (SAMPLE_SIZE, (SAMPLE_SIZE // SAMPLE_RUN).bit_length() - 1)
            self.sum_samples = [(n, -1) if n <= SAMPLE_SIZE else whole for n in self.numels]
        self.sums = [cdiv(count, SUM_BLOCK) for count, _ in self.sum_samples]
        self.sum_work, self.sum_at = work(self.sums, self.device)

    def _facts(self, items: Sequence[Item]) -> list[list[int]]:
        rows = []
        for t, member in enumerate(self.members):
            param, top_k = items[member].param, self.top_k
            count, shift = top_k.samples[t] if top_k else (0, -1)
            rows_of_it = param.shape[0] if param.dim() else 1
            row = {
                config.NUMEL: self.numels[t], config.ROW_LENGTH: max(self.numels[t] // max(rows_of_it, 1), 1),
                config.ADDRESS: items[member].address, config.SAMPLES: count, config.SHIFT: shift,
                config.SAMPLES_AT: top_k.samples_at[t] if top_k else 0,
                config.CHUNK_AT: self.chunk_at[t], config.CHUNKS: cdiv(self.numels[t], self.cfg.block),
                config.SUM_AT: self.sum_at[t], config.SUMS: self.sums[t], config.SUM_SHIFT: self.sum_samples[t][1],
                config.SETTLE_AT: top_k.settle_at[t] if top_k else 0, config.SETTLES: top_k.settles[t] if top_k else 0,
            }  # fmt: skip
            cells = [0] * config.FACTS.value
            for place, value in row.items():
                cells[place.value] = value
            rows.append(cells)
        return rows

    def update(self, items: Sequence[Item], rule: Rule, selection: Selection, strength: Strength, draw: Draw) -> None:
        """Bring the tables up to date for this step. Uploads nothing that has not changed."""
        tables = self.tables
        mine = [items[i] for i in self.members]
        self._count_steps(mine)
        tables.say("pointers", tables.pointers, self._addresses(mine, rule))
        self.refresh(hyper_parameters(rule, selection, strength), selection)
        if draw.clock is None:
            tables.say("clock", tables.clock, [_signed64(draw.seed), draw.step])

    def refresh(self, hyper: list[Scalar], selection: Selection) -> None:
        """New hyper-parameters. Those that are tensors on the device are copied there, in every step."""
        tables = self.tables
        on_device = {i: v for i, v in enumerate(hyper) if isinstance(v, Tensor) and v.device.type != "cpu"}
        tables.say("hyper", tables.hyper, [0.0 if i in on_device else number(v) for i, v in enumerate(hyper)])
        for i, value in on_device.items():
            tables.hyper[i : i + 1].copy_(value.detach().reshape(1), non_blocking=True)
        if self.top_k is not None and tables.said.get("fraction") != selection.fraction:
            tables.say("ranks", tables.ranks, self.top_k.rank_rows(self.numels, selection))
            tables.said["fraction"] = selection.fraction

    def _addresses(self, items: list[Item], rule: Rule) -> list[list[int]]:
        rows = []
        for t, item in enumerate(items):
            state = [0 if c is None else c.data_ptr() for c in state_columns(item, rule)]
            average = item.policy_state.get("average")
            step = item.state.get("step")
            if self.counters is not None:
                counter = self.counters.data_ptr() + 4 * t
            else:
                counter = step.data_ptr() if isinstance(step, Tensor) else 0
            rows.append([item.param.data_ptr(), item.grad.data_ptr(), *state, counter,
                         0 if average is None else average.data_ptr()])  # fmt: skip
        return rows

    def _count_steps(self, items: list[Item]) -> None:
        """Count the steps that the host keeps, there and on the device."""
        if self.cfg.rule != "adam" or items[0].state["step"].device.type == self.device.type != "cpu":
            return
        steps = [item.state["step"] for item in items]
        now = [float(step) for step in steps]
        if self.counters is None:
            self.counters = torch.zeros(len(items), dtype=torch.float32, device=self.device)
        if now != self.counted:
            refill(self.counters, now)
        torch._foreach_add_(steps, 1)
        self.counted = [count + 1 for count in now]


def _signed64(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
