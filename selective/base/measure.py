"""The measurement of the facts about a base from runs of a clone.

Every threshold below separates two groups of classes; the comment beside it says which.
"""

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
from selective.base.probe import (
    DECAY,
    LARGE,
    ROUNDING,
    SIZABLE,
    SMALL,
    Grads,
    Prober,
    Recording,
    cosine,
    largest,
    values,
)
from selective.base.refusals import motionless, refused_seen, refused_unseen, unsteppable, untriable


def measure(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    """Step a clone of `base` on stand-ins for `group`, and derive the facts. The base itself does not change."""
    refusal = refused_unseen(base, group)
    if refusal is not None:
        return BaseFacts(refusal=refusal)
    with unnoticed():
        prober = Prober(base, group)
        try:
            try:
                return _facts(prober, torch.float64)
            except StepFailed:  # some classes accept float32 only
                return _facts(prober, torch.float32)
        except CannotClone as reason:
            return BaseFacts(refusal=untriable(base, str(reason)))
        except StepFailed as error:
            return BaseFacts(refusal=unsteppable(base, error.__cause__ or error))


def _facts(prober: Prober, dtype: torch.dtype) -> BaseFacts:
    """Derive the facts from runs in `dtype`, inside of `unnoticed()`."""
    prober.prepare(dtype, SMALL)
    prober.find_who_makes_state()
    # Larger stand-ins, unless the state grows too fast: a full preconditioner of a vector (Shampoo) has the square of
    # the vector's size, and its factorisation takes the cube of it.
    if prober.run(prober.small, steps=2).largest_state <= SIZABLE * 2**SMALL:
        prober.prepare(dtype, LARGE)
    at_zero, small, large = (prober.run(s) for s in (prober.zeros, prober.small, prober.large))
    if all(torch.equal(run.params[0][i], end) for run in (small, large) for i, end in enumerate(run.params[-1])):
        return BaseFacts(refusal=motionless(prober.base))
    depends = _depends(prober, at_zero, small) or _depends(prober, small, large)
    embeds = tuple(sorted(_embeds(small, large) | (set() if depends else _follows_by_size(prober, small, large))))
    refusal = refused_seen(prober.base, prober.group, embeds)
    if refusal is not None:  # nobody needs the other facts of a base that cannot be wrapped
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
        stateless=not small.entry_names and not residue,
    )


def _keeps_memory(prober: Prober, usual: Recording) -> bool:
    """Return True if the run `usual` ends otherwise when the parameters move to new memory before each step."""

    def move_to_new_memory(clone: Optimizer, params: list[Tensor]) -> None:
        for p in params:
            p.data = p.data.clone()

    moved = prober.run(prober.small, before=move_to_new_memory)
    return not all(
        torch.equal(a, b)
        for now, then in zip(moved.params, usual.params, strict=True)
        for a, b in zip(now, then, strict=True)
    )


def _updates(record: Recording) -> list[list[Tensor]]:
    """Return parameter before minus parameter after, by step and stand-in."""
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in pairwise(record.params)]


def _depends(prober: Prober, first: Recording, second: Recording) -> bool:
    """Return True if two runs from different starts with the same gradients have different updates, beyond rounding."""
    eps = max(prober.eps(first), prober.eps(second))
    for t, (us, vs) in enumerate(zip(_updates(first), _updates(second), strict=True)):
        for i, (u, v) in enumerate(zip(us, vs, strict=True)):
            size = max(largest(x) for x in (u, v, first.params[t][i], second.params[t][i]))
            if not largest(u - v) <= ROUNDING * eps * size:  # NaN counts as different
                return True
    return False


def _embeds(first: Recording, second: Recording) -> set[str]:
    """Return the entries whose difference between two runs has the direction of the parameters' difference.

    The cosine is near 1 for entries that follow the iterates. For others it is 1/64 by chance, and 1/8 with the small
    stand-ins.
    """
    names: set[str] = set()
    for state, other_state, p, q in _side_by_side(first, second):
        names |= {k for k in state if k in other_state and abs(cosine(state[k] - other_state[k], p - q)) > 0.7}
    return names


def _follows_by_size(prober: Prober, first: Recording, second: Recording) -> set[str]:
    """Return the entries that differ between two starts, beyond rounding, though the updates are the same.

    Such an entry follows the iterates, but in another direction than they have. FTRL's z has each coordinate of the
    parameter times a size of its own, so that the cosine in `_embeds` is small. The updates are the same only as long
    as parameter and entry move together, which a mask or a start from zeros would prevent. FTRL is the only class found
    that has such an entry.
    """
    eps, names = max(prober.eps(first), prober.eps(second)), set()
    for state, other_state, p, q in _side_by_side(first, second):
        param_size = max(largest(p), largest(q))  # rounding is relative to this: a residue consists of rounding alone
        for k in state.keys() & other_state.keys():
            size = max(largest(state[k]), largest(other_state[k]), param_size)
            if largest(state[k] - other_state[k]) > ROUNDING * eps * size:
                names.add(k)
    return names


def _side_by_side(
    first: Recording, second: Recording
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor, Tensor]]:
    """Iterate over all steps and stand-ins: both runs' states after the step, and both runs' parameters."""
    for t, states in enumerate(first.states):
        for i, state in enumerate(states):
            yield state, second.states[t][i], first.params[t + 1][i], second.params[t + 1][i]


def _residue(prober: Prober, dtype: torch.dtype) -> set[str]:
    """Return the entries that hold the rounding residue of a parameter in `dtype`.

    Steps of 1e-5 vanish beside values near 1, whose spacing is 2^-8 in bfloat16 and 2^-11 in float16. So the movement
    of a float32 run with the same gradients is missing from the parameter. An entry that equals this movement holds the
    residue. So does one that equals the exact parameter, a master copy. (In full precision `_embeds` would have found
    it.)
    """
    starts = [(x.sign() * (0.5 + x.abs())).to(dtype).double() for x in values(prober.shapes, 3, 0.1)]
    rounded: Grads = lambda t, i, p: prober.grads(t, i, p).to(dtype).double()  # noqa: E731
    exact = prober.run(starts, rounded, lr=1e-5)
    coarse = prober.run(starts, rounded, lr=1e-5, dtype=dtype)
    prober.run(starts, rounded, lr=1e-5, dtype=dtype, decay=DECAY)  # records whether this writes on gradients
    names = set()
    for i, state in enumerate(coarse.states[-1]):
        lost = exact.params[-1][i] - coarse.params[-1][i]
        for key, entry in state.items():
            is_new = key not in exact.states[-1][i]
            same_size = min(largest(entry - lost), largest(entry + lost)) < 0.5 * largest(lost)
            if same_size or (is_new and abs(cosine(entry, lost)) > 0.5):
                names.add(key)
            if largest(entry - exact.params[-1][i]) < 0.1 * largest(exact.params[-1][i]):
                names.add(key)
    return names
