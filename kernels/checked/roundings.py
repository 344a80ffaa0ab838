"""The errors that rounding alone can make in a step: of the gradient, the moments, the update and the scores.

Each is `ROUNDINGS` eps of the largest terms of a sum. The terms count and not the sum, because a sum may cancel. The
reference rounds six times by half an eps between its inputs and the update. Triton kernels round four times, with a
root that is off by one unit and a division that is off by two; torch's fused kernels on a CPU round about as often.
Together that is at most 8 eps. The tests of the kernels use the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.rules import Advanced, Numbers, compute_dtype, nesterov
from ..spec import AdamRule, GivenRule, Item, LionRule, Rule, Selection, SGDRule

ROUNDINGS = 8  # eps, see above
STRENGTH = (
    1e-6  # relative, of a multiplier that is made of sums: a GPU and a CPU add up thousands of squares in float32
)
SUMS = 1e-5  # relative, of a reported sum: a float32 sum of some thousand squares, each of them a few eps off
LONGEST, RUNNING = 524_288, 16  # of a dot product on a CPU: its numbers at most, and its running sums at least


def error_of_sums(numel: int, on_cpu: bool) -> float:
    """The relative error of a reported sum of a tensor of so many elements.

    A CPU adds up dot products, each in a few running sums. If all squares are equal, as in Adam's first step, the
    roundings of a running sum go one way. Each is half an eps of the sum by then, which is half of the last one on
    average. 5e-4 of the 1e-3 that are allowed for the longest were measured, with a single thread.
    """
    return SUMS + (min(numel, LONGEST) / RUNNING * 2**-25 if on_cpu else 0.0)


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype at x, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().double().clamp(min=info.tiny))
    return info.eps * torch.exp2(exponent.double() - 1)


@dataclass
class Errors:
    """The largest errors of one tensor's step, for each element, in the dtype of the arithmetic. 0: it is exact."""

    grad: Tensor
    update: Tensor
    momentum: Tensor  # before it is rounded to be stored
    square: Tensor | None = None  # Adam's second moment
    turns: Tensor | None = None  # Lion: True where the sign that is the update may be another one

    def of_state(self, name: str) -> Tensor:
        """The error of a state entry that the rule writes."""
        return self.square if self.square is not None and name.endswith("_sq") else self.momentum


def near_zero(x: Tensor, error: Tensor) -> Tensor:
    """True where rounding may give x another sign, or make it 0. Never where x is exact."""
    return (error > 0) & (x.abs() <= error + torch.finfo(x.dtype).tiny)


def errors_of(start: Item, item: Item, moved: Advanced, rule: Rule, numbers: Numbers) -> Errors:
    """The errors of a step of the reference.

    `start` has the state before it, `item` the state after it and the parameter as it was; `moved` is what the rule
    returned.
    """
    dtype = compute_dtype(start.param)
    unit, coupled = ROUNDINGS * torch.finfo(dtype).eps, abs(rule.coupled_decay)
    zero = torch.zeros_like(moved.grad)
    if isinstance(rule, GivenRule):
        return Errors(zero, zero, zero)
    grads = start.grad.to(dtype).abs()
    if coupled:  # 0 times an infinite parameter would be no number
        grads = grads + coupled * start.param.to(dtype).abs()
    of_grad = unit * grads if coupled else zero
    old = start.state.get(rule.first_moment or "")
    old = zero if old is None else old.to(dtype)
    if isinstance(rule, AdamRule):
        momentum = unit * (old.abs() + (1 - numbers.beta1) * grads)
        square = unit * (start.state["exp_avg_sq"].to(dtype) + (1 - numbers.beta2) * grads * grads)
        largest = item.state["max_exp_avg_sq" if rule.amsgrad else "exp_avg_sq"]
        slope = abs(numbers.rate) / (largest.to(dtype).sqrt() / numbers.root + rule.eps)  # of u by the momentum
        if largest.dtype != dtype:  # its root is off by as much as it was rounded to be stored
            slope = slope * (1 + torch.finfo(largest.dtype).eps)
        return Errors(of_grad, slope * momentum, momentum, square)
    if isinstance(rule, SGDRule):
        momentum = unit * (abs(rule.momentum) * old.abs() + (1 if numbers.first else abs(1 - rule.dampening)) * grads)
        direction = momentum if rule.momentum else unit * grads
        direction = unit * grads + abs(rule.momentum) * momentum if rule.nesterov else direction
        return Errors(of_grad, abs(numbers.rate) * direction, momentum)
    assert isinstance(rule, LionRule)
    ahead = old + (1 - numbers.beta1) * (moved.grad - old)
    turns = near_zero(ahead, unit * (old.abs() + (1 - numbers.beta1) * grads))
    return Errors(of_grad, zero, unit * (old.abs() + (1 - numbers.beta2) * grads), turns=turns)


def looked_at(selection: Selection, rule: Rule, moved: Advanced, errors: Errors) -> tuple[Tensor, Tensor]:
    """The factor that agreement or top-K multiplies the gradient by, and its error."""
    by = selection.product if selection.kind == "agreement" else selection.score
    if by == "previous_momentum":
        assert moved.previous_momentum is not None
        return moved.previous_momentum, torch.zeros_like(moved.update)
    if by == "update":
        return moved.update, errors.update
    assert moved.momentum is not None
    if by == "momentum":
        return moved.momentum, errors.momentum
    unit = ROUNDINGS * torch.finfo(moved.grad.dtype).eps
    own = unit * (moved.grad.abs() + moved.momentum.abs())
    return nesterov(rule, moved.momentum, moved.grad), errors.grad + errors.momentum + own
