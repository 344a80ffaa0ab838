"""Shards of many tensors in one go: as many operations for a thousand tensors as for one.

For what is trained most: float32 arithmetic, a selection by the sign or the rank of update times gradient, a strength
that is fixed or keeps the mean, shards that are stretches of the whole (by rows). `work.py` does everything else, one
tensor after the other, and the same here, if it has to.

    the rule, by the kernels for whole tensors, on zeros, which leaves -u; scores, or what agrees
    the K-th scores and the ties (as in `ranking.py` and `ties.py`), the sums, what is taken of the ties
    the mask; the parameters, by the kernels for whole tensors

Memory while it lasts: u, the ranks (or what agrees) and which tensor it is, 12 bytes an element of the rank's shards (9
without ranks), and some 40 bytes an element of a part of `PART` elements.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..reference.rules import decay_factor
from ..reference.strengths import Parts, multipliers
from ..spec import AdamRule, Draw, GivenRule, Item, ItemList, LionRule, Selection, SGDRule, Strength, Sums, SumsTable
from . import counting
from .how import How
from .ranking import key_of
from .sums import WIDTH, digits, number
from .ties import ONE_ROUND

PART = 2**25  # elements that are worked on at a time
EVERYTHING = (Selection("everything"), Strength("fixed", 1.0, 1.0))
Step = Generator[Tensor, Tensor, Sequence[Sums] | None]


def can_be(item: Item, how: How) -> bool:
    """Whether a tensor is stepped like this: the same on all ranks, also on those that have nothing of it."""
    rule, selection, strength, shard = how.rule, how.selection, how.strength, item.shard
    assert shard is not None
    if how.draw.stochastic or strength.still or strength.estimate == "sampled" or item.param.dtype == torch.float64:
        return False
    if strength.kind not in ("fixed", "mean_preserving") or not _is_plain(rule, item):
        return False
    if shard.cut != 0 or not shard.stretches or shard.cells > ONE_ROUND:
        return False
    if selection.kind == "top_k":
        return selection.score == "update" and selection.quantile == "exact" and _wanted(selection, shard.numel) > 0
    return selection.kind == "agreement" and selection.product == "update"


def _is_plain(rule: object, item: Item) -> bool:
    """Whether the rule's update does not look at the parameter, and its state is there."""
    if isinstance(rule, AdamRule):
        return rule.decoupled or rule.weight_decay == 0
    if isinstance(rule, SGDRule):
        return rule.weight_decay == 0 and (rule.momentum == 0 or item.state.get("momentum_buffer") is not None)
    return isinstance(rule, LionRule) and rule.weight_decay == 0


def _wanted(selection: Selection, numel: int) -> int:
    return int(selection.fraction * numel)


@dataclass
class Slice:
    """Some tensors, one after the other. `seg`: which of all tensors each element is of (int32)."""

    first: int
    last: int
    start: int
    stop: int
    seg: Tensor
    starts: Tensor  # of each of its tensors, counted from its own start
    key: Tensor | None = None
    chosen: Tensor | None = None


def slices(lengths: Sequence[int], device: torch.device) -> list[Slice]:
    """Cut up between tensors, `PART` elements at most, or one tensor."""
    ends = list(accumulate(lengths))
    found, first = [], 0
    for index, end in enumerate(ends):
        begin = ends[first] - lengths[first]
        if index + 1 == len(ends) or ends[index + 1] - begin > PART:
            some = range(first, index + 1)
            sizes = counting.upload([lengths[i] for i in some], device)
            seg = (torch.repeat_interleave(sizes, output_size=end - begin) + first).to(torch.int32)
            found.append(Slice(first, index + 1, begin, end, seg, sizes.cumsum(0) - sizes))
            first = index + 1
    return found


