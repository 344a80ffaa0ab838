"""The measurement of which state entries of a base are first moments, second moments or norms of the gradients.

The kind decides how an entry is carried into a rotated space. Two properties show it. *Parity*: an entry that changes
its sign with the gradients is an average of gradients or of updates; one that does not is made of squares or of
absolute values. *Degree*: the power of the gradient with which an entry grows, 2 for squares. Some optimizers scale all
gradients to one size first (AdaGC, MARS), so that no entry grows with them. For these, only a few coordinates of the
gradients are made larger, and the entry's growth there is compared with that of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import CannotClone, StepFailed, unnoticed
from selective.base.known import qualified_name
from selective.base.probe import SMALL, STEPS, Prober, Recording, cosine

# The learning rate is small so that the parameters stay nearly the same in all runs: some updates depend on their
# values. 12 steps, because AdaShift's second moment is made of the gradients ten steps ago.
_STEPS, _RATE = 12, 1e-6
_SAME = 0.9  # the cosine between an entry and the same one with opposite gradients is 1 for squares, -1 for averages
_LARGER = 4.0  # factor on gradients; a power of 2, which does not change rounding
_FEW = 8  # one in this many coordinates is made larger
_TINY = 1e-12  # factor on few gradients: Adam's update shrinks with them, because of its eps
_FULL = 0.9  # an update of a sign-like base is at least this share of the largest; they are equal up to rounding
_NEAR = 0.25  # largest distance of a degree from a whole number; it is below 0.02 for all classes found


@dataclass(frozen=True)
class Moments:
    """Names of the state entries shaped like the parameter, by the way in which they are carried into a new basis."""

    first: frozenset[str] = frozenset()
    """Entries that change their sign with the gradient. They are rotated as it is."""
    of_gradient: frozenset[str] = frozenset()
    """The first moments that grow with the gradient, which Adam divides by the root of a second moment."""
    second: frozenset[str] = frozenset()
    """Entries that grow with the square of the gradient. They are carried by the squares of the maps."""
    norms: frozenset[str] = frozenset()
    """Entries that grow with the absolute value of the gradient. They are carried as the roots of second moments."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Entries that cannot be carried into another basis, with the reason in words."""
    full_steps: bool = False
    """True if each coordinate's update is as large as all others, however small its gradient is: it is a sign."""


UPDATE_SQUARES = {"torch.Adadelta": {"acc_delta"}, "pytorch_optimizer.AdaDelta": {"acc_delta"}}
"""Averages of squared *updates*, by class. They do not grow with the gradient, so that the measurement would take them
for step sizes. But an update is a vector of the rotated space, and its squares are carried as second moments are."""


def measure_moments(base: Optimizer, group: Mapping[str, Any]) -> Moments:
    """Measure the kinds of `base`'s state entries with four runs of a clone; no names if it cannot be stepped."""
    with unnoticed():
        prober = Prober(base, group)
        for dtype in (torch.float64, torch.float32):
            try:
                prober.prepare(dtype, SMALL)
                prober.find_who_makes_state()
                few = [_smallest_gradients(prober, index) for index in range(len(prober.shapes))]
                runs = [_run(prober, change, few) for change in _CHANGES]
            except (CannotClone, StepFailed):
                continue
            update_squares = UPDATE_SQUARES.get(qualified_name(type(base)), set())
            kinds = _by_kind(_observations(prober, few, *runs), update_squares)
            return replace(kinds, full_steps=_takes_full_steps(prober, few))
    return Moments()


def _run(
    prober: Prober, change: Callable[[Tensor, Tensor], Tensor], few: Sequence[Tensor], steps: int = _STEPS
) -> Recording:
    """Run a clone on changed gradients. `change` gets a gradient and the marked coordinates of its stand-in, `few`."""

    def grads(step: int, index: int, p: Tensor) -> Tensor:
        return change(prober.grads(step % STEPS, index, p), few[index])

    return prober.run(prober.small, grads, lr=_RATE, steps=steps)


def _takes_full_steps(prober: Prober, few: Sequence[Tensor]) -> bool:
    """Return True if coordinates with next to no gradient make the same first step as the others."""
    record = _run(prober, lambda grad, marked: torch.where(marked, _TINY * grad, grad), few, steps=1)
    updates = [(before - after).abs() for before, after in zip(*record.params, strict=True)]
    # Vectors are never rotated, and a 0-d parameter has one coordinate only.
    pairs = [(u[m.flatten()], u[~m.flatten()]) for u, m in zip(updates, few, strict=True) if m.dim() > 1]
    return bool(pairs) and all(
        bool(large.max() > 0) and bool(small.min() > _FULL * large.max()) for small, large in pairs
    )


