"""From runs of the twin to facts. Every number below separates two populations; the comment says which."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy_clone import CannotClone, unnoticed
from selective.capture.anatomy_decay import RULES
from selective.capture.anatomy_facts import Anatomy
from selective.capture.anatomy_probe import LR, STEPS, Grads, Run, run, stand_in_shape, values

DECAY = 0.5  # large, so that decay is not small beside the gradient
LOW = (torch.float16, torch.bfloat16)
# Rounding of ten steps, in units of eps·max(|p|, |u|): measured at most 4 where the update does not look at the
# parameter. The weakest dependence met (Prodigy's, relative 2e-6) is nine orders above in float64.
ROUNDING = 256.0


class Prober:
    """One base and group, its stand-ins, and the runs that several questions share."""

    def __init__(self, base: Optimizer, group: Mapping[str, Any]) -> None:
        params: list[Tensor] = list(group["params"])
        self.base, self.group = base, group
        self.ndims = sorted({p.ndim for p in params}) or [2]
        self.shapes = [stand_in_shape(n) for n in self.ndims]
        device = params[0].device if params else torch.device("cpu")
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.low = sorted({p.dtype for p in params} & set(LOW), key=str)
        self.dtype = torch.float64
        # RMS 0.02 and 0.1: LAMB's clamp at a norm of 10 is not reached, Adafactor's floor of 1e-3 is passed.
        self.small, self.large = values(self.shapes, 1, 0.02), values(self.shapes, 2, 0.1)
        self.zeros = [torch.zeros_like(x) for x in self.small]
        series = [values(self.shapes, 10 + t, 0.1 * (1 + t % 3), spread=1.0) for t in range(STEPS)]
        self.grads: Grads = lambda t, i, p: series[t][i]
        self.writes_grad = self.clears_grad = False

    def run(self, starts: list[Tensor], grads: Grads | None = None, *, decay: float = 0.0, **options: Any) -> Run:
        overrides = {"lr": options.pop("lr", LR), "weight_decay": decay}
        options.setdefault("dtype", self.dtype)
        record = run(
            self.base, self.group, starts, grads or self.grads, device=self.device, overrides=overrides, **options
        )
        self.writes_grad |= record.writes_grad
        self.clears_grad |= record.clears_grad
        return record

    def eps(self, record: Run) -> float:
        """Of the arithmetic that the class used: some compute in float32 whatever the parameter's dtype is."""
        last = [p for p in record.params[-1]]
        coarse = self.dtype != torch.float64 or all(torch.equal(p, p.float().double()) for p in last)
        return torch.finfo(torch.float32 if coarse else torch.float64).eps


def measure(base: Optimizer, group: Mapping[str, Any]) -> Anatomy:
    """Step a twin of `base` on stand-ins for `group` and read the facts off; nothing of the base's is touched."""
    refusal = _refused_unseen(base, group)
    if refusal is not None:
        return Anatomy(refusal=refusal)
    with unnoticed():
        prober = Prober(base, group)
        try:
            try:
                return _facts(prober)
            except CannotClone:
                raise
            except Exception:  # anything that a foreign step may raise: does it take float32 instead?
                prober.dtype = torch.float32
                return _facts(prober)
        except CannotClone as reason:
            return Anatomy(refusal=f"{_name(base)} cannot be tried out: {reason}. Wrap the inner optimizer instead.")
        except Exception as error:  # the message goes to the user, with the way out
            return Anatomy(refusal=_unsteppable(base, error))


def _facts(prober: Prober) -> Anatomy:
    at_zero, small, large = (prober.run(s) for s in (prober.zeros, prober.small, prober.large))
    depends = _depends(prober, at_zero, small) or _depends(prober, small, large)
    embeds = _embeds(small, large)
    key = _momentum_key(small, _maximizes(prober))
    facts = Anatomy(
        depends_on_param=depends,
        embeds_param=embeds,
        momentum_key=key,
        momentum_reader=None if key is None else "dequantize" if key in small.dequantized else "plain",
        stateless=not small.kept,
    )
    facts = _with_decay(prober, facts, large)
    residue = {k for dtype in prober.low for k in _residue(prober, dtype, set(embeds))}
    facts = replace(
        facts, residue=tuple(sorted(residue)), writes_grad=prober.writes_grad, clears_grad=prober.clears_grad
    )
    return replace(facts, refusal=_refused_seen(prober, facts))


def _name(base: Optimizer) -> str:
    return type(base).__name__


# --- what the update looks at ---------------------------------------------------------------------------------------


def _updates(record: Run) -> list[list[Tensor]]:
    return [[a - b for a, b in zip(before, after)] for before, after in zip(record.params, record.params[1:])]