class Together:
    """All of a step's tensors of one group of processes and one device."""

    def __init__(
        self, items: Sequence[Item], how: How, local_step: Callable[..., Any], cache: dict[Any, Any]
    ) -> None:
        self.items, self.how, self.local_step, self.cache = items, how, local_step, cache
        self.device = items[0].param.device
        self.shards = [item.shard for item in items if item.shard is not None]
        self.lengths = [item.param.numel() for item in items]
        self.counted = counting.upload([int(shard.counted) for shard in self.shards], self.device)
        self.update = torch.zeros(sum(self.lengths), dtype=torch.float32, device=self.device)
        self.views = [x.view(i.param.shape) for x, i in zip(self.update.split(self.lengths), items, strict=True)]
        self._advance()
        self.slices = slices(self.lengths, self.device)

    def _advance(self) -> None:
        """The rule on zeros, without decay of the parameter; then u from the -u that is left."""
        rule: Any = replace(self.how.rule, weight_decay=0.0)
        rule = replace(rule, decay_factor=1.0) if isinstance(rule, LionRule) else rule
        self._run("advance", [replace(i, param=v, shard=None) for i, v in zip(self.items, self.views, strict=True)], rule)
        self.update.neg_()

    def _run(self, name: str, made: list[Item], rule: Any) -> None:
        """A step of everything by the kernels for whole tensors, whose tables are kept from step to step."""
        kept = ItemList(made)
        kept.cache = self.cache.setdefault(name, kept.cache)
        self.local_step(kept, rule=rule, selection=EVERYTHING[0], strength=EVERYTHING[1], draw=Draw(0, 0),
                        statistics=False)  # fmt: skip

    def gradient(self, some: Slice) -> Tensor:
        """As the base sees it, float32, 1-d."""
        parts = [item.grad.reshape(-1) for item in self.items[some.first : some.last]]
        flat = torch.cat(parts).to(torch.float32)
        return flat.neg_() if getattr(self.how.rule, "maximize", False) else flat

    def select(self) -> None:
        """Ranks of scores; or what agrees."""
        for some in self.slices:
            product = self.gradient(some).mul_(self.update[some.start : some.stop])
            if self.how.selection.kind == "top_k":
                some.key = key_of(product)
            else:
                some.chosen = product > 0 if self.how.selection.strict else product >= 0

    def per_tensor(self, of: Callable[[Slice], Tensor]) -> Tensor:
        """The sum of something over each tensor, float64: the same bits in every run."""
        return torch.cat([counting.segment_sums(of(some), some, self.lengths) for some in self.slices])

    def sums(self, found: counting.Found | None) -> Tensor:
        """This process's part of `How.columns`: float64 [tensors, columns]; of ties nothing is taken yet."""

        def squares(some: Slice) -> Tensor:
            return self.update[some.start : some.stop].square()

        def chosen(some: Slice) -> Tensor:
            return some.chosen if found is None and some.chosen is not None else self._above(some, found)

        def equal(some: Slice) -> Tensor:
            assert found is not None and some.key is not None
            return some.key == found.prefix[some.seg]

        ways: dict[str, Callable[[Slice], Tensor]] = {
            "selected": chosen,
            "update_sq": squares,
            "grad_sq": lambda some: self.gradient(some).square_(),
            "update_grad": lambda some: self.gradient(some).mul_(self.update[some.start : some.stop]),
            "chosen_u": lambda some: torch.where(chosen(some), squares(some), 0.0),
            "equal_u": lambda some: torch.where(equal(some), squares(some), 0.0),
        }  # fmt: skip
        rows = torch.stack([self.per_tensor(ways[name]) for name in self.how.columns], 1)
        return torch.where(self.counted[:, None] > 0, rows, 0.0)

    def _above(self, some: Slice, found: counting.Found | None) -> Tensor:
        assert found is not None and some.key is not None
        return (some.key > found.prefix[some.seg]) & (found.need > 0)[some.seg]

    def finish(self, row: dict[str, Tensor] | None) -> SumsTable | None:
        """Strengths, the mask, the parameters."""
        strength = self.how.strength
        sizes = counting.upload([shard.numel for shard in self.shards], self.device)
        selected = None if row is None else row["selected"]
        above, below = multipliers(strength, Parts(sizes, selected=selected), {}, self.device)
        above, below = above.expand(len(self.items)), below.expand(len(self.items))
        for some in self.slices:
            assert some.chosen is not None
            high, low = above.to(torch.float32)[some.seg], below.to(torch.float32)[some.seg]
            self.update[some.start : some.stop].mul_(torch.where(some.chosen, high, low))
        made = [
            replace(item, state={"update": view, "start": item.param}, shard=None)
            for item, view in zip(self.items, self.views, strict=True)
        ]
        self._run("land", made, GivenRule(decay_factor(self.how.rule)))
        if row is None or not self.how.statistics:
            return None
        others = row["update_sq"] - row["chosen_u"]
        masked = above * above * row["chosen_u"] + below * below * others
        names = ("update_sq", "grad_sq", "update_grad")
        values = torch.stack([row["selected"], above, below, *(row[name] for name in names), masked], 1)
        return SumsTable(values, [shard.numel for shard in self.shards])


def step(items: Sequence[Item], how: How, local_step: Callable[..., Any], cache: dict[Any, Any]) -> Step:
    """A part of a sharded step (`exchange.py`). `cache`: the same in every step of these tensors."""
    all_of_it = Together(items, how, local_step, cache)
    all_of_it.select()
    found: counting.Found | None = None
    extra = torch.zeros(0, dtype=torch.int32, device=all_of_it.device)
    if how.selection.kind == "top_k":
        wanted = [_wanted(how.selection, shard.numel) for shard in all_of_it.shards]
        found = yield from counting.find(all_of_it.slices, wanted, all_of_it.counted)
        if how.needs_sums:
            extra = digits(all_of_it.sums(found)).reshape(-1)
        extra = yield from counting.settle(all_of_it.slices, found, all_of_it.shards, all_of_it.counted, extra)
    elif how.needs_sums:
        extra = yield digits(all_of_it.sums(None)).reshape(-1)
    row: dict[str, Tensor] | None = None
    if how.needs_sums:
        columns = number(extra.reshape(len(items), len(how.columns), WIDTH)).unbind(1)
        row = dict(zip(how.columns, columns, strict=True))
        if found is not None:
            _close(row, found, how.statistics)
    return all_of_it.finish(row)


def _close(row: dict[str, Tensor], found: counting.Found, statistics: bool) -> None:
    """Add the ties that were taken; their squares by their number, where only some were."""
    row["selected"] = row["selected"] + found.need
    if statistics:
        row["chosen_u"] = row["chosen_u"] + found.need / found.among.clamp(min=1) * row["equal_u"]

