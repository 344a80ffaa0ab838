"""A batch: the tensors that one launch steps together, with their tables, which every step brings up to date."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..layouts import Layouts, layouts_of
from ..reference.random import SAMPLE_RUN, SAMPLE_SIZE
from ..spec import Item, Selection, StepSpec, Strength
from .configure import forms_update_again, samples_of
from .control import ControlPlan
from .device import config
from .device.config import Config
from .groups import GroupTable
from .tables import Tables, cdiv, is_in_place, refill, state_columns, upload, work

SUM_BLOCK = 2048  # elements of a program that sums
SAMPLE_BLOCK = 1024  # scores of a program that samples or ranks
# Elements of a program that counts scores without stepping. It has 4 warps, so that a thread has 16.
COUNT_BLOCK = 2048
SETTLE_WORDS = 1024  # words of 32 elements that a settling program looks at
SEEN_BLOCK, SEEN_PARTS = 2048, 32  # elements, and blocks of them, of a program that looks for a momentum that is not 0

# False: the sums of an update are formed in a pass that writes nothing, which reads as much again as the step.
MOVE_WITH_SUMS = True

_ONE = torch.tensor(1.0, device="cpu")


def moves_with_sums(cfg: Config) -> bool:
    """True if the moments are stored when the sums of a strength are formed, and the selection with them.

    It pays where the sums are made of the whole update: then AdamW moves 20 + 16 bytes an element and not 12 + 28.
    """
    of_update = cfg.strength == "norm_preserving" and cfg.of == "update" and cfg.estimate == "exact"
    return of_update and forms_update_again(cfg) and not cfg.control and MOVE_WITH_SUMS


class TopKPlan:
    """The ranking of a batch's tensors: their samples, which of them have brackets, and the programs of each launch."""

    def __init__(self, numels: list[int], selection: Selection, cfg: Config, device: torch.device) -> None:
        self.sampled = selection.quantile == "sampled"
        self.samples = [samples_of(n, selection) for n in numels]
        self.samples_at, self.total_samples = [], 0
        for count, _ in self.samples:
            self.samples_at.append(self.total_samples)
            self.total_samples += cdiv(count, 4) * 4
        parts = [cdiv(count, SAMPLE_BLOCK) for count, _ in self.samples]
        drawn = [shift >= 0 for _, shift in self.samples]  # the others are whole
        large = [i for i, is_drawn in enumerate(drawn) if is_drawn]
        whole = [i for i, n in enumerate(numels) if n > 0 and not drawn[i]]
        self.large_of = {t: i for i, t in enumerate(large)}
        self.large = upload(large, torch.int32, device) if large else None
        self.whole = upload(whole, torch.int32, device) if whole else None
        self.sample_work, _ = work(parts, device)
        self.drawn_work, _ = work([n if is_drawn else 0 for n, is_drawn in zip(parts, drawn, strict=True)], device)
        each = [cdiv(n, COUNT_BLOCK) if is_drawn else 0 for n, is_drawn in zip(numels, drawn, strict=True)]
        self.count_work, _ = work(each, device)
        wide = 32 * SETTLE_WORDS
        self.bracketed = bool(large) and not self.sampled
        self.settles = [cdiv(n, wide) if drawn[i] and self.bracketed else 0 for i, n in enumerate(numels)]
        self.settle_work, self.settle_at = work(self.settles, device)

    def rank_rows(self, numels: list[int], selections: Sequence[Selection]) -> list[list[int]]:
        """The rank table as a step begins with it: the wanted rank of each tensor, and the mode, exact or dense.

        `selections` has that of each tensor's group.
        """
        rows = []
        for numel, (count, shift), selection in zip(numels, self.samples, selections, strict=True):
            row = [0] * config.RANKS.value
            wanted = selection.k_of(numel)
            row[config.MODE.value] = (config.EXACT if wanted else config.DENSE).value
            if self.sampled and shift >= 0:
                wanted = max(selection.k_of(count), 1)
            row[config.WANTED.value] = wanted
            rows.append(row)
        return rows


