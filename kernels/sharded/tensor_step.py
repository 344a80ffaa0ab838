"""One tensor's part of a sharded step: what it adds to the sums, and what it makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.random import sample_positions
from ..reference.rules import Advanced, apply_mask
from ..reference.selections import score_of
from ..reference.shard_indices import bits_at, element_bits, local_places
from ..reference.strengths import Parts, multipliers, total
from ..spec import Item, Shard, Sums, refuse_kind
from .gpu_path import wanted
from .how import How
from .top_k import Ranked, key_of, selected


def select_everything(found: dict[str, Tensor], numel: float | Tensor) -> Tensor:
    """The sums, in place, where the previous momentum was zero everywhere: all is selected then. Returns where."""
    first = found["moving"] == 0
    found["selected"] = torch.where(first, numel, found["selected"])
    for chosen, others in (("chosen_u", "others_u"), ("chosen_sq", "others_sq")):
        if chosen in found:
            found[chosen] = torch.where(first, found[chosen] + found[others], found[chosen])
            found[others] = torch.where(first, 0.0, found[others])
    return first


class Work:
    """One tensor, whose moments have moved.

    In order: where it has something to rank, `ranking.find` and `ties.settle` on `ranked`, and `after_ranking` after
    each; `sums`, before the ties are settled or after; `finish`.
    """

    def __init__(self, item: Item, how: How, moved: Advanced) -> None:
        assert item.shard is not None
        self.item, self.how, self.moved, self.shard = item, how, moved, item.shard
        self.device = item.param.device
        self.k = wanted(how.selection, self.shard.numel) if how.selection.kind == "top_k" else -1
        self.ranked: Ranked | None = None
        self.score_key: Tensor | None = None  # where only a sample is ranked
        self.chosen = self._select()
        self.moving: Tensor | None = None  # how many previous momenta are not 0
        if how.by_previous:
            assert moved.previous_momentum is not None
            self.moving = total(moved.previous_momentum != 0)
        # all tensors' steps are kept until the sums are there: what is not read again makes room
        momentum = moved.momentum if how.reads_momentum else None
        self.moved = Advanced(moved.grad, moved.update, momentum, None)

    def _select(self) -> Tensor:
        """The selected; of what is ranked nothing yet, of an agreement with the previous momentum those that agree."""
        kind, param, moved = self.how.selection.kind, self.item.param, self.moved
        if kind == "everything" or self.k == 0:
            return torch.ones_like(param, dtype=torch.bool)
        if kind == "top_k":
            self._rank()
            return torch.zeros_like(param, dtype=torch.bool)
        if kind == "bernoulli":
            return self._drawn()
        if kind != "agreement":
            refuse_kind("the sharded step", "selection", kind)
        product = self.how.selection.product
        x = {"update": moved.update, "momentum": moved.momentum, "previous_momentum": moved.previous_momentum}[product]
        assert x is not None
        return x * moved.grad > 0 if self.how.selection.strict else x * moved.grad >= 0

    def _drawn(self) -> Tensor:
        selection, shard, param = self.how.selection, self.shard, self.item.param
        limit = round(selection.probability * 2**24)
        if selection.unit == "element":
            bits = element_bits(shard, self.how.draw, self.item.address, self.device)
            return (bits < limit).reshape(param.shape)
        if selection.unit == "row" and shard.shape:
            rows = Shard(shard.shape[:1], shard.runs[:1], shard.group)
            bits = element_bits(rows, self.how.draw, self.item.address, self.device)
            return (bits < limit).reshape(-1, *[1] * (param.dim() - 1)).expand(param.shape)
        first = torch.zeros([1] * param.dim(), dtype=torch.int64, device=self.device)
        return (bits_at(self.how.draw, self.item.address, first, 1) < limit).expand(param.shape)

    def _rank(self) -> None:
        score = score_of(self.how.selection, self.how.rule, self.moved).reshape(-1)
        sample = self._sample() if self.how.selection.quantile == "sampled" else None
        if sample is None:
            self.ranked = Ranked(key_of(score), self.k, self.shard)
            return
        places, here, size = sample
        self.score_key = key_of(score)
        some = score[places] if score.numel() else score.new_zeros(places.numel())
        key = key_of(torch.where(torch.isnan(some), -torch.inf, some))
        key = torch.where(here, key, torch.iinfo(key.dtype).min)  # elsewhere: counted there
        rank = max(int(self.how.selection.fraction * size), 1)
        self.ranked = Ranked(key, rank, self.shard, ties=False)

    def _sample(self) -> tuple[Tensor, Tensor, int] | None:
        """Local places of the whole tensor's sample, which of them are here, and its size; None: it is everything."""
        positions = sample_positions(self.how.draw, self.item.address, self.shard.numel, self.device)
        return None if positions is None else (*local_places(self.shard, positions), positions.numel())

    def after_ranking(self, settled: bool) -> None:
        """Take what the ranking has found: all that are selected, or (not `settled`) those above the K-th."""
        one = self.ranked
        if one is None:
            return
        if self.score_key is not None:
            assert one.prefix is not None and one.need is not None
            valid = self.score_key != torch.iinfo(self.score_key.dtype).min
            chosen = (self.score_key >= one.prefix) & valid
        elif settled:
            chosen = selected(one)
        else:
            assert one.prefix is not None and one.need is not None
            chosen = (one.key > one.prefix) & (one.need > 0)
        self.chosen = chosen.reshape(self.item.param.shape)

    def sums(self) -> Tensor:
        """This process's part of `How.columns`: float64, 1-d."""
        m, how = self.moved, self.how
        found = {"selected": total(self.chosen)}
        if how.statistics:
            found |= {"update_sq": total(m.update * m.update), "update_grad": total(m.update * m.grad)}
            squares = m.update * m.update
            if how.strength.still and self.k != 0:
                squares = torch.where(m.update * m.grad == 0, 0.0, squares)
            found |= {
                "chosen_u": total(torch.where(self.chosen, squares, 0.0)),
                "others_u": total(torch.where(self.chosen, 0.0, squares)),
            }
            if self._is_open:
                assert self.ranked is not None
                equal = (self.ranked.key == self.ranked.prefix).reshape(squares.shape)
                found["equal_u"] = total(torch.where(equal, squares, 0.0))
        if how.statistics or how.strength.kind == "alignment":
            found["grad_sq"] = total(m.grad * m.grad)
        if how.strength.kind == "alignment":
            assert m.momentum is not None
            found |= {"dot": total(m.momentum * m.grad), "momentum_sq": total(m.momentum * m.momentum)}
        if self.moving is not None:
            found["moving"] = self.moving
        if how.strength_waits:
            found |= self._strength_sums()
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        row = torch.stack([found.get(name, zero) for name in how.columns])
        return row if self.shard.counted else torch.zeros_like(row)

    @property
    def _is_open(self) -> bool:
        """Whether it is not known yet which of those that are equal to the K-th are selected."""
        return self.ranked is not None and self.ranked.ties and self.ranked.taken is None

    def _strength_sums(self) -> dict[str, Tensor]:
        """Squares (of a sample, where the estimate is one) of the selected and of the others; a sample's count."""
        strength, m = self.how.strength, self.moved
        chosen = self.chosen.reshape(-1)
        x = {"update": m.update, "momentum": m.momentum, "gradient": m.grad}[strength.of]
        x = chosen.to(torch.float32) if strength.kind == "mean_preserving" or x is None else x.reshape(-1)
        here = torch.ones_like(chosen)
        sample = self._sample() if strength.estimate == "sampled" else None
        if sample is not None:
            places, here, _ = sample
            empty = chosen.numel() == 0
            chosen = torch.zeros_like(here) if empty else chosen[places]
            x = x.new_zeros(places.numel()) if empty else x[places]
        squares = torch.where(here, x * x, 0.0)
        return {
            "chosen_sq": total(torch.where(chosen, squares, 0.0)),
            "others_sq": total(torch.where(chosen, 0.0, squares)),
        }

    def finish(self, found: dict[str, Tensor] | None) -> Sums | None:
        """Strengths from the whole tensor's sums, the mask, the parameter."""
        how, m, item = self.how, self.moved, self.item
        state = item.policy_state
        if found is not None and how.statistics and "others_u" not in found:
            found["others_u"] = (found["update_sq"] - found["chosen_u"]).clamp(min=0)
        if found is not None and self._was_open:
            self._close(found)
        if found is not None and how.by_previous:
            self._first_step(found)
        above, below = multipliers(how.strength, self._parts(found), state, self.device)
        if self.k == 0:
            above, below = torch.ones_like(above), torch.ones_like(below)
        dtype = m.update.dtype
        mask = torch.where(self.chosen, above.to(dtype), below.to(dtype))
        if how.strength.still and self.k != 0:
            mask = torch.where(m.update * m.grad == 0, 0.0, mask)
        sums = None
        if how.statistics:
            assert found is not None
            masked = above * above * found["chosen_u"] + below * below * found["others_u"]
            sums = Sums(
                self.shard.numel, found["selected"], above, below, found["update_sq"], found["grad_sq"],
                found["update_grad"], masked,
            )  # fmt: skip
        apply_mask(item, how.rule, m.update, mask, how.draw)
        return sums

    @property
    def _was_open(self) -> bool:
        """Whether the sums were made before the ties were settled."""
        return self.ranked is not None and self.ranked.ties and not self.how.strength_waits

    def _close(self, found: dict[str, Tensor]) -> None:
        """Add the ties that were taken; their squares by their number, where only some were."""
        one = self.ranked
        assert one is not None and one.need is not None and one.among is not None
        found["selected"] = found["selected"] + one.need
        if not self.how.statistics:
            return
        share = one.need / one.among.clamp(min=1) * found["equal_u"]
        found["chosen_u"], found["others_u"] = found["chosen_u"] + share, (found["others_u"] - share).clamp(min=0)

    def _first_step(self, found: dict[str, Tensor]) -> None:
        """A tensor whose previous momentum is zero everywhere is selected everywhere."""
        self.chosen = self.chosen | select_everything(found, float(self.shard.numel))

    def _parts(self, found: dict[str, Tensor] | None) -> Parts:
        strength, numel = self.how.strength, self.shard.numel
        if found is None or strength.kind == "fixed":
            return Parts(numel)
        if strength.kind == "alignment":
            return Parts(numel, dot=found["dot"], momentum_sq=found["momentum_sq"], grad_sq=found["grad_sq"])
        sample = self._sample() if strength.estimate == "sampled" else None
        if strength.kind == "mean_preserving":
            sampled = strength.estimate == "sampled"
            return Parts(numel if sample is None else sample[2], selected=found["chosen_sq" if sampled else "selected"])
        if strength.kind != "norm_preserving":
            refuse_kind("the sharded step", "strength", strength.kind)
        return Parts(numel, selected_sq=found["chosen_sq"], rest_sq=found["others_sq"])
