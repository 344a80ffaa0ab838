"""The measurement of a base's weight decay: its kind, and the formula of its factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.decay import FORMULAS, measured_factor
from selective.base.facts import BaseFacts
from selective.base.probe import DECAY, LR, ROUNDING, Grads, Prober, Recording, largest


def with_decay(prober: Prober, facts: BaseFacts, without: Recording) -> BaseFacts:
    """Return `facts` with those about decay.

    They are found by comparison with `without`, the run from the large values without decay.
    """
    if not isinstance(prober.group.get("weight_decay"), (int, float, Tensor)):
        return facts
    decayed = prober.run(prober.large, decay=DECAY)
    effect = _apart(decayed, without)
    size = max(largest(p) for p in decayed.params[-1])
    if effect <= ROUNDING * prober.eps(decayed) * size:
        return facts
    for sign in (-1.0, 1.0) if prober.maximize else (1.0, -1.0):
        by_hand = prober.run(prober.large, lambda t, i, p, s=sign: prober.grads(t, i, p) + s * DECAY * p)
        if _apart(decayed, by_hand) < 0.01 * effect:  # otherwise the runs differ as much as decay does
            return replace(facts, decay="coupled", decay_sign=sign)
    rule = Factors(prober, facts.depends_on_param).rule()
    if rule is None:
        return replace(facts, decay="inside")
    return replace(facts, decay="decoupled", decay_rule=rule)


def _apart(first: Recording, second: Recording) -> float:
    """Return the norm, over all stand-ins and steps, of the difference of two runs; infinity if it is NaN."""
    total = sum(float((a - b).square().sum()) for a, b in zip(chain(*first.params), chain(*second.params), strict=True))
    return float("inf") if total != total else total**0.5


Predictions = dict[str, float]  # the factor of the next step, by formula
Predict = Callable[[Optimizer, Tensor], Predictions]
Row = tuple[float, float, Predictions]  # a factor as observed, its error, and the predictions made before the step


class Factors:
    """The observed factors by step and stand-in, over a grid of lr and weight_decay, with the formulas' predictions.

    If the update does not depend on the parameter, a factor is observed with gradients: decayed runs from p and from 0
    differ by factor·p. If it does, gradients are zero, so that a step consists of decay alone.
    """

    def __init__(self, prober: Prober, depends: bool) -> None:
        self.prober, self.depends = prober, depends
        self.rows: list[Row] = []
        self.uniform = True
        by_decay: dict[tuple[float, float], float] = {}
        for lr in (LR, 2 * LR):
            for decay in (DECAY / 4, DECAY / 2):
                rows = self._observed(lr, decay, _by_formula)
                by_decay[lr, decay] = rows[-1][0] - 1
                self.rows += rows
        if depends:  # LAMB has decay in its trust ratio: then the step does not grow with weight_decay
            for lr in (LR, 2 * LR):
                low, high = by_decay[lr, DECAY / 4], by_decay[lr, DECAY / 2]
                self.uniform &= low != 0 and abs(high / low - 2) < 0.1

    def rule(self) -> str | None:
        """Return the formula that predicts the factor, or "measured" if a measurement does; None if neither does.

        A uniform factor is not enough for decoupled decay. If decay goes into a momentum (NovoGrad adds it to the
        normalised gradient), it also multiplies the parameter by a factor in each step. But part of this factor comes
        from the decay of earlier steps. A single step from the present state does not show that part, and a base that
        steps zeros does not collect it. So a measurement, like a formula, has to predict the observed factors.
        """
        if not self.uniform:
            return None
        formula = next((name for name in FORMULAS if _predicts(name, self.rows)), None)
        if formula is not None:
            return formula
        rows = self._observed(LR, DECAY / 2, self._by_measurement, others=True)
        if self.depends:  # subtract decay under another option's name (MARS has one for vectors)
            undecayed = self._observed(LR, 0.0, lambda clone, p: {}, others=True)
            rows = [(f - (g - 1), e, told) for (f, e, told), (g, _, _) in zip(rows, undecayed, strict=True)]
        return "measured" if self.uniform and _predicts("measured", rows) else None

    def _by_measurement(self, clone: Optimizer, param: Tensor) -> Predictions:
        try:
            return {"measured": measured_factor(clone, clone.param_groups[0], param, self.depends)}
        except Exception:  # broad: the step of an unknown class may raise anything. Then no factor can be measured
            return {}

    def _observed(self, lr: float, decay: float, predict: Predict, others: bool = False) -> list[Row]:
        """Return the factors of four steps, with the predictions of `predict`.

        With `others`, further stand-ins with other values and larger gradients are stepped in the same group. They show
        whether the factor of one parameter depends on the others, as in AdamS.
        """
        prober, predictions = self.prober, list[list[Predictions]]()
        starts = [*prober.large, *prober.small] if others else prober.large
        usual = len(prober.large)

        def before(clone: Optimizer, params: list[Tensor]) -> None:
            predictions.append([predict(clone, p) for p in params])

        grads: Grads = lambda t, i, p: prober.grads(t, i % usual, p) * 8.0 ** (i // usual)  # noqa: E731
        if self.depends:
            nothing: Grads = lambda t, i, p: torch.zeros_like(p)  # noqa: E731
            decayed = prober.run(starts, nothing, decay=decay, lr=lr, steps=4, before=before)
            from_zeros = Recording(params=[[torch.zeros_like(p) for p in ps] for ps in decayed.params])
        else:
            decayed = prober.run(starts, grads, decay=decay, lr=lr, steps=4, before=before)
            from_zeros = prober.run([torch.zeros_like(p) for p in starts], grads, decay=decay, lr=lr, steps=4)
        eps, rows = prober.eps(decayed), list[Row]()
        for t, step_predictions in enumerate(predictions):
            for i, by_formula in enumerate(step_predictions):
                x = decayed.params[t][i] - from_zeros.params[t][i]
                y = decayed.params[t + 1][i] - from_zeros.params[t + 1][i]
                factor = float(x @ y) / float(x @ x)
                error = ROUNDING * eps * max(1.0, largest(y) / max(largest(x), 1e-300))
                worst = largest(y - factor * x)
                self.uniform &= worst <= (1e-6 * abs(1 - factor) + error) * largest(x)
                rows.append((factor, error, by_formula))
        return rows


def _predicts(name: str, rows: list[Row]) -> bool:
    return all(name in told and abs(f - told[name]) <= 1e-4 * abs(1 - f) + e for f, e, told in rows)


def _by_formula(clone: Optimizer, param: Tensor) -> Predictions:
    predictions = {}
    for name, formula in FORMULAS.items():
        try:
            predictions[name] = float(formula(clone, clone.param_groups[0], param))
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # the group lacks an option of this formula (no max_lr), or it is None (lr)
    return predictions
