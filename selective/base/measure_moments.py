"""The kinds of a base's state entries, measured: what each becomes when the space of the gradients is rotated.

Two things tell. *Parity*: an entry that turns round with the gradient is linear in it (an average of gradients or of
updates), one that stays the same is made of squares or of sizes. *Degree*: the power of the gradient that it grows
with, 2 for squares. Some bases scale all gradients to one size first (AdaGC, MARS), so that nothing grows with them. Of
these the gradients of a few coordinates are made larger, and what is kept of them is compared with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import CannotClone, StepFailed, unnoticed
from selective.base.probe import SMALL, STEPS, Prober, Run, cosine

# Small steps: what looks at the parameter's value must not come to look at another one. 12, because AdaShift's second
# moment is of the gradients ten steps ago.
_STEPS, _RATE = 12, 1e-6
_SAME = 0.9  # the cosine of an entry with itself for the opposite gradients: 1 for squares, -1 for averages
_LARGER = 4.0  # times: a power of 2, so that nothing is rounded otherwise
_FEW = 8  # one coordinate in so many is made larger
_NEAR = 0.25  # of a whole number: the degrees of all classes met are within 0.02


@dataclass(frozen=True)
class Moments:
    """Names of the entries shaped like the parameter, by what they become when the basis changes."""

    first: frozenset[str] = frozenset()
    """They turn round with the gradient, and are rotated with it."""
    of_gradient: frozenset[str] = frozenset()
    """First moments as large as the gradients: what Adam-like bases divide by the root of a second moment."""
    second: frozenset[str] = frozenset()
    """They grow with the gradient's square, and follow by the squared maps."""
    norms: frozenset[str] = frozenset()
    """They grow with the gradient's size, and follow as the roots of second moments."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Those that have no counterpart in another basis, and what each is, in words."""


UPDATE_SQUARES = {"torch.Adadelta": {"acc_delta"}, "pytorch_optimizer.AdaDelta": {"acc_delta"}}
"""Averages of squared *updates*. No gradient makes them larger, which is what gives step sizes away as well; but an
update is a vector of the rotated space as a gradient is, so that its squares follow as second moments do."""


def measure_moments(base: Optimizer, group: Mapping[str, Any]) -> Moments:
    """The kinds of `base`'s entries, by four runs of a clone; no names where it can't be stepped."""
    with unnoticed():
        prober = Prober(base, group)
        for dtype in (torch.float64, torch.float32):
            try:
                prober.prepare(dtype, SMALL)
                prober.find_who_makes_state()
                runs = [_run(prober, change) for change in _CHANGES]
            except (CannotClone, StepFailed):
                continue
            return _by_kind(_seen(prober, *runs), UPDATE_SQUARES.get(_qualified(base), set()))
    return Moments()


def _run(prober: Prober, change: Callable[[Tensor, Tensor], Tensor]) -> Run:
    few = [_few(prober, index) for index in range(len(prober.shapes))]

    def grads(step: int, index: int, p: Tensor) -> Tensor:
        return change(prober.grads(step % STEPS, index, p), few[index])

    return prober.run(prober.small, grads, lr=_RATE, steps=_STEPS)