def _depends(prober: Prober, one: Run, other: Run) -> bool:
    """Same gradients, two starts: do the updates differ by more than rounding?"""
    eps = max(prober.eps(one), prober.eps(other))
    for t, (us, vs) in enumerate(zip(_updates(one), _updates(other))):
        for i, (u, v) in enumerate(zip(us, vs)):
            size = max(_largest(x) for x in (u, v, one.params[t][i], other.params[t][i]))
            if not _largest(u - v) <= ROUNDING * eps * size:  # NaN depends
                return True
    return False


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _cosine(x: Tensor, y: Tensor) -> float:
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else 0.0


def _embeds(one: Run, other: Run) -> tuple[str, ...]:
    """Entries whose difference points where the parameters' difference does (cosine near 1; chance: 1/64)."""
    found = set()
    for t, states in enumerate(one.states):
        for i, state in enumerate(states):
            apart = one.params[t + 1][i] - other.params[t + 1][i]
            theirs = other.states[t][i]
            found |= {k for k in state if k in theirs and abs(_cosine(state[k] - theirs[k], apart)) > 0.5}
    return tuple(sorted(found))


# --- momentum -------------------------------------------------------------------------------------------------------

PREFERRED = ("exp_avg", "momentum_buffer", "momentum")


def _maximizes(prober: Prober) -> bool:
    return bool(prober.group.get("maximize", getattr(prober.base, "maximize", False)))


def _momentum_key(record: Run, maximize: bool) -> str | None:
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


# --- decay ----------------------------------------------------------------------------------------------------------


def _with_decay(prober: Prober, facts: Anatomy, without: Run) -> Anatomy:
    if not isinstance(prober.group.get("weight_decay"), (int, float, Tensor)):
        return facts
    decayed = prober.run(prober.large, decay=DECAY)
    effect = _apart(decayed, without)
    size = max(_largest(p) for p in decayed.params[-1])
    if effect <= ROUNDING * prober.eps(decayed) * size:
        return facts
    for sign in (-1.0, 1.0) if _maximizes(prober) else (1.0, -1.0):
        by_hand = prober.run(prober.large, lambda t, i, p, s=sign: prober.grads(t, i, p) + s * DECAY * p)
        if _apart(decayed, by_hand) < 0.01 * effect:  # the same: rounding; another rule: of the size of the effect
            return replace(facts, decay="coupled", decay_sign=sign)
    factors = Factors(prober, facts.depends_on_param)
    if not factors.uniform:
        return replace(facts, decay="inside")
    return replace(facts, decay="decoupled", decay_rule=factors.rule())


def _apart(one: Run, other: Run) -> float:
    """The norm over all stand-ins and steps of how far two runs are from each other; NaN counts as far."""
    total = sum(float((a - b).square().sum()) for x, y in zip(one.params, other.params) for a, b in zip(x, y))
    return float("inf") if total != total else total**0.5


class Factors:
    """Factor by step and stand-in over a grid of lr and weight_decay, beside what each formula says.

    Where the update does not look at the parameter, decayed runs from p and from 0 differ by factor·p, in the
    presence of gradients. Where it does, gradients are zero, so that nothing but decay is left.
    """

    def __init__(self, prober: Prober, depends: bool) -> None:
        self.rows: list[tuple[float, float, dict[str, float]]] = []  # measured, its error, by formula
        self.uniform = True
        by_decay: dict[tuple[float, float], float] = {}
        for lr in (LR, 2 * LR):
            for decay in (DECAY / 4, DECAY / 2):
                by_decay[lr, decay] = self._one(prober, depends, lr, decay)
        if depends:  # LAMB with decay in the trust ratio: all of the step is decay, however little of it was asked for
            for lr in (LR, 2 * LR):
                low, high = by_decay[lr, DECAY / 4], by_decay[lr, DECAY / 2]
                self.uniform &= low != 0 and abs(high / low - 2) < 0.1

    def _one(self, prober: Prober, depends: bool, lr: float, decay: float) -> float:
        said: list[list[dict[str, float]]] = []

        def ask(twin: Optimizer, params: list[Tensor]) -> None:
            said.append([_by_formula(twin, p) for p in params])

        if depends:
            moving = prober.run(
                prober.large, lambda t, i, p: torch.zeros_like(p), decay=decay, lr=lr, steps=4, before=ask
            )
            still = Run(params=[[torch.zeros_like(p) for p in ps] for ps in moving.params])
        else:
            moving = prober.run(prober.large, decay=decay, lr=lr, steps=4, before=ask)
            still = prober.run(prober.zeros, decay=decay, lr=lr, steps=4)
        eps, last = prober.eps(moving), 0.0
        for t, formulas in enumerate(said):
            for i, by_formula in enumerate(formulas):
                x = moving.params[t][i] - still.params[t][i]
                y = moving.params[t + 1][i] - still.params[t + 1][i]
                factor = float(x @ y) / float(x @ x)
                error = ROUNDING * eps * max(1.0, _largest(y) / max(_largest(x), 1e-300))
                worst = _largest(y - factor * x)
                self.uniform &= worst <= (1e-6 * abs(1 - factor) + error) * _largest(x)
                self.rows.append((factor, error, by_formula))
                last = factor - 1
        return last

    def rule(self) -> str:
        for name in RULES:
            if all(name in said and abs(f - said[name]) <= 1e-4 * abs(1 - f) + e for f, e, said in self.rows):
                return name
        return "measured"


