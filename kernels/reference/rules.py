"""The rules: they move the moments and compute the update.

A rule works in two parts, so that it can run over whole tensors (the reference) or over slices (the CPU path). `begin`
counts the step and computes the numbers that a tensor has one of; `move` computes those that each element has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..spec import AdamRule, Draw, GivenRule, Item, LionRule, Rule, Scalar, SGDRule, refuse_rule
from .rounding import store


@dataclass
class Advanced:
    """The results of a rule: tensors shaped like the parameter, float32 (float64 for float64 parameters).

    They may share memory with the gradient or with the state: read them, don't write.
    """

    grad: Tensor
    update: Tensor
    momentum: Tensor | None  # None if the rule has none
    previous_momentum: Tensor | None  # None if the rule has none, or if it was not asked for


@dataclass(frozen=True)
class Numbers:
    """The numbers that a tensor has one of: Python floats, or 0-d float64 tensors if a hyper-parameter is on a GPU."""

    rate: Scalar  # Adam: lr / (1 - beta1^t); otherwise lr
    beta1: Scalar = 0.0
    beta2: Scalar = 0.0
    root: Scalar = 1.0  # Adam: sqrt(1 - beta2^t)
    first: bool = False  # SGD: the buffer is made in this step


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of all arithmetic on this parameter."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def number(value: Scalar) -> Scalar:
    """`value` as a Python float if that needs no synchronisation, else as a 0-d float64 tensor."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else value.detach().to(torch.float64)
    return value


def decay_factor(rule: Rule) -> Scalar:
    """The factor on the parameter (decoupled decay), which is never masked. 1.0 if the rule has none."""
    if isinstance(rule, AdamRule):
        return 1 - number(rule.lr) * rule.weight_decay if rule.decoupled and rule.weight_decay != 0 else 1.0
    if isinstance(rule, (LionRule, GivenRule)):
        return number(rule.decay_factor if isinstance(rule, LionRule) else rule.factor)
    if isinstance(rule, SGDRule) and rule.factor is not None:
        return number(rule.factor)
    return 1.0


def has_momentum(item: Item, rule: Rule) -> bool:
    """True if `move` returns a momentum for this tensor."""
    name = rule.first_moment  # SGD makes its own in the first step
    return name is not None and not (isinstance(rule, GivenRule) and item.state.get(name) is None)


def begin(item: Item, rule: Rule) -> Numbers:
    """Count the step, make the state that is missing, and compute the numbers that the tensor has one of."""
    if isinstance(rule, AdamRule):
        step = item.state["step"]
        step += 1
        t, beta1, beta2 = number(step), number(rule.beta1), number(rule.beta2)
        return Numbers(number(rule.lr) / (1 - beta1**t), beta1, beta2, (1 - beta2**t) ** 0.5)
    if isinstance(rule, SGDRule):
        first = rule.momentum != 0 and item.state.get("momentum_buffer") is None
        if first:  # the dtype that torch's `grad.add(param, alpha=weight_decay).clone()` has
            dtype = torch.promote_types(item.grad.dtype, item.param.dtype) if rule.weight_decay else item.grad.dtype
            item.state["momentum_buffer"] = torch.zeros_like(item.param, dtype=dtype)
        return Numbers(number(rule.lr), first=first)
    if isinstance(rule, LionRule):
        return Numbers(number(rule.lr), number(rule.beta1), number(rule.beta2))
    if isinstance(rule, GivenRule):
        return Numbers(1.0)
    refuse_rule("the reference", rule)


def _lerp(start: Tensor, end: Tensor, weight: Scalar) -> Tensor:
    return torch.lerp(start, end, weight.to(start.dtype) if isinstance(weight, Tensor) else weight)


def _gradient(rule: AdamRule | SGDRule | LionRule, param: Tensor, grad: Tensor) -> Tensor:
    """The gradient as the base sees it: after `maximize`, after coupled decay."""
    dtype, decay = compute_dtype(param), rule.coupled_decay
    g = -grad.to(dtype) if rule.maximize else grad.to(dtype)
    return g.add(param.to(dtype), alpha=decay) if decay != 0 else g


def _adam(rule: AdamRule, n: Numbers, param: Tensor, grad: Tensor, state: dict[str, Tensor], keep: bool) -> Advanced:
    dtype = compute_dtype(param)
    g = _gradient(rule, param, grad)
    old = state["exp_avg"].to(dtype)
    m = _lerp(old, g, 1 - n.beta1)
    v = state["exp_avg_sq"].to(dtype) * n.beta2
    rest = 1 - n.beta2
    v = v + g * g * rest if isinstance(rest, Tensor) else torch.addcmul(v, g, g, value=rest)
    previous = old.clone() if keep else None
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)
    if rule.amsgrad:  # torch keeps the maximum before bias correction
        v = torch.maximum(state["max_exp_avg_sq"].to(dtype), v)
        state["max_exp_avg_sq"].copy_(v)
    update = m / (v.sqrt() / n.root + rule.eps) * n.rate
    return Advanced(g, update, m, previous)