class Batch:
    """The items of a list that share a `Config`, with their tables. `members` are their indices in the list.

    They may be of several groups with numbers of their own: `group_of` has the group of each item of the list, which is
    its row in `groups`, and `specs` has the `StepSpec` of each group. The specs of a batch differ in numbers only.
    """

    def __init__(
        self,
        cfg: Config,
        items: Sequence[Item],
        members: list[int],
        specs: Sequence[StepSpec],
        group_of: Sequence[int] | None = None,
        groups: GroupTable | None = None,
    ) -> None:
        self.cfg, self.members, self.device = cfg, members, items[members[0]].param.device
        self.group_of = [0] * len(members) if group_of is None else [group_of[i] for i in members]
        self.groups = GroupTable(len(specs), self.device) if groups is None else groups
        spec = specs[self.group_of[0]]
        self.rule, selection, strength = spec.rule, spec.selection, spec.strength
        self.function = selection.function
        self.tables = Tables(len(members), self.device)
        self.numels = [items[i].param.numel() for i in members]
        self.chunks, self.chunk_at = work([cdiv(n, cfg.block) for n in self.numels], self.device)
        self.programs = self.chunks.shape[0]
        self.top_k = TopKPlan(self.numels, selection, cfg, self.device) if selection.kind == "top_k" else None
        self._plan_sums(strength)
        self.control = ControlPlan(self.numels, cfg, self.device) if cfg.control else None
        self.seen_work: Tensor | None = None
        if cfg.product == "previous_momentum":
            self.seen_work, _ = work([cdiv(n, SEEN_BLOCK * SEEN_PARTS) for n in self.numels], self.device)
            self.peek_work, _ = work([min(n, 1) for n in self.numels], self.device)
        self.tables.uploads.keep(refill(self.tables.facts, self._facts(items)))
        mine = [items[i] for i in members]
        columns = state_columns(mine[0], self.rule)
        # the names of the state that the kernels read, and their columns in the pointer table
        self.state = [
            (n, config.FIRST.value + i) for i, n in enumerate(self.rule.state_names) if columns[i] is not None
        ]
        self.averages = strength.kind == "alignment"
        self.names = [name for name, _ in self.state] + (["step"] if cfg.rule == "adam" else [])
        self._entries_of: Any = itemgetter(*self.names) if self.names else None
        self.layouts, present = self._layouts(mine), self._columns(mine)
        self.of_items = self._of_items(mine)
        self.counters: Tensor | None = None  # on the device, in place of step counters that live on the host
        self.counted: list[float] = []  # the counts of those on the host
        if cfg.rule == "adam" and not (mine[0].state["step"].device.type == self.device.type == "cuda"):
            self.counters = torch.zeros(len(mine), dtype=torch.float32, device=self.device)
        self.param_layouts = _layouts_of(present[0])
        self.entries = self._entries(present)
        # The layouts of parameters, gradients and each entry of the state, each in a form that one call compares. They
        # are made when the batch is used again, because some are not.
        self._known: list[Layouts | None] = [None] * (1 + len(present))
        self.fixed_addresses = [[*map(Tensor.data_ptr, column)] for column in present]
        self.addresses = self._address_table()
        self.gradients: list[int] = []

    def _plan_sums(self, strength: Strength) -> None:
        self.sum_work: Tensor | None = None
        self.moves = moves_with_sums(self.cfg)
        self.sum_block = self.cfg.block if self.moves else SUM_BLOCK
        self.sum_samples, self.sums = [(n, -1) for n in self.numels], [0] * len(self.numels)
        self.sum_at = self.sums
        if strength.kind == "fixed" or self.cfg.share_known:
            return
        if self.cfg.estimate == "sampled":
            drawn = (SAMPLE_SIZE, (SAMPLE_SIZE // SAMPLE_RUN).bit_length() - 1)
            self.sum_samples = [(n, -1) if n <= SAMPLE_SIZE else drawn for n in self.numels]
        self.sums = [cdiv(count, self.sum_block) for count, _ in self.sum_samples]
        self.sum_work, self.sum_at = work(self.sums, self.device)

    def _first(self, item: Item) -> int:
        """The element or row of the whole tensor at which a shard's random numbers begin."""
        unit = "row" if self.cfg.selection == "row" else "element"
        return 0 if item.shard is None else item.shard.first(unit) or 0

    def _facts(self, items: Sequence[Item]) -> Tensor:
        """The table of facts, on the host, column by column."""
        mine, top_k, numels = self._mine(items), self.top_k, self.numels
        rows = [i.param.shape[0] if i.param.dim() else 1 for i in mine]
        columns: dict[object, Sequence[int]] = {
            config.NUMEL: numels, config.ADDRESS: [i.address for i in mine],
            config.ROW_LENGTH: [max(n // max(r, 1), 1) for n, r in zip(numels, rows, strict=True)],
            config.BEGINS: [self._first(i) for i in mine], config.GROUP: self.group_of,
            config.CHUNK_AT: self.chunk_at, config.CHUNKS: [cdiv(n, self.cfg.block) for n in numels],
            config.SUM_AT: self.sum_at, config.SUMS: self.sums,
            config.SUM_SHIFT: [shift for _, shift in self.sum_samples],
        }  # fmt: skip
        if top_k is not None:
            columns |= {
                config.SAMPLES: [count for count, _ in top_k.samples], config.SHIFT: [s for _, s in top_k.samples],
                config.SAMPLES_AT: top_k.samples_at, config.SETTLE_AT: top_k.settle_at, config.SETTLES: top_k.settles,
                config.LARGE: [top_k.large_of.get(t, 0) for t in range(len(numels))],
            }  # fmt: skip
        table = torch.zeros(len(numels), config.FACTS.value, dtype=torch.int64, device="cpu")
        for column, values in columns.items():
            table[:, column.value] = torch.tensor(values, dtype=torch.int64, device="cpu")  # type: ignore[attr-defined]
        return table

    def _mine(self, items: Sequence[Item]) -> Sequence[Item]:
        return items if len(self.members) == len(items) else [items[i] for i in self.members]

    def _layouts(self, items: Sequence[Item]) -> list[list[Any]]:
        """The layouts of gradients and of given updates, which may be at the same addresses."""
        described = [_described(i.state, self.state) for i in items] if self.cfg.rule == "given" else []
        return [*_layouts_of([i.grad for i in items]), described]

    def _of_items(self, items: Sequence[Item]) -> list[list[int]]:
        """Each item's address, by which it draws, and how many entries the state of a given update has."""
        return [[i.address for i in items], [len(i.state) for i in items] if self.cfg.rule == "given" else []]

    def _columns(self, items: Sequence[Item]) -> list[Sequence[Tensor]]:
        """The parameters, and each entry of their state that the kernels have the address of."""
        columns: list[Sequence[Tensor]] = [[i.param for i in items]]
        if len(self.names) > 1:
            columns += zip(*map(self._entries_of, [i.state for i in items]), strict=True)
        elif self.names:
            columns.append([i.state[self.names[0]] for i in items])
        if self.averages:
            columns.append([i.policy_state["average"] for i in items])
        return columns

    def _entries(self, columns: Sequence[Sequence[Tensor]]) -> list[list[object]]:
        """The identities and dtypes of the state: another tensor at the same address may have another dtype."""
        states = columns[1 : 1 + len(self.state)]
        return [*([*map(id, column)] for column in states), *([x.dtype for x in column] for column in states)]

    def _address_table(self) -> Tensor:
        """The pointer table, on the host, without the gradients."""
        table = torch.zeros(len(self.members), config.COLUMNS.value, dtype=torch.int64, device="cpu")
        columns = [config.PARAM.value, *(column for _, column in self.state)]
        if self.cfg.rule == "adam":
            columns.append(config.STEP.value)
        if self.averages:
            columns.append(config.AVERAGE.value)
        for column, addresses in zip(columns, self.fixed_addresses, strict=True):
            table[:, column] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        if self.counters is not None:
            first = self.counters.data_ptr()
            table[:, config.STEP.value] = first + 4 * torch.arange(len(self.members), device="cpu")
        return table

    def fits(self, items: Sequence[Item], looked: bool = False) -> bool:
        """True if the tables can be made to fit these items: the same tensors, except those that are new in every step.

        New in every step may be a given update, and the buffer that a rule leaves its update in. `looked`: dtypes,
        shapes and strides of the parameters are known to be the same.
        """
        mine = self._mine(items)
        try:
            if self._of_items(mine) != self.of_items:
                return False
            columns = self._columns(mine)
            if not self._are_alike(mine, columns, looked):
                return False
            now = [[*map(Tensor.data_ptr, column)] for column in columns]
        except (KeyError, AttributeError, TypeError):  # an entry of the state is gone, or None
            return False
        if now != self.fixed_addresses:
            if any(i.param.device != self.device or type(i.param) not in (Tensor, Parameter) for i in mine):
                return False
            given = self.cfg.rule == "given"
            if not given and now[1:] != self.fixed_addresses[1:]:
                return False
            if given and any(is_in_place(item, self.rule) != self.cfg.in_place for item in mine):
                return False
            self.fixed_addresses, self.gradients = now, []
            self.addresses = self._address_table()
        return True

    def _are_alike(self, items: Sequence[Item], columns: Sequence[Sequence[Tensor]], looked: bool) -> bool:
        """True if dtypes, shapes and strides are the same. They are looked at one by one if one call can't say so."""
        now = _with_gradients(columns, items)
        pairs = zip(self._known[looked:], now[looked:], strict=True)
        if not [known for known, column in pairs if known is None or not known.are_of(column)]:
            return True
        if self._layouts(items) != self.layouts:
            return False
        if not looked and _layouts_of(columns[0]) != self.param_layouts:
            return False
        if self.cfg.rule != "given" and self._entries(columns) != self.entries:
            return False
        self._known = [*map(layouts_of, now)]
        return True

    def update(self, items: Sequence[Item], specs: Sequence[StepSpec]) -> None:
        """Bring the tables up to date for this step, all but that of the groups. What has changed is uploaded."""
        tables, mine = self.tables, self._mine(items)
        self.upload_ranks(specs)
        self._upload_steps(mine)
        gradients = [*map(Tensor.data_ptr, [item.grad for item in mine])]
        if gradients != self.gradients:
            self.addresses[:, config.GRAD.value] = torch.tensor(gradients, dtype=torch.int64, device="cpu")
            tables.uploads.keep(refill(tables.pointers, self.addresses))
            self.gradients = gradients

    def upload_ranks(self, specs: Sequence[StepSpec]) -> None:
        """Upload the wanted ranks, if the fraction of a group has changed."""
        uploads = self.tables.uploads
        if self.top_k is None:
            return
        fractions = [spec.selection.fraction for spec in specs]
        if uploads.uploaded.get("fractions") != fractions:
            rows = self.top_k.rank_rows(self.numels, [specs[group].selection for group in self.group_of])
            uploads.fill("ranks", self.tables.ranks, rows)
            uploads.uploaded["fractions"] = fractions

    def _upload_steps(self, items: Sequence[Item]) -> None:
        """Upload the step counts that the host keeps, if they are not those that the device has counted to."""
        if self.counters is None:
            return
        self.now: list[float] = [*map(Tensor.item, [item.state["step"] for item in items])]
        if self.now != self.counted:
            self.tables.uploads.keep(refill(self.counters, self.now))
        self.counted = []  # until the step is done: if it fails, the next one uploads the counts again

    def stepped(self, items: Sequence[Item]) -> None:
        """Count the step on the host as well, after the launches that count it on the device."""
        if self.counters is None:
            return
        steps = [item.state["step"] for item in self._mine(items)]
        many: Any = torch  # torch declares no types for this function
        many._foreach_add_(steps, _ONE, alpha=1.0)  # a number in the place of the tensor takes four times as long
        self.counted = [count + 1 for count in self.now]


def _layouts_of(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [[x.dtype for x in tensors], [x.shape for x in tensors], [*map(Tensor.stride, tensors)]]


def _with_gradients(columns: Sequence[Sequence[Tensor]], items: Sequence[Item]) -> list[Sequence[Tensor]]:
    """The parameters, the gradients, and each entry of the state."""
    return [columns[0], [i.grad for i in items], *columns[1:]]


def _described(state: dict[str, Tensor], names: Sequence[tuple[str, int]]) -> list[object]:
    """The layouts of these entries of a state."""
    facts: list[object] = []
    for name, _ in names:
        x = state[name]
        facts += [x.dtype, x.shape, x.stride()]
    return facts
