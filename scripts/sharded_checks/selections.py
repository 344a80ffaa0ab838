"""Given the same updates, the same coordinates are selected as on whole tensors.

Parameters are set to zero before each step, so that after it they are the rate times multiplier times update, without
the rounding of an addition. Two multipliers of a policy differ by far more than `ROUNDING`, so that a coordinate
further apart was selected on one side only. The same multiplier can differ by the rounding of its float32 value and of
two products with it, 2^-24 each: 1e-6 allows for ten of them. An update is a sum, and its rounding is relative to its
addends: where these cancel, as in SGD's momentum and gradient, it is large beside the update. So 1e-6 of the greatest
coordinate of the step is allowed as well, which hides a selection only where the update is about as small as that.
Where both sides take the same operations, as on a CPU, the same bits are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from selective import Policy

from .given import Given
from .layouts import Layout, whole
from .optimizers import BASES, POLICIES, lacking
from .results import Result

ROUNDING = 1e-6
STEPS = 3
# Fewer rows than ranks, rows that don't divide, vectors, one element, three dimensions; and two that all layouts cut.
SHAPES = [(7, 5), (24, 8), (16, 24), (5,), (1,), (4, 1), (2, 9), (3, 4, 2)]


def selections(
    layout: Layout, bases: Sequence[str], policies: Mapping[str, Policy] = POLICIES, **options: Any
) -> Iterator[Result]:
    """A result for each base and policy. `options` are those of the wrapper on the layout's side alone."""
    for base in bases:
        if reason := lacking(base):
            yield Result("selections", layout.name, base, None, reason)
        else:
            yield from _of_base(layout, base, policies, **options)


def _of_base(layout: Layout, base: str, policies: Mapping[str, Policy], **options: Any) -> Iterator[Result]:
    """Step all policies together."""
    torch.manual_seed(layout.ranks.rank)  # which no policy may draw from
    how: dict[str, Any] = {"policies": tuple(policies.values())}
    single = Given(BASES[base], SHAPES, layout.ranks.device, **how)
    ours = Given(BASES[base], SHAPES, layout.ranks.device, layout=layout, **how, **options)
    wrong, different, furthest = [0] * len(policies), [0] * len(policies), [0.0] * len(policies)
    for number in range(STEPS):
        for run in (single, ours):
            with torch.no_grad():
                for p in run.params:
                    p.zero_()
            run.step(number)
        largest = [0.0] * len(policies)
        for index, theirs in enumerate(single.params):
            largest[index // len(SHAPES)] = max(largest[index // len(SHAPES)], float(theirs.detach().abs().max()))
        for index, (mine, theirs) in enumerate(zip(ours.params, single.params, strict=True)):
            here, there, at = whole(mine), theirs.detach(), index // len(SHAPES)
            sizes = torch.maximum(here.abs(), there.abs()) + largest[at]
            off = (here - there).abs() / sizes.clamp_min(torch.finfo(here.dtype).tiny)
            wrong[at] += int((~(off <= ROUNDING)).sum())
            different[at] += int((here != there).sum())
            furthest[at] = max(furthest[at], float(off.max()))
    count = STEPS * sum(p.numel() for p in single.params) // len(policies)
    for at, name in enumerate(policies):
        bits = different[at] == 0
        passed = wrong[at] == 0 and (bits or layout.ranks.on_gpu)
        said = "the same bits" if bits else f"{wrong[at]} selected otherwise, {different[at]} other bits, of {count}"
        numbers = {"coordinates": count, "selected_otherwise": wrong[at], "other_bits": different[at],
                   "furthest_relative": furthest[at], "allowed_relative": ROUNDING}  # fmt: skip
        yield Result("selections", layout.name, f"{base}, {name}", passed, said, numbers)
