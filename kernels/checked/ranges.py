"""The right results of one tensor's step: the reference's, and from where to where rounding may move each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.decay import decaying
from ..reference.rules import Advanced, Numbers, apply_mask, as_seen, begin, compute_dtype, decay_factor, move
from ..reference.selective_step import Mask, mask_of, sums_of
from ..reference.strengths import total
from ..spec import SUM_NAMES, GivenRule, Item, StepSpec
from .borders import choices_of, product_may_turn
from .roundings import ROUNDINGS, STRENGTH, Errors, error_of_sums, errors_of, near_zero, spacing


class Range(NamedTuple):
    """The smallest and the largest right value of each element, in float64."""

    low: Tensor
    high: Tensor

    def times(self, other: Range) -> Range:
        """The range of the products."""
        corners = [a * b for a in self for b in other]
        return Range(_smallest(corners), _largest(corners))

    def size(self) -> Tensor:
        """The largest absolute value of each element."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def wider(self, error: Tensor | float) -> Range:
        """This range and `error` more to either side."""
        return Range(self.low - error, self.high + error)


def _smallest(values: list[Tensor]) -> Tensor:
    return torch.stack(values).amin(0)


def _largest(values: list[Tensor]) -> Tensor:
    return torch.stack(values).amax(0)


def around(value: Tensor, error: Tensor | float) -> Range:
    """The range from `value - error` to `value + error`."""
    value = value.double()
    return Range(value - error, value + error)


@dataclass
class Expected:
    """The right results of one tensor's step, by name.

    The names are "param", the entries of the state that the rule writes, "average" (of an alignment), and with
    statistics those of the sums.
    """

    values: dict[str, Tensor] = field(default_factory=dict)  # the reference's
    ranges: dict[str, Range] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, allowed: Range) -> None:
        self.values[name], self.ranges[name] = value, allowed


@dataclass
class _Step:
    """One tensor's step by the parts of the reference, before the parameter is written."""

    item: Item  # with moments that have moved
    spec: StepSpec
    moved: Advanced
    numbers: Numbers
    errors: Errors
    masks: list[Mask]  # the reference's first, then those of other selections that rounding allows


def expected_of(item: Item, spec: StepSpec) -> Expected:
    """Step a tensor by the reference, in place, and return its results with their ranges."""
    start = Item(item.param, item.grad, {k: v.clone() for k, v in item.state.items() if v is not None}, item.address)
    numbers = begin(item, spec.rule)
    moved = move(spec.rule, numbers, item.param, item.grad, item.state, spec.keeps_previous)
    errors = errors_of(start, item, moved, spec.rule, numbers)
    moved = as_seen(spec.rule, moved)
    masks, policy_state = [], item.policy_state
    for chosen in choices_of(item, spec, moved, errors).distinct:
        item.policy_state = {key: value.clone() for key, value in policy_state.items()}
        masks.append(mask_of(item, spec, moved, chosen, item.policy_state))
    step = _Step(item, spec, moved, numbers, errors, masks)
    expected = Expected()
    _add_state(expected, step)
    if spec.statistics:
        _add_sums(expected, step)
    _add_param(expected, step)
    return expected


def _add_state(expected: Expected, step: _Step) -> None:
    """Add the entries that the rule and an alignment write: each is rounded once, when it is stored."""
    item, rule = step.item, step.spec.rule
    if not isinstance(rule, GivenRule):
        for name in rule.state_names:
            value = item.state[name]
            expected.add(name, value, around(value, step.errors.of_state(name).double() + spacing(value, value.dtype)))
    if rule.counts_steps:
        expected.add("step", item.state["step"], around(item.state["step"], 0.0))
    if "average" in item.policy_state:
        average = item.policy_state["average"]
        expected.add("average", average, around(average, STRENGTH * average.double().abs()))


def _add_sums(expected: Expected, step: _Step) -> None:
    """Add what is reported of the step. Of Lion's sums only those that no sign of an update is in."""
    u, g, errors = step.moved.update, step.moved.grad, step.errors
    reports = [sums_of(mask, step.moved) for mask in step.masks]
    first, largest = reports[0], _largest([mask.values.abs() for mask in step.masks])
    of_update = total(u.abs() * errors.update)
    adding = error_of_sums(u.numel(), u.device.type == "cpu")
    room = {
        "selected": 0.0,
        "strength_selected": (STRENGTH + _slack(step)) * first.strength_selected.abs(),
        "strength_rest": (STRENGTH + _slack(step)) * first.strength_rest.abs(),
        "update_sq": adding * first.update_sq + 2 * of_update,
        "grad_sq": adding * first.grad_sq + 2 * total(g.abs() * errors.grad),
        "update_grad": adding * (first.update_sq * first.grad_sq).sqrt()
        + total(g.abs() * errors.update + u.abs() * errors.grad),
        "masked_sq": (adding + 2 * _slack(step)) * first.masked_sq + 2 * of_update * largest.amax().square()
        if u.numel()
        else 0.0,
    }
    turns = errors.turns is not None and bool(errors.turns.any())
    for name in SUM_NAMES:
        if not (turns and name in ("update_sq", "update_grad", "masked_sq")):
            values = [getattr(sums, name).double() for sums in reports]
            expected.add(name, values[0], Range(_smallest(values), _largest(values)).wider(room[name]))


