"""Selections of one shard, so that together the ranks select what the reference selects of the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.rules import Advanced
from ..reference.selections import score_of
from ..reference.shard_indices import bits_at, element_bits, local_sample
from ..shard import Shard
from ..spec import Item, StepSpec, refuse_kind
from .top_k import Ranked, key_of, selected


class ShardSelection:
    """The selected coordinates of one tensor's shard: `chosen`, a bool tensor shaped like the local parameter.

    A top-K is known after two searches of all ranks together, for `ranked`: `top_k.find`, then `ties.settle`. Call
    `after_ranking` after each; before the first, nothing of a top-K is selected. An agreement with the previous
    momentum is complete after `select_all`, which adds the first step, in which everything is selected.
    """

    def __init__(self, item: Item, spec: StepSpec, moved: Advanced) -> None:
        assert item.shard is not None
        self.item, self.spec, self.shard, self.device = item, spec, item.shard, item.param.device
        selection = spec.selection
        self.k = selection.k_of(self.shard.numel) if selection.kind == "top_k" else -1  # of the whole; 0: it is dense
        self.ranked: Ranked | None = None
        self.score_key: Tensor | None = None  # the keys of all local scores, if only a sample is ranked
        self.chosen = self._select(moved)

    def _select(self, moved: Advanced) -> Tensor:
        kind, param = self.spec.selection.kind, self.item.param
        if kind == "everything" or self.k == 0:
            return torch.ones_like(param, dtype=torch.bool)
        if kind == "top_k":
            self._rank(moved)
            return torch.zeros_like(param, dtype=torch.bool)
        if kind == "bernoulli":
            return self._bernoulli()
        if kind != "agreement":
            refuse_kind("the sharded step", "selection", kind)
        product = self.spec.selection.product
        x = {"update": moved.update, "momentum": moved.momentum, "previous_momentum": moved.previous_momentum}[product]
        assert x is not None
        return x * moved.grad > 0 if self.spec.selection.strict else x * moved.grad >= 0

    def _bernoulli(self) -> Tensor:
        selection, shard, param = self.spec.selection, self.shard, self.item.param
        draw, address, limit = self.spec.draw, self.item.address, selection.random_limit
        if selection.unit == "element":
            return (element_bits(shard, draw, address, self.device) < limit).reshape(param.shape)
        if selection.unit == "row" and shard.shape:
            rows = Shard(shard.shape[:1], shard.runs[:1], shard.group)
            numbers = element_bits(rows, draw, address, self.device)
            return (numbers < limit).reshape(-1, *[1] * (param.dim() - 1)).expand(param.shape)
        first = torch.zeros([1] * param.dim(), dtype=torch.int64, device=self.device)
        return (bits_at(draw, address, first, 1) < limit).expand(param.shape)

    def _rank(self, moved: Advanced) -> None:
        """Prepare the search for the K-th score, or for that of the sample."""
        selection = self.spec.selection
        score = score_of(selection, self.spec.rule, moved).reshape(-1)
        sample = None
        if selection.quantile == "sampled":
            sample = local_sample(self.shard, self.spec.draw, self.item.address, self.device)
        if sample is None:
            self.ranked = Ranked(key_of(score), self.k, self.shard)
            return
        places, here, size = sample
        self.score_key = key_of(score)
        some = score[places] if score.numel() else score.new_zeros(places.numel())
        key = key_of(torch.where(torch.isnan(some), -torch.inf, some))
        key = torch.where(here, key, torch.iinfo(key.dtype).min)  # a score on another rank is counted there
        self.ranked = Ranked(key, max(selection.k_of(size), 1), self.shard, ties=False)

    def after_ranking(self, settled: bool) -> None:
        """Select what the search has found: those above the K-th, and if ties are `settled`, those of them as well."""
        ranked = self.ranked
        if ranked is None:
            return
        assert ranked.prefix is not None and ranked.need is not None
        if self.score_key is not None:
            chosen = (self.score_key >= ranked.prefix) & (self.score_key != torch.iinfo(self.score_key.dtype).min)
        elif settled:
            chosen = selected(ranked)
        else:
            chosen = (ranked.key > ranked.prefix) & (ranked.need > 0)
        self.chosen = chosen.reshape(self.item.param.shape)

    def select_all(self, where: Tensor) -> None:
        """Select everything if `where` (bool, 0-d) is true."""
        self.chosen = self.chosen | where

    @property
    def has_ties(self) -> bool:
        """True if scores that equal the K-th are told apart by index."""
        return self.ranked is not None and self.ranked.ties

    @property
    def ties_are_open(self) -> bool:
        """True as long as it is not known which of the scores that equal the K-th are selected."""
        return self.ranked is not None and self.ranked.ties and self.ranked.taken is None
