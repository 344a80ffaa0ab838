"""Which shards are stepped in one go (`together.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AdamRule, Item, LionRule, Selection, SGDRule
from .how import How
from .ties import ONE_ROUND

JOINED = {"cuda"}
"""Kinds of devices. What it saves is launches; on a CPU, where those cost nothing, it took four times as long as one
tensor after the other, whose numbers stay in the caches: 1.44 s for 8 tensors of 1024 × 1024 and top-K, not 0.25."""


def wanted(selection: Selection, numel: int) -> int:
    """How many of a tensor's elements top-K takes."""
    return int(selection.fraction * numel)


def momentum_of(item: Item, how: How) -> Tensor | None:
    """Where the rule keeps it."""
    if isinstance(how.rule, SGDRule):
        return item.state.get("momentum_buffer") if how.rule.momentum != 0 else None
    return item.state.get("exp_avg")


def can_be(item: Item, how: How) -> bool:
    """Whether a tensor is stepped like this: the same on all ranks, also on those that have nothing of it."""
    selection, strength, shard = how.selection, how.strength, item.shard
    assert shard is not None
    if item.param.device.type not in JOINED:
        return False
    if how.draw.stochastic or strength.still or strength.estimate == "sampled" or item.param.dtype == torch.float64:
        return False
    if shard.cut != 0 or not shard.stretches or shard.cells > ONE_ROUND:
        return False
    if strength.kind not in ("fixed", "mean_preserving", "norm_preserving") or not _is_plain(item, how):
        return False
    momentum = momentum_of(item, how)
    if how.by_previous and momentum is None:
        return False
    if how.reads_momentum or (selection.kind == "agreement" and selection.product == "momentum"):
        if momentum is None or momentum.dtype != torch.float32:  # it is read after it was stored
            return False
    if selection.kind == "top_k":
        return selection.score == "update" and selection.quantile == "exact" and wanted(selection, shard.numel) > 0
    return selection.kind == "agreement"


def _is_plain(item: Item, how: How) -> bool:
    """Whether the rule's update does not look at the parameter, and its state is there."""
    rule = how.rule
    if isinstance(rule, AdamRule):
        return rule.decoupled or rule.weight_decay == 0
    if isinstance(rule, SGDRule):
        return rule.weight_decay == 0 and (rule.momentum == 0 or item.state.get("momentum_buffer") is not None)
    return isinstance(rule, LionRule) and rule.weight_decay == 0