def _add_param(expected: Expected, step: _Step) -> None:
    """Add the parameter: factor * start + (offset - mask) * u, rounded once. Writes the item's own."""
    item, spec, errors, u = step.item, step.spec, step.errors, step.moved.update
    rule, dtype, given = spec.rule, compute_dtype(item.param), isinstance(spec.rule, GivenRule)
    offset = rule.offset if isinstance(rule, GivenRule) else 0.0
    start = (item.state["start"] if given else item.param).to(torch.float64, copy=True)
    mask = _mask_range(step)
    update = around(u, errors.update.double())
    if errors.turns is not None:
        rate = torch.as_tensor(step.numbers.rate, dtype=torch.float64, device=u.device).abs()
        update = Range(torch.where(errors.turns, -rate, update.low), torch.where(errors.turns, rate, update.high))
    moving = Range(offset - mask.high, offset - mask.low).times(update)
    decays, factor = _decay(step, mask)
    kept = Range(start, start).times(factor)
    apply_mask(item, rule, u, step.masks[0].values, spec.draw, decays)
    right = Range(kept.low + moving.low, kept.high + moving.high)
    unit = ROUNDINGS * torch.finfo(dtype).eps
    terms = (abs(offset) + mask.size()) * update.size() + Range(kept.low - start, kept.high - start).size()
    roundings = 2 if spec.selection.kind == "top_k" else 1  # a bracket that missed is corrected in a second write
    room = roundings * spacing(torch.maximum(start.abs(), right.size()), item.param.dtype) + unit * terms
    expected.add("param", item.param, right.wider(room))


def _mask_range(step: _Step) -> Range:
    """The multipliers of each coordinate: of those on the border either one. A coordinate that stands still has 0."""
    strength, u, errors = step.spec.strength, step.moved.update, step.errors
    selected, rest = (_multiplier(step, [mask.pair[k] for mask in step.masks]) for k in (0, 1))
    always = torch.stack([mask.chosen for mask in step.masks]).all(0)
    ever = torch.stack([mask.chosen for mask in step.masks]).any(0)
    low = torch.where(always, selected.low, torch.where(ever, torch.minimum(selected.low, rest.low), rest.low))
    high = torch.where(always, selected.high, torch.where(ever, torch.maximum(selected.high, rest.high), rest.high))
    if strength.still and not step.spec.selection.leaves_dense(u.numel()):
        zero, still = torch.zeros_like(low), u * step.moved.grad == 0
        border = product_may_turn(u, errors.update, step.moved.grad, errors.grad)
        if errors.turns is not None:
            border = border | errors.turns
        low = torch.where(border, torch.minimum(low, zero), torch.where(still, zero, low))
        high = torch.where(border, torch.maximum(high, zero), torch.where(still, zero, high))
    return Range(low, high)


def _multiplier(step: _Step, values: list[Tensor]) -> Range:
    """One of the two multipliers: from the smallest to the largest that the possible selections have.

    A control's is scaled by the ratio of two norms. The one may be as small as they allow and the other as large, so
    that its range is twice as wide.
    """
    low, high = _smallest(values), _largest(values)
    control, room = step.spec.selection.control, _slack(step)
    if control is not None and control.norm and len(values) > 1:
        sizes = [value.abs() for value in values]
        room = room + torch.where(_smallest(sizes) > 0, _largest(sizes) / _smallest(sizes) - 1, 0.0)
    return Range(low - room * low.abs(), high + room * high.abs())


def _slack(step: _Step) -> Tensor | float:
    """The relative error of the multipliers, of those that are made of sums."""
    strength, control, moved, errors = step.spec.strength, step.spec.selection.control, step.moved, step.errors
    slack: Tensor | float = 0.0
    if strength.kind != "fixed" or control is not None:
        slack = STRENGTH
    pairs = {"update": (moved.update, errors.update), "momentum": (moved.momentum, errors.momentum),
             "gradient": (moved.grad, errors.grad)}  # fmt: skip
    of = [strength.of] if strength.kind == "norm_preserving" else []
    for name in of + (["update"] if control is not None and control.norm else []):
        x, error = pairs[name]
        assert x is not None
        for chosen in (torch.ones_like(step.masks[0].chosen), step.masks[0].chosen):
            squares, off = (total(torch.where(chosen, y, 0.0)) for y in (x * x, x.abs() * error))
            slack = slack + torch.where(off > 0, off / squares, 0.0)
    return slack


def _decay(step: _Step, mask: Range) -> tuple[Tensor | None, Range]:
    """The coordinates that decay (None: all), and the factor of each."""
    spec, moved, errors, item = step.spec, step.moved, step.errors, step.item
    factor = torch.as_tensor(decay_factor(spec.rule), dtype=torch.float64, device=item.param.device)
    factor = factor.to(compute_dtype(item.param)).double()  # it is rounded before it is used, everywhere
    if spec.decay is None:
        return None, Range(factor, factor)
    decays = decaying(spec.decay, item, spec.rule, moved.update, step.masks[0].values, moved.grad)
    if spec.decay.of == "gradient":
        border = near_zero(moved.grad, errors.grad)
    else:
        border = near_zero(moved.update, errors.update)
        border = border if errors.turns is None else border | errors.turns
        border = border | (mask.low * mask.high <= 0) & (mask.low != mask.high) if spec.decay.of == "masked" else border
    one = torch.ones_like(factor)
    low, high = torch.minimum(factor, one), torch.maximum(factor, one)
    here = torch.where(decays, factor, one)
    return decays, Range(torch.where(border, low, here), torch.where(border, high, here))