def _few(prober: Prober, index: int) -> Tensor:
    """The coordinates of a stand-in with the smallest gradients: made larger they stay below what anybody clips."""
    grads = [prober.grads(t, index, prober.small[index]).abs() for t in range(STEPS)]
    order = torch.stack(grads).sum(0).flatten().argsort()
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[: max(1, len(order) // _FEW)]] = True
    return chosen.view(prober.shapes[index])


_CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda grad, few: grad,
    lambda grad, few: -grad,
    lambda grad, few: _LARGER * grad,
    lambda grad, few: torch.where(few, _LARGER * grad, grad),
)


class _Seen(NamedTuple):
    """An entry of one stand-in: the cosine of itself with itself for the opposite gradients, and its degree."""

    parity: float
    degree: float


def _seen(prober: Prober, usual: Run, opposite: Run, all_larger: Run, few_larger: Run) -> dict[str, list[_Seen]]:
    """What the runs show of each entry, for each stand-in that has it; nothing of entries that are 0."""
    found: dict[str, list[_Seen]] = {}
    last = zip(*(run.states[-1] for run in (usual, opposite, all_larger, few_larger)), strict=True)
    for index, (mine, turned, grown, partly) in enumerate(last):
        if len(prober.shapes[index]) < 2:  # never rotated, and often kept in another way
            continue
        few = _few(prober, index).flatten()
        for key, value in mine.items():
            if value.any() and all(key in other for other in (turned, grown, partly)):
                degree = _growth(value, grown[key])
                if not any(_is_near(degree, whole) for whole in (1, 2)):
                    degree = _growth(value[few], partly[key][few]) - _growth(value[~few], partly[key][~few])
                found.setdefault(key, []).append(_Seen(cosine(value, turned[key]), degree))
    return found


def _growth(usual: Tensor, larger: Tensor) -> float:
    """The power of `_LARGER` by which the norm grew; NaN where there is none."""
    growth = float(larger.norm() / usual.norm())
    return math.log(growth, _LARGER) if 0.0 < growth < math.inf else math.nan


def _by_kind(found: Mapping[str, Sequence[_Seen]], update_squares: Collection[str]) -> Moments:
    first, of_gradient, second, norms, fixed = set(), set(), set(), set(), {}
    for key, several in found.items():
        even = all(seen.parity > _SAME for seen in several)
        degree = next((d for d in (0, 1, 2) if all(_is_near(seen.degree, d) for seen in several)), None)
        if all(seen.parity < -_SAME for seen in several):
            first.add(key)
            of_gradient |= {key} if degree == 1 else set()
        elif even and (degree == 2 or key in update_squares):
            second.add(key)
        elif even and degree == 1:
            norms.add(key)
        else:
            fixed[key] = "does not grow with the gradient" if even and degree == 0 else "is no power of the gradient"
    return Moments(frozenset(first), frozenset(of_gradient), frozenset(second), frozenset(norms), fixed)


def _is_near(degree: float, whole: int) -> bool:
    return abs(degree - whole) < _NEAR  # False for NaN


def _qualified(base: Optimizer) -> str:
    cls = type(base)
    return f"{cls.__module__.split('.')[0]}.{cls.__qualname__}"


PREFERRED = ("exp_avg", "momentum_buffer", "momentum")


def momentum_key(record: Run, maximize: bool) -> str | None:
    """The entry of every stand-in's state that is one, the customary names first; None where there is none."""
    shared = set.intersection(*(set(s) for states in record.states[1:] for s in states))
    moments = [k for k in shared if all(_is_moment(record, i, k, maximize) for i in range(len(record.params[0])))]
    order = {k: n for n, k in enumerate(PREFERRED)}
    return min(moments, key=lambda k: (order.get(k, len(order)), k), default=None)


def _is_moment(record: Run, i: int, key: str, maximize: bool) -> bool:
    """e_t = a·e_{t-1} + b·g_t with two numbers a step, b or a + b the same in all of them.

    The gradients' coordinates differ in size by e, and their norm by the step: what is normalised (by coordinate in
    LaProp and ADOPT, as a whole in NovoGrad) shows in the residual or in b. Quantised to 8 bits: residual about 1e-2.
    """
    tolerance = 0.1 if key in record.dequantized else 1e-5
    found = []
    for t in range(2, len(record.states)):
        before, after = record.states[t - 1][i][key], record.states[t][i][key]
        columns = torch.stack([before, record.grads[t][i]], dim=1)
        if not bool(torch.isfinite(columns).all() and torch.isfinite(after).all()) or not before.any():
            return False
        scales = columns.norm(dim=0)
        solution = torch.linalg.lstsq(columns / scales, after).solution / scales
        if float((after - columns @ solution).norm()) > tolerance * float(after.norm()):
            return False
        found.append(solution)
    a, b = torch.stack(found).unbind(dim=1)
    b = -b if maximize else b
    if bool((b <= 0).any()) or (bool((a.abs() < 1e-6).all()) and key not in PREFERRED):  # yesterday's gradient
        return False
    return any(float(x.max() - x.min()) <= tolerance * float(x.abs().max()) for x in (b, a + b))
