"""From runs of the clone to facts. Every number below separates two populations; the comment says which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import CannotClone, StepFailed, unnoticed
from selective.base.facts import BaseFacts
from selective.base.measure_decay import with_decay
from selective.base.measure_moments import momentum_key
from selective.base.probe import DECAY, LARGE, ROUNDING, SIZABLE, SMALL, Grads, Prober, Run, cosine, largest, values
from selective.base.refusals import motionless, refused_seen, refused_unseen, unsteppable, untriable

State = Mapping[str, Tensor]


def measure(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    """Step a clone of `base` on stand-ins for `group` and read the facts off; nothing of the base's is touched."""
    refusal = refused_unseen(base, group)
    if refusal is not None:
        return BaseFacts(refusal=refusal)
    with unnoticed():
        prober = Prober(base, group)
        try:
            try:
                return _facts(prober, torch.float64)
            except StepFailed:  # does it take float32 instead?
                return _facts(prober, torch.float32)
        except CannotClone as reason:
            return BaseFacts(refusal=untriable(base, str(reason)))
        except StepFailed as error:
            return BaseFacts(refusal=unsteppable(base, error.__cause__ or error))


def _facts(prober: Prober, dtype: torch.dtype) -> BaseFacts:
    prober.prepare(dtype, SMALL)
    prober.find_who_makes_state()
    # A full preconditioner of a vector (Shampoo) has the square of its size, and its factorisation the cube.
    if prober.run(prober.small, steps=2).largest_state <= SIZABLE * 2**SMALL:
        prober.prepare(dtype, LARGE)
    at_zero, small, large = (prober.run(s) for s in (prober.zeros, prober.small, prober.large))
    if all(torch.equal(run.params[0][i], end) for run in (small, large) for i, end in enumerate(run.params[-1])):
        return BaseFacts(refusal=motionless(prober.base))
    depends = _depends(prober, at_zero, small) or _depends(prober, small, large)
    embeds = tuple(sorted(_embeds(small, large) | (set() if depends else _parting(prober, small, large))))
    refusal = refused_seen(prober.base, prober.group, embeds)
    if refusal is not None:  # the rest would describe a step that is not to be wrapped
        return BaseFacts(depends_on_param=True, embeds_param=embeds, refusal=refusal)
    key = momentum_key(small, prober.maximize)
    facts = BaseFacts(
        depends_on_param=depends,
        momentum_key=key,
        momentum_reader=None if key is None else "dequantize" if key in small.dequantized else "plain",
    )
    facts = with_decay(prober, facts, large)
    residue = {k for dtype in prober.low for k in _residue(prober, dtype)}
    return replace(
        facts,
        residue=tuple(sorted(residue)),
        writes_grad=prober.writes_grad,
        clears_grad=prober.clears_grad,
        keeps_memory=_keeps_memory(prober, small),
        stateless=not small.kept and not residue,
    )


def _keeps_memory(prober: Prober, usual: Run) -> bool:
    """Whether the run `usual` comes out otherwise where the parameters move to other memory before each step."""

    def exchange(clone: Optimizer, params: list[Tensor]) -> None:
        for p in params:
            p.data = p.data.clone()

    moved = prober.run(prober.small, before=exchange)
    return not all(
        torch.equal(a, b)
        for now, then in zip(moved.params, usual.params, strict=True)
        for a, b in zip(now, then, strict=True)
    )


def _updates(record: Run) -> list[list[Tensor]]:
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in pairwise(record.params)]


def _depends(prober: Prober, one: Run, other: Run) -> bool:
    """Same gradients, two starts: do the updates differ by more than rounding?"""
    eps = max(prober.eps(one), prober.eps(other))
    for t, (us, vs) in enumerate(zip(_updates(one), _updates(other), strict=True)):
        for i, (u, v) in enumerate(zip(us, vs, strict=True)):
            size = max(largest(x) for x in (u, v, one.params[t][i], other.params[t][i]))
            if not largest(u - v) <= ROUNDING * eps * size:  # NaN depends
                return True
    return False


def _embeds(one: Run, other: Run) -> set[str]:
    """Entries whose difference points where the parameters' difference does.

    The cosine of what follows is near 1; of what does not, 1/64 by chance (1/8 for the small stand-ins).
    """
    found: set[str] = set()
    for ours, theirs, p, q in _side_by_side(one, other):
        found |= {k for k in ours if k in theirs and abs(cosine(ours[k] - theirs[k], p - q)) > 0.7}
    return found


def _parting(prober: Prober, one: Run, other: Run) -> set[str]:
    """Entries that two starts make different, by more than rounding, of a base whose updates are the same from both.

    They follow the iterates in a direction of their own (FTRL's z has them times a size for each coordinate, so that
    the cosine is small), and the update is the same only because parameter and entry go together: from zeros, or where
    a mask has moved the parameter, it would be another one. Of all classes met, FTRL alone has such an entry.
    """
    eps, found = max(prober.eps(one), prober.eps(other)), set()
    for ours, theirs, p, q in _side_by_side(one, other):
        beside = max(largest(p), largest(q))  # a residue is all rounding
        for k in ours.keys() & theirs.keys():
            size = max(largest(ours[k]), largest(theirs[k]), beside)
            if largest(ours[k] - theirs[k]) > ROUNDING * eps * size:
                found.add(k)
    return found


def _side_by_side(one: Run, other: Run) -> Iterator[tuple[State, State, Tensor, Tensor]]:
    """The states of each stand-in after each step, and the parameters then."""
    for t, states in enumerate(one.states):
        for i, state in enumerate(states):
            yield state, other.states[t][i], one.params[t + 1][i], other.params[t + 1][i]


def _residue(prober: Prober, dtype: torch.dtype) -> set[str]:
    """Entries that hold what rounding took from a `dtype` parameter.

    Steps of 1e-5 beside values near 1 vanish in the rounding (2^-8 in bfloat16, 2^-11 in float16): what a float32 run
    of the same gradients moved is what the parameter lacks, and an entry that equals it, or the exact parameter (a
    master copy; in full precision it would have been found to follow the iterates), keeps it.
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
            same_size = min(largest(entry - lost), largest(entry + lost)) < 0.5 * largest(lost)
            if same_size or (new and abs(cosine(entry, lost)) > 0.5):
                found.add(key)
            if largest(entry - exact.params[-1][i]) < 0.1 * largest(exact.params[-1][i]):
                found.add(key)
    return found