def _by_formula(twin: Optimizer, param: Tensor) -> dict[str, float]:
    said = {}
    for name, rule in RULES.items():
        try:
            said[name] = float(rule(twin, twin.param_groups[0], param))
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # the group has not what this formula asks for (lr is None, no max_lr)
    return said


# --- low precision --------------------------------------------------------------------------------------------------


def _residue(prober: Prober, dtype: torch.dtype, embeds: set[str]) -> set[str]:
    """Entries that hold what rounding took from a `dtype` parameter.

    Steps of 1e-5 beside values near 1 vanish in the rounding (2^-8 in bfloat16, 2^-11 in float16): what a float32 run
    of the same gradients moved is what the parameter lacks, and an entry that equals it, or the parameter itself
    where it does not in full precision (a master copy), keeps it.
    """
    starts = [(x.sign() * (0.5 + x.abs())).to(dtype).double() for x in values(prober.shapes, 3, 0.1)]
    rounded: Grads = lambda t, i, p: prober.grads(t, i, p).to(dtype).double()  # noqa: E731
    exact = prober.run(starts, rounded, lr=1e-5)
    coarse = prober.run(starts, rounded, lr=1e-5, dtype=dtype)
    prober.run(starts, rounded, lr=1e-5, dtype=dtype, decay=DECAY)  # for what it does to gradients
    found = set()
    for i, state in enumerate(coarse.states[-1]):
        lost = exact.params[-1][i] - coarse.params[-1][i]
        for key, entry in state.items():
            new = key not in exact.states[-1][i]
            same_size = min(_largest(entry - lost), _largest(entry + lost)) < 0.5 * _largest(lost)
            if same_size or (new and abs(_cosine(entry, lost)) > 0.5):
                found.add(key)
            if key not in embeds and _largest(entry - exact.params[-1][i]) < 0.1 * _largest(exact.params[-1][i]):
                found.add(key)
    return found


# --- refusals -------------------------------------------------------------------------------------------------------


def _refused_unseen(base: Optimizer, group: Mapping[str, Any]) -> str | None:
    """What can be said without a step."""
    for attribute, value in vars(base).items():
        if isinstance(value, Optimizer):
            return (
                f"{_name(base)} is itself a wrapper (around {type(value).__name__}, its attribute '{attribute}'), "
                f"whose step we cannot see into; wrap {type(value).__name__} directly."
            )
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return _several_evaluations(base, "its step() requires a closure")
    if group.get("gradient_release"):
        return (
            f"{_name(base)} has gradient_release=True: it steps inside backward, where nothing can come between; "
            "construct it with gradient_release=False."
        )
    return None


def _several_evaluations(base: Optimizer, found: str) -> str:
    return (
        f"{_name(base)} evaluates the loss several times in a step ({found}), so there is no one gradient to select "
        "by; use a base that steps from p.grad alone."
    )


def _unsteppable(base: Optimizer, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if "closure" in text.lower() or "backward" in text.lower():
        return _several_evaluations(base, f"without a closure: {text}")
    if "sparse" in text.lower():
        return (
            f"{_name(base)} does not step on dense gradients ({text}), and selection needs dense ones; use a dense "
            "base, for instance torch.optim.Adam with nn.Embedding(sparse=False)."
        )
    return (
        f"{_name(base)} could not be stepped on tensors that stand in for its parameters ({text}), so what its update "
        "does is not known; if it needs a set-up before its first step (train(), hooks), do that first."
    )


def _refused_seen(prober: Prober, facts: Anatomy) -> str | None:
    name = _name(prober.base)
    if facts.embeds_param:
        entries = ", ".join(f"'{k}'" for k in facts.embeds_param)
        return (
            f"{name} keeps the iterates in its state ({entries} follow the parameter), and parameters moved by a mask "
            "would part from them; use a base whose state comes from gradients alone."
        )
    if {"d", "d0"} <= set(prober.group):  # Prodigy and D-Adaptation carry this pair in the group
        return (
            f"{name} estimates the distance to the solution ('d' and 'd0' in its group) from the steps it believes to "
            "have taken, and masked steps are others; use AdamW with a learning rate."
        )
    return None
