"""Selective decay in the jobs of a step: its factor, and the coordinates that it reaches where no kernel finds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from selective.base.hyperparameters import plain_number
from selective.capture.job import Job, StepContext
from selective.kernels import decaying, drawn_like, spec
from selective.kernels.sharded.own_code import run_alone, sum_over_shards
from selective.policies.decay import Decay


def own_factor(decay: Decay | None, group: dict[str, Any]) -> spec.Scalar | None:
    """Return 1 - lr · λ for a decay with a λ of its own; None if the base's factor holds."""
    if decay is None or decay.weight_decay is None:
        return None
    return 1.0 - plain_number(group["lr"]) * decay.weight_decay


def with_own_factor(rule: spec.Rule, decay: Decay | None, group: dict[str, Any]) -> spec.Rule:
    """Return the rule of a base that does not decay, with the factor of `decay` if that has a λ of its own."""
    if decay is None or decay.weight_decay is None:
        return rule
    if isinstance(rule, spec.AdamRule):  # it computes the factor from its rate, which may be on a GPU
        return replace(rule, decoupled=True, weight_decay=decay.weight_decay)
    factor = own_factor(decay, group)
    assert factor is not None
    if isinstance(rule, spec.LionRule):
        return replace(rule, decay_factor=factor)
    return replace(rule, factor=factor)


def decaying_coordinates(
    decay: Decay,
    kernel_decay: spec.Decay,
    item: spec.Item,
    rule: spec.Rule,
    update: Tensor,
    mask: Tensor,
    grad: Tensor,
    context: StepContext,
) -> Tensor:
    """Return True at the coordinates of one parameter that decay, in plain torch; arguments as for `decaying`.

    A random control needs the count over all ranks, which each rank asks for in the order of the parameters.
    """
    chosen = decaying(kernel_decay, item, rule, update, mask, grad)
    if not decay.at_random:
        return chosen
    count, numel, shard = chosen.sum(), chosen.numel(), item.shard
    if shard is not None:
        count, numel = run_alone(sum_over_shards([count], shard), shard.group)[0], shard.numel
    return drawn_like(chosen, count, numel, context.draw, item.address, shard)


@contextmanager
def bases_without_decay(jobs: Iterable[Job]) -> Iterator[None]:
    """Switch decoupled decay off in the base's groups whose decay is selective, while the base steps.

    Then the difference that it makes is the update alone. To subtract the decay from a difference would leave rounding
    errors where the update is 0, and their signs would decide. The factors are known by then.
    """
    groups = {
        id(job.group): job.group
        for job in jobs
        if job.decay is not None and job.facts.decay == "decoupled" and "weight_decay" in job.group
    }
    before = {key: group["weight_decay"] for key, group in groups.items()}
    for group in groups.values():
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for key, group in groups.items():
            group["weight_decay"] = before[key]