def _sgd(rule: SGDRule, n: Numbers, param: Tensor, grad: Tensor, state: dict[str, Tensor], keep: bool) -> Advanced:
    dtype = compute_dtype(param)
    g = _gradient(rule, param, grad)
    if rule.momentum == 0:
        return Advanced(g, g * n.rate, None, None)
    old = state["momentum_buffer"].to(dtype)
    m = g if n.first else (old * rule.momentum).add(g, alpha=1 - rule.dampening)
    previous = old.clone() if keep else None
    state["momentum_buffer"].copy_(m)
    direction = g.add(m, alpha=rule.momentum) if rule.nesterov else m
    return Advanced(g, direction * n.rate, m, previous)


def _lion(rule: LionRule, n: Numbers, param: Tensor, grad: Tensor, state: dict[str, Tensor], keep: bool) -> Advanced:
    dtype = compute_dtype(param)
    g = _gradient(rule, param, grad)
    old = state["exp_avg"].to(dtype)
    update = _lerp(old, g, 1 - n.beta1).sign() * n.rate
    m = _lerp(old, g, 1 - n.beta2)
    previous = old.clone() if keep else None
    state["exp_avg"].copy_(m)
    return Advanced(g, update, m, previous)


def _given(rule: GivenRule, param: Tensor, grad: Tensor, state: dict[str, Tensor], keep: bool) -> Advanced:
    dtype = compute_dtype(param)
    update = state["update"].to(dtype)
    momentum, previous = state.get("momentum"), state.get("previous_momentum")
    return Advanced(
        grad.to(dtype),
        -update if rule.negated else update,
        None if momentum is None else momentum.to(dtype),
        previous.to(dtype) if keep and previous is not None else None,
    )


def move(
    rule: Rule, numbers: Numbers, param: Tensor, grad: Tensor, state: dict[str, Tensor], keep_previous: bool
) -> Advanced:
    """Step 5 on these elements: the moments move and are stored once; `update` comes from the unrounded ones.

    Raises a ValueError for a rule that the reference has no code for.
    """
    if isinstance(rule, AdamRule):
        return _adam(rule, numbers, param, grad, state, keep_previous)
    if isinstance(rule, SGDRule):
        return _sgd(rule, numbers, param, grad, state, keep_previous)
    if isinstance(rule, LionRule):
        return _lion(rule, numbers, param, grad, state, keep_previous)
    if isinstance(rule, GivenRule):
        return _given(rule, param, grad, state, keep_previous)
    refuse_rule("the reference", rule)


@torch.no_grad()
def advance(item: Item, rule: Rule, *, keep_previous: bool = False) -> Advanced:
    """Step 5 of one tensor, whole."""
    return move(rule, begin(item, rule), item.param, item.grad, item.state, keep_previous)


def rate_of(rule: Rule) -> Scalar:
    """The learning rate, whose sign is the direction in which the base goes."""
    return rule.rate if isinstance(rule, GivenRule) else rule.lr


def turned(x: Tensor | None, rate: Scalar) -> Tensor | None:
    """-x if the rate is negative, else x. A rate on a GPU is not read by the host: then the result is always a copy."""
    if x is None:
        return None
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return x * (1 - 2 * (rate < 0).to(x.dtype))
    return -x if float(rate) < 0 else x


def as_seen(rule: Rule, moved: Advanced) -> Advanced:
    """The results of a rule as selections, strengths and statistics read them.

    Note [a negative learning rate]: a base with a negative learning rate climbs. So it does with a positive one and
    `maximize`, which has the same update and the opposite gradient and momentum. Those are turned round here, after the
    moments have moved as they do.
    """
    rate = rate_of(rule)
    grad = turned(moved.grad, rate)
    assert grad is not None
    return Advanced(grad, moved.update, turned(moved.momentum, rate), turned(moved.previous_momentum, rate))


@torch.no_grad()
def apply_mask(
    item: Item, rule: Rule, update: Tensor, mask: Tensor, draw: Draw | None = None, decays: Tensor | None = None
) -> None:
    """Step 7 of one tensor: `p <- factor p - mask u`, computed in the compute dtype and rounded once.

    `decays` is True at the coordinates that the factor reaches; None: all.
    """
    param, dtype, factor = item.param, compute_dtype(item.param), decay_factor(rule)
    mask = mask.to(dtype)
    if decays is not None:  # 1 or the factor, before the one write: to decay and to add back would round twice
        one = torch.ones((), dtype=dtype, device=param.device)
        factor = torch.where(decays, (one * factor).to(dtype), one)
    if isinstance(rule, GivenRule):
        start, multiplier = item.state["start"].to(dtype), rule.offset - mask
        exact = start * factor + multiplier * update
    else:
        start = param.to(dtype)
        exact = (start if isinstance(factor, float) and factor == 1.0 else start * factor) - mask * update
    store(param, exact, draw, item.address, shard=item.shard)


def nesterov(rule: Rule, momentum: Tensor, grad: Tensor) -> Tensor:
    """The momentum one step ahead, up to a positive factor: the `nesterov` score is this times g."""
    if isinstance(rule, SGDRule):
        return grad.add(momentum, alpha=rule.momentum)
    if isinstance(rule, GivenRule):
        beta: Scalar = rule.momentum_beta
    else:
        beta = number(rule.beta1 if isinstance(rule, AdamRule) else rule.beta2)
    return _lerp(grad, momentum, cast(Scalar, beta))
