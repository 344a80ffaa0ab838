"""Which shards are stepped by Triton kernels, many in one go (`kernels/gpu/sharded/step.py`).

For what is trained most: an agreement with the gradient or exact top-K, and a strength that is fixed or keeps the mean
or the norm. Ranks have to answer alike, also those that have nothing of a tensor: only what is the same everywhere
counts.
"""

from __future__ import annotations

from ..spec import AdamRule, GivenRule, Item, Selection, SGDRule
from .how import How
from .ties import ONE_ROUND


def wanted(selection: Selection, numel: int) -> int:
    """How many of a tensor's elements top-K takes."""
    return int(selection.fraction * numel)


def can_be(item: Item, how: How) -> bool:
    """Whether a tensor is stepped like this, where there are kernels for its dtypes and device."""
    selection, strength, shard = how.selection, how.strength, item.shard
    assert shard is not None
    if isinstance(how.rule, GivenRule) or how.draw.stochastic or strength.still or strength.estimate == "sampled":
        return False
    if strength.kind not in ("fixed", "mean_preserving", "norm_preserving") or shard.numel >= 1 << 31:
        return False
    if selection.kind == "top_k":
        by_rows = shard.cut == 0 and shard.stretches and shard.cells <= ONE_ROUND
        return by_rows and selection.quantile == "exact" and wanted(selection, shard.numel) > 0
    return selection.kind == "agreement"


def kind_of(item: Item, how: How) -> tuple[object, ...]:
    """What has to be equal for one kernel to step tensors together: of the state, what the rule reads."""
    rule, names = how.rule, ["exp_avg"]
    if isinstance(rule, AdamRule):
        names += ["exp_avg_sq", "max_exp_avg_sq"] if rule.amsgrad else ["exp_avg_sq"]
    if isinstance(rule, SGDRule):
        names = ["momentum_buffer"] if rule.momentum != 0 else []
    state = [item.state.get(name) for name in names]
    on_host = isinstance(rule, AdamRule) and item.state["step"].device.type == "cpu"
    return item.param.dtype, item.grad.dtype, *(None if x is None else x.dtype for x in state), on_host
