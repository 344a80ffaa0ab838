"""Says which shards are stepped by Triton kernels, many in one launch (`kernels/gpu/sharded/step.py`).

These are the steps that are trained with most: an agreement with the gradient or exact top-K, and a strength that is
fixed or keeps the mean or the norm. All ranks have to answer alike, also those that have nothing of a tensor, so only
facts that are the same on all ranks count.
"""

from __future__ import annotations

from ..spec import GivenRule, Item, StepSpec
from .ties import ONE_ROUND


def has_gpu_kernel(item: Item, spec: StepSpec) -> bool:
    """True if the Triton kernels can step this shard, provided that they can take its dtypes and device."""
    selection, strength, shard = spec.selection, spec.strength, item.shard
    assert shard is not None
    if isinstance(spec.rule, GivenRule) or spec.draw.stochastic or strength.still or strength.estimate == "sampled":
        return False
    if strength.kind not in ("fixed", "mean_preserving", "norm_preserving") or shard.numel >= 1 << 31:
        return False
    if selection.kind == "top_k":
        by_rows = shard.cut == 0 and shard.stretches and shard.cells <= ONE_ROUND
        return by_rows and selection.quantile == "exact" and not selection.leaves_dense(shard.numel)
    return selection.kind == "agreement"


def kind_of(item: Item, spec: StepSpec) -> tuple[object, ...]:
    """A key that is equal for shards that one launch can step together: dtypes, and where the step is counted."""
    state = [item.state.get(name) for name in spec.rule.state_names]
    on_host = spec.rule.counts_steps and item.state["step"].device.type == "cpu"
    return item.param.dtype, item.grad.dtype, *(None if x is None else x.dtype for x in state), on_host