def _smallest_gradients(prober: Prober, index: int) -> Tensor:
    """Return a bool tensor that marks the coordinates of a stand-in with the smallest gradients.

    When these are made larger, they still stay below the bounds at which base optimizers clip.
    """
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


class _Observation(NamedTuple):
    """The parity (the cosine with the same entry for opposite gradients) and the degree of one stand-in's entry."""

    parity: float
    degree: float


def _observations(
    prober: Prober,
    few_coordinates: Sequence[Tensor],
    usual: Recording,
    opposite: Recording,
    all_larger: Recording,
    few_larger: Recording,
) -> dict[str, list[_Observation]]:
    """Return the observations of each entry, one for each stand-in that has it; entries of zeros are left out."""
    observations: dict[str, list[_Observation]] = {}
    last = zip(*(run.states[-1] for run in (usual, opposite, all_larger, few_larger)), strict=True)
    for index, (state, turned, grown, partly) in enumerate(last):
        if len(prober.shapes[index]) < 2:  # vectors are never rotated, and many optimizers keep other entries of them
            continue
        few = few_coordinates[index].flatten()
        for key, value in state.items():
            if value.any() and all(key in other for other in (turned, grown, partly)):
                degree = _growth(value, grown[key])
                if not any(_is_near(degree, whole) for whole in (1, 2)):
                    degree = _growth(value[few], partly[key][few]) - _growth(value[~few], partly[key][~few])
                observations.setdefault(key, []).append(_Observation(cosine(value, turned[key]), degree))
    return observations


def _growth(usual: Tensor, larger: Tensor) -> float:
    """Return the power of `_LARGER` by which the norm grew; NaN if the norms have no finite, positive ratio."""
    growth = float(larger.norm() / usual.norm())
    return math.log(growth, _LARGER) if 0.0 < growth < math.inf else math.nan


def _by_kind(observations: Mapping[str, Sequence[_Observation]], update_squares: Collection[str]) -> Moments:
    first, of_gradient, second, norms, fixed = set(), set(), set(), set(), {}
    for key, of_stand_ins in observations.items():
        even = all(observed.parity > _SAME for observed in of_stand_ins)
        degree = next((d for d in (0, 1, 2) if all(_is_near(observed.degree, d) for observed in of_stand_ins)), None)
        if all(observed.parity < -_SAME for observed in of_stand_ins):
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


PREFERRED = ("exp_avg", "momentum_buffer", "momentum")


def momentum_key(record: Recording, maximize: bool) -> str | None:
    """Return the name of the entry that is a first moment of the gradient for every stand-in; None if there is none.

    Of several, the first in `PREFERRED` is taken, else the first by name.
    """
    shared = set.intersection(*(set(s) for states in record.states[1:] for s in states))
    moments = [k for k in shared if all(_is_moment(record, i, k, maximize) for i in range(len(record.params[0])))]
    order = {k: n for n, k in enumerate(PREFERRED)}
    return min(moments, key=lambda k: (order.get(k, len(order)), k), default=None)


def _is_moment(record: Recording, i: int, key: str, maximize: bool) -> bool:
    """Return True if e_t = a·e_{t-1} + b·g_t, with two numbers for each step, and b or a + b the same in all steps.

    The coordinates of the gradients differ in size by a factor of e, and their norm differs from step to step. So a
    normalised gradient (by coordinate in LaProp and ADOPT, as a whole in NovoGrad) shows in the residual or in b. The
    residual of entries that are quantised to 8 bits is about 1e-2.
    """
    tolerance = 0.1 if key in record.dequantized else 1e-5
    solutions = []
    for t in range(2, len(record.states)):
        before, after = record.states[t - 1][i][key], record.states[t][i][key]
        columns = torch.stack([before, record.grads[t][i]], dim=1)
        if not bool(torch.isfinite(columns).all() and torch.isfinite(after).all()) or not before.any():
            return False
        scales = columns.norm(dim=0)
        solution = torch.linalg.lstsq(columns / scales, after).solution / scales
        if float((after - columns @ solution).norm()) > tolerance * float(after.norm()):
            return False
        solutions.append(solution)
    a, b = torch.stack(solutions).unbind(dim=1)
    b = -b if maximize else b
    if bool((b <= 0).any()) or (bool((a.abs() < 1e-6).all()) and key not in PREFERRED):  # the last gradient itself
        return False
    return any(float(x.max() - x.min()) <= tolerance * float(x.abs().max()) for x in (b, a + b))
