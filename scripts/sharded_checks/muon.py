"""torch's own sharded Muon, wrapped: its update where every multiplier is 1, and exactly K of it under top-K.

Rounding. torch adds the rate times the update to the parameter. The wrapper rounds that product first, and then
the sum. So a step differs by at most 2 · 2^-24 of the greatest coordinate, and gradients are given, so that nothing
feeds back: steps add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from selective import Everything, Fixed, Policy, TopK

from .given import Given
from .layouts import Layout, whole
from .results import Result

SHAPES = [(16, 8), (8, 24), (16, 16), (12, 8)]
STEPS = 3
HIGH, LOW, FRACTION = 2.0, 0.5, 0.3
TOP_K = Policy(selection=TopK(fraction=FRACTION), strength=Fixed(selected=HIGH, rest=LOW))
ONES = Policy(selection=Everything(), strength=Fixed(selected=1.0, rest=0.0))


def muon(layout: Layout) -> Iterator[Result]:
    """Two results, or one that says in words who refuses the layout."""

    def run(policy: Policy | None, decay: float) -> Given:
        def base(params: Any) -> torch.optim.Optimizer:
            return torch.optim.Muon(params, lr=1e-2, weight_decay=decay)

        bare = policy is None
        options: Any = {
            "capture": "scratch",
            "statistics": False,
        }  # as shards have it; whole matrices have our own rule
        return Given(base, SHAPES, layout.ranks.device, (policy,), layout, bare=bare, **options)

    try:
        theirs = run(None, 0.1)
        theirs.step(0)
    except Exception as error:  # whatever torch says of a layout that it can't orthogonalise in
        said = f"torch's own Muon refuses it: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
        yield Result("muon", layout.name, "every rank alike", None, said)
        return
    ours = run(ONES, 0.1)
    ours.step(0)
    for number in range(1, STEPS):
        theirs.step(number)
        ours.step(number)
    pairs = [(whole(a), whole(b)) for a, b in zip(ours.params, theirs.params, strict=True)]
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    allowed = STEPS * 2 * 2.0**-24 * max(float(b.abs().max()) for _, b in pairs)
    said = f"{apart:.1e} apart from torch's, at most {allowed:.1e}"
    numbers = {"apart": apart, "allowed": allowed, "steps": STEPS}
    yield Result("muon", layout.name, "every multiplier 1", apart <= allowed, said, numbers)
    yield _top_k(layout, run(TOP_K, 0.0), run(None, 0.0))


def _top_k(layout: Layout, ours: Given, theirs: Given) -> Result:
    """From parameters of zero, each coordinate is one of two multiples of torch's, and K are the larger one."""
    wrong, selected = 0, []
    for run in (ours, theirs):
        with torch.no_grad():
            for p in run.params:
                p.zero_()
        run.step(0)
    for mine, base in zip(ours.params, theirs.params, strict=True):
        here, there = whole(mine), whole(base)
        is_high, is_low = ((here - times * there).abs() <= 1e-6 * there.abs() * times for times in (HIGH, LOW))
        wrong += int((~(is_high | is_low)).sum()) + int(is_high.sum() != int(FRACTION * here.numel()))
        selected.append(int(is_high.sum()))
    said = f"selected {selected} of {[p.numel() for p in ours.params]}, {wrong} wrong"
    return Result("muon", layout.name, "exact top-K", wrong == 0, said, {"selected": selected, "wrong": wrong})
