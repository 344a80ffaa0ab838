"""The lines of `explain()` on sharded parameters: how many there are, and what a step sends for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selective.capture.choose import Capture
from selective.capture.own_code import sees_whole
from selective.kernels import GivenRule, spec
from selective.kernels.sharded import count_rounds, has_gpu_kernel, is_local
from selective.policies import Dense, Policy
from selective.policies.kernel_terms import specs_on
from selective.sharding.dtensor import is_dtensor, local_of, shard_of


def explain_shards(group: dict[str, Any], policy: Policy, capture: Capture, scope: str, statistics: bool) -> str | None:
    """One line of a group; None where nothing of it is on other ranks."""
    if isinstance(policy, Dense) and capture.way == "dense":
        count = sum(is_dtensor(p) for p in group["params"])
        return f"{count:,} of {len(group['params']):,} tensors are DTensors; the base's own step" if count else None
    found = [(p, shard) for p in group["params"] if (shard := shard_of(p)) is not None]
    if not found:
        return None
    some = f"{len(found):,} of {len(group['params']):,} tensors"
    if scope == "local":
        return f"{some}, each rank's shard selected from as if it were a whole tensor (scope='local'): no collectives"
    if specs_on(policy, [p for p, _ in found]) is None:
        return f"{some}; {_own_code(policy, found, statistics)}"
    return f"{some}, selected from as one device would: {_collectives(policy, found, statistics)}"


def in_plain_torch(policy: Policy, params: list[Tensor], rule: spec.Rule, stochastic: bool) -> bool:
    """True if one of these is a shard that is stepped together with other ranks, without Triton kernels."""
    specs = specs_on(policy, params)
    if specs is None:
        return False
    how = spec.StepSpec(rule, *specs, spec.Draw(0, 0, stochastic))
    shards = [(local_of(p), shard) for p in params if (shard := shard_of(p)) is not None]
    return not is_local(how) and any(
        not has_gpu_kernel(spec.Item(p, p, {}, 0, shard=shard), how) for p, shard in shards
    )


def _own_code(policy: Policy, found: list[tuple[Tensor, spec.Shard]], statistics: bool) -> str:
    name = type(policy).__name__
    whole = [shard.numel for _, shard in found if sees_whole(policy, shard)]
    if not whole:
        return f"{name} has code of its own, which runs on each rank's shard (scope = {policy.scope!r})"
    tensors = len(policy.needs() | ({"update", "grad"} if statistics else set()))
    return (
        f"{name} has code of its own, which sees whole tensors (scope = {policy.scope!r}): {tensors} for each of "
        f"{len(whole):,} parameters are gathered in every step, {tensors * sum(whole):,} numbers"
    )


def _collectives(policy: Policy, found: list[tuple[Tensor, spec.Shard]], statistics: bool) -> str:
    specs = specs_on(policy, [p for p, _ in found])
    assert specs is not None
    how = spec.StepSpec(GivenRule(), *specs, spec.Draw(0, 0), statistics)
    groups: dict[int, list[tuple[Tensor, spec.Shard]]] = {}
    for p, shard in found:
        groups.setdefault(id(shard.group), []).append((p, shard))
    rounds = []
    for some in groups.values():
        dtypes = {p.dtype for p, _ in some}
        rounds.append(max(count_rounds(how, [s for p, s in some if p.dtype == dtype], dtype) for dtype in dtypes))
    if not any(rounds):
        return "no collectives"
    many = f", in each of {len(rounds)} meshes" if len(rounds) > 1 else ""
    return f"{max(rounds)} small all-reduce{'s' if max(rounds) > 1 else ''} a step{many}, with all other groups"
