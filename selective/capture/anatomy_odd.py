"""Which state entries turn round with the gradient: sums of gradients and of updates, which a rotation can take along.

Others that are shaped like the parameter are made of squares. A first moment of the gradient turns round; so do CAME's
and Adafactor's averages of the update, RMSprop's buffer, the slow average of AdEMAMix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy_clone import CannotClone, StepFailed, unnoticed
from selective.capture.anatomy_probe import Run
from selective.capture.anatomy_prober import SMALL, Prober, cosine

_STEPS, _RATE = 4, 1e-6  # few and small: what looks at the parameter's value must not come to look at another one
_ODD = -0.9  # the cosine of an entry with itself for the opposite gradients; that of squares is 1


def measure_odd(base: Optimizer, group: Mapping[str, Any]) -> frozenset[str]:
    """Names of the entries, by two runs of a twin on opposite gradients; none where it can't be stepped."""
    with unnoticed():
        prober = Prober(base, group)
        for dtype in (torch.float64, torch.float32):
            try:
                prober.prepare(dtype, SMALL)
                return _odd(*(_run(prober, sign) for sign in (1.0, -1.0)))
            except (CannotClone, StepFailed):
                continue
    return frozenset()


def _run(prober: Prober, sign: float) -> Run:
    def grads(step: int, index: int, p: Tensor) -> Tensor:
        return sign * prober.grads(step, index, p)

    return prober.run(prober.small, grads, lr=_RATE, steps=_STEPS)


def _odd(one: Run, other: Run) -> frozenset[str]:
    found: set[str] | None = None
    for mine, theirs in zip(one.states[-1], other.states[-1], strict=True):
        odd = {key for key in mine.keys() & theirs.keys() if cosine(mine[key], theirs[key]) < _ODD}
        found = odd if found is None else found & odd
    return frozenset(found or ())
