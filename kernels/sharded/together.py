"""Shards of many tensors in one go: as many operations for a thousand tensors as for one.

For what is trained most: float32 arithmetic, an agreement with the gradient or top-K of update times gradient, a
strength that is fixed or keeps the mean or the norm, shards that are stretches of the whole (by rows). `work.py` does
everything else, one tensor after the other, and the same as here.

    the rule, by the kernels for whole tensors, on zeros, which leaves -u; scores, or what agrees
    the K-th scores and the ties (as in `ranking.py` and `ties.py`), the sums, what is taken of the ties
    the mask; the parameters, by the kernels for whole tensors

Memory while it lasts: u, the ranks (or what agrees) and which tensor it is, 12 bytes an element of the rank's shards (9
without ranks), and some 40 bytes an element of a part of `slices.PART` elements.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference.rules import decay_factor
from ..reference.strengths import Parts, multipliers
from ..spec import Draw, GivenRule, Item, ItemList, LionRule, Selection, Strength, Sums, SumsTable
from . import counting
from .how import How
from .joinable import momentum_of, wanted
from .ranking import key_of
from .slices import Slice, segment_sums, slices, upload
from .sums import WIDTH, digits, number

EVERYTHING = (Selection("everything"), Strength("fixed", 1.0, 1.0))
Step = Generator[Tensor, Tensor, Sequence[Sums] | None]
Row = dict[str, Tensor]  # the sums of all tensors, float64 [tensors], by their names


class Together:
    """All of a step's tensors of one group of processes and one device."""

    def __init__(self, items: Sequence[Item], how: How, local_step: Callable[..., Any], cache: dict[Any, Any]) -> None:
        self.items, self.how, self.local_step, self.cache = items, how, local_step, cache
        self.device = items[0].param.device
        self.shards = [item.shard for item in items if item.shard is not None]
        lengths = [item.param.numel() for item in items]
        self.numels = upload([shard.numel for shard in self.shards], self.device)
        self.counted = upload([int(shard.counted) for shard in self.shards], self.device)
        self.slices = slices(lengths, self.device)
        self.moving: Tensor | None = None  # how many previous momenta are not 0
        if how.by_previous:  # before they move
            self._choose(self.momentum)
            self.moving = self._per_tensor(lambda some: self.momentum(some) != 0)
        self.update = torch.zeros(sum(lengths), dtype=torch.float32, device=self.device)
        self.views = [x.view(i.param.shape) for x, i in zip(self.update.split(lengths), items, strict=True)]
        self._advance()
        if how.selection.kind == "top_k":
            for some in self.slices:
                some.key = key_of(self.gradient(some).mul_(self.u(some)))
        elif not how.by_previous:
            self._choose(self.u if how.selection.product == "update" else self.momentum)

    def _advance(self) -> None:
        """The rule on zeros, without decay of the parameter; then u from the -u that is left."""
        rule: Any = replace(self.how.rule, weight_decay=0.0)
        rule = replace(rule, decay_factor=1.0) if isinstance(rule, LionRule) else rule
        made = [replace(item, param=view, shard=None) for item, view in zip(self.items, self.views, strict=True)]
        self._run("advance", made, rule)
        self.update.neg_()

    def _run(self, name: str, made: list[Item], rule: Any) -> None:
        """A step of everything by the kernels for whole tensors, whose tables are kept from step to step."""
        kept = ItemList(made)
        kept.cache = self.cache.setdefault(name, kept.cache)
        self.local_step(kept, rule=rule, selection=EVERYTHING[0], strength=EVERYTHING[1], draw=Draw(0, 0),
                        statistics=False)  # fmt: skip

    # --- of a slice, 1-d ---

    def gradient(self, some: Slice) -> Tensor:
        """As the base sees it, float32; a copy."""
        flat = torch.cat([item.grad.reshape(-1) for item in self.items[some.first : some.last]]).to(torch.float32)
        return flat.neg_() if getattr(self.how.rule, "maximize", False) else flat

    def momentum(self, some: Slice) -> Tensor:
        """As it is now, float32; a copy."""
        found = [momentum_of(item, self.how) for item in self.items[some.first : some.last]]
        return torch.cat([x.reshape(-1) for x in found if x is not None]).to(torch.float32)

    def u(self, some: Slice) -> Tensor:
        return self.update[some.start : some.stop]

    def _choose(self, factor: Callable[[Slice], Tensor]) -> None:
        """What agrees with the gradient."""
        for some in self.slices:
            product = self.gradient(some).mul_(factor(some))
            some.chosen = product > 0 if self.how.selection.strict else product >= 0

    # --- sums ---

    def _per_tensor(self, of: Callable[[Slice], Tensor]) -> Tensor:
        """The sum of something over each tensor, float64: the same bits in every run."""
        return torch.cat([segment_sums(of(some), some) for some in self.slices])

    def sums(self, found: counting.Found | None) -> Tensor:
        """This process's part of `How.columns`: float64 [tensors, columns]; what is not settled is not counted yet."""
        rows = torch.cat([torch.stack(self._sums_of(some, found), 1) for some in self.slices])
        return torch.where(self.counted[:, None] > 0, rows, 0.0)

    def _sums_of(self, some: Slice, found: counting.Found | None) -> list[Tensor]:
        """Each column, of a slice's tensors."""
        how, u = self.how, self.u(some)
        chosen = some.chosen if found is None else found.above(some)
        assert chosen is not None
        terms = {"selected": chosen}
        if how.statistics:
            gradient, squares = self.gradient(some), u.square()
            terms |= {"update_sq": squares, "update_grad": gradient * u, "grad_sq": gradient.square_()}
            terms["chosen_u"] = torch.where(chosen, squares, 0.0)
            if found is not None:
                terms["equal_u"] = torch.where(found.equal(some), squares, 0.0)
        if how.strength_waits:
            of = {"update": self.u, "momentum": self.momentum, "gradient": self.gradient}[how.strength.of]
            squares = of(some).square()
            terms |= {"chosen_sq": torch.where(chosen, squares, 0.0), "others_sq": torch.where(chosen, 0.0, squares)}
        sums = {name: segment_sums(x, some) for name, x in terms.items()}
        if self.moving is not None:
            sums["moving"] = self.moving[some.first : some.last]
        return [sums[name] for name in how.columns]

    # --- with everybody's sums ---

    def complete(self, row: Row, found: counting.Found | None) -> None:
        """What follows from the sums: the ties that were taken, tensors that are selected everywhere."""
        if found is not None and not self.how.strength_waits:
            row["selected"] = row["selected"] + found.need
            if self.how.statistics:  # of the ties' squares the share that was taken
                row["chosen_u"] = row["chosen_u"] + found.need / found.among.clamp(min=1) * row["equal_u"]
        if self.how.statistics:
            row["others_u"] = row["update_sq"] - row["chosen_u"]
        if not self.how.by_previous:
            return
        first = row["moving"] == 0  # the previous momentum is zero everywhere
        for some in self.slices:
            assert some.chosen is not None
            some.chosen = some.chosen | first[some.seg]
        row["selected"] = torch.where(first, self.numels.to(torch.float64), row["selected"])
        for chosen, others in (("chosen_u", "others_u"), ("chosen_sq", "others_sq")):
            if chosen in row:
                row[chosen] = torch.where(first, row[chosen] + row[others], row[chosen])
                row[others] = torch.where(first, 0.0, row[others])

    def finish(self, row: Row | None) -> SumsTable | None:
        """Strengths, the mask, the parameters."""
        known = row or {}
        parts = Parts(
            self.numels, selected=known.get("selected"), selected_sq=known.get("chosen_sq"),
            rest_sq=known.get("others_sq"),
        )  # fmt: skip
        above, below = multipliers(self.how.strength, parts, {}, self.device)
        above, below = above.expand(len(self.items)), below.expand(len(self.items))
        for some in self.slices:
            assert some.chosen is not None
            high, low = above.to(torch.float32)[some.seg], below.to(torch.float32)[some.seg]
            self.u(some).mul_(torch.where(some.chosen, high, low))
        made = [
            replace(item, state={"update": view, "start": item.param}, shard=None)
            for item, view in zip(self.items, self.views, strict=True)
        ]
        self._run("land", made, GivenRule(decay_factor(self.how.rule)))
        if row is None or not self.how.statistics:
            return None
        masked = above * above * row["chosen_u"] + below * below * row["others_u"]
        names = ("update_sq", "grad_sq", "update_grad")
        values = torch.stack([row["selected"], above, below, *(row[name] for name in names), masked], 1)
        return SumsTable(values, [shard.numel for shard in self.shards])


def step(items: Sequence[Item], how: How, local_step: Callable[..., Any], cache: dict[Any, Any]) -> Step:
    """A part of a sharded step (`exchange.py`). `cache`: the same in every step of these tensors."""
    tensors = Together(items, how, local_step, cache)
    found: counting.Found | None = None
    answer = torch.zeros(0, dtype=torch.int32, device=tensors.device)
    if how.selection.kind == "top_k":
        counts = [wanted(how.selection, shard.numel) for shard in tensors.shards]
        found = yield from counting.find(tensors.slices, counts, tensors.counted)
        if how.needs_sums and not how.strength_waits:  # they travel with the ties
            answer = digits(tensors.sums(found)).reshape(-1)
        answer = yield from counting.settle(tensors.slices, found, tensors.shards, tensors.counted, answer)
    if how.needs_sums and (found is None or how.strength_waits):
        answer = yield digits(tensors.sums(None)).reshape(-1)
    if not how.needs_sums:
        return tensors.finish(None)
    columns = number(answer.reshape(len(items), len(how.columns), WIDTH)).unbind(1)
    row = dict(zip(how.columns, columns, strict=True))
    tensors.complete(row, found)
    return tensors.finish(row)
