"""The step of small tensors together, where every coordinate gets the same multiplier and nothing is reported.

A tensor alone takes some 20 calls of torch, each longer than its work if the tensor is small. Here the rule and the
write to the parameters are a few calls for as many tensors as a chunk has room for. Each element goes through the
operations of `Step`, so that the results are the same bits. The writes to rotated parameters in float32 come here,
whatever their policy, and so does the rule of a rotated group without a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.rules import decay_factor, number
from ..spec import AdamRule, GivenRule, Item, SGDRule, StepSpec
from .chunks import buffers, chunk, rounded
from .rules import fused_kernel, move_by_adam, move_by_sgd

many_of: Any = torch  # has the multi-tensor functions, for which torch declares no types


def is_uniform(spec: StepSpec) -> bool:
    """True if every coordinate gets the same multiplier, and nothing but the parameter's step is asked for."""
    selection, strength, rule = spec.selection, spec.strength, spec.rule
    if selection.kind != "everything" or selection.control is not None or spec.decay is not None or spec.statistics:
        return False
    if strength.kind != "fixed" or strength.still:
        return False
    if isinstance(rule, GivenRule):
        return rule.negated and rule.offset == 0
    if not isinstance(rule, (AdamRule, SGDRule)):
        return False
    if rule.coupled_decay != 0 or rule.maximize or isinstance(number(rule.lr), Tensor):
        return False
    return fused_kernel(rule) is not None


def step_together(items: Sequence[Item], spec: StepSpec) -> list[Item]:
    """Step all tensors for which it can be done together, and return the others. `spec` is uniform."""
    rule, others = spec.rule, list[Item]()
    assert isinstance(rule, (AdamRule, SGDRule, GivenRule))
    names = ("update", "start") if isinstance(rule, GivenRule) else rule.state_names
    multiplier, factor = rounded(spec.strength.selected), float(number(decay_factor(rule)))
    for batch in _batches(items, names, others):
        if isinstance(rule, GivenRule):
            minus_updates = [item.state["update"] for item in batch]
        else:
            minus_updates = _moved(batch, rule)
        if multiplier != 1:
            minus_updates = many_of._foreach_mul(minus_updates, multiplier)
        for item, minus_update in zip(batch, minus_updates, strict=True):
            start = item.state["start"] if isinstance(rule, GivenRule) else item.param
            torch.add(minus_update, start, alpha=factor, out=item.param)
    return others


def _batches(items: Sequence[Item], names: Sequence[str], others: list[Item]) -> list[list[Item]]:
    """Divide items into lists of at most a chunk's elements. Those that are stepped alone are added to `others`."""
    batches, count, most = list[list[Item]](), 0, chunk()
    for item in items:
        numel = item.param.numel()
        if not 0 < numel <= most or not _is_plain(item, names):
            others.append(item)
            continue
        count += numel
        if not batches or count > most:
            batches.append([])
            count = numel
        batches[-1].append(item)
    return batches


def _is_plain(item: Item, names: Sequence[str]) -> bool:
    """True if all tensors that the step reads or writes are there, in float32 and without gaps in memory."""
    shape = item.param.shape
    for tensor in (item.param, item.grad, *map(item.state.get, names)):
        if tensor is None or tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.shape != shape:
            return False
    return True


def _moved(batch: list[Item], rule: AdamRule | SGDRule) -> list[Tensor]:
    """Count the step and move the moments. Returns -u of each tensor, in the memory of a buffer."""
    flat, minus_updates = buffers("minus_update", [item.param.shape for item in batch])
    flat.zero_()
    grads, states = [item.grad for item in batch], [item.state for item in batch]
    if isinstance(rule, SGDRule):
        move_by_sgd(rule, minus_updates, grads, states, first=False)
        return minus_updates
    steps = [state["step"] for state in states]
    many_of._foreach_add_(steps, 1)
    steps = [step if step.dtype == torch.float32 else step.to(torch.float32) for step in steps]  # as the kernel wants
    move_by_adam(rule, minus_updates, grads, states, steps)
    return minus_updates
