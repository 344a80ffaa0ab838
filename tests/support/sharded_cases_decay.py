"""Selective decay of shards: what one device decays, a random control included, and parameters that are rotated."""

from __future__ import annotations

from typing import Any

from sharded_cases_own import Elementwise
from sharded_cases_rotation import CLOSE, EVERY, apart, load, saved
from sharded_cases_rotation import layouts as rotated_layouts
from sharded_runs import Run, adamw, compare, layouts, nadam
from sharded_world import World

from selective import MGUP, CautiousDecay, Dense, Eigenbasis, RandomDecay

CASES: list[tuple[Any, dict[str, Any]]] = [
    (adamw, {"policy": Dense(), "decay": CautiousDecay(), "stochastic_rounding": True}),
    (adamw, {"policy": MGUP(), "decay": CautiousDecay(of="masked", strict=True)}),
    (adamw, {"policy": Elementwise(), "decay": RandomDecay(strict=True)}),
    (nadam, {"policy": MGUP(), "decay": CautiousDecay(weight_decay=0.5)}),
]
SHAPES = [(7, 5), (24, 6), (5,), (2, 9)]  # rows without a gradient, fewer rows than ranks


def decays_as_one_device_everywhere(world: World) -> None:
    """The same in every layout; for the slow lane."""
    decays_as_one_device(world, everywhere=True)


def decays_as_one_device(world: World, everywhere: bool = False) -> None:
    """The same bits in two layouts for each case. NAdam's own decay would be coupled, so it is switched off."""
    for number, (base, options) in enumerate(CASES):

        def make(params: Any, base: Any = base) -> Any:
            made = base(params)
            if base is nadam:
                made.param_groups[0]["weight_decay"] = 0.0
            return made

        single = Run(make, options, shapes=SHAPES).train(range(2))
        for name, (mesh, place) in layouts(world, everywhere, None if everywhere else number).items():
            ours = Run(make, options, mesh, place, shapes=SHAPES).train(range(2))
            compare(ours, single, f"{base.__name__}, {options}, {name}")


def rotated_parameters_decay_as_on_one_device(world: World) -> None:
    """From one stored basis, in every layout that is rotated: up to rounding, see `sharded_cases_rotation`.

    No update is within rounding of 0 here. One that were would decay on one side only, which makes 1e-4 and more.
    """
    found, shapes = [], [(12, 12), (17, 8)]
    fixed: dict[str, Any] = {**EVERY, "refresh_every": 100}
    for name, mesh, place, side in rotated_layouts(world, everywhere=False):
        there = {"policy": MGUP(), "decay": CautiousDecay(), "preconditioner": Eigenbasis(**{**fixed, "sides": side})}
        single = Run(adamw, there, shapes=shapes).train(range(2))
        ours = Run(adamw, {**there, "preconditioner": Eigenbasis(**fixed)}, mesh, place, shapes=shapes)
        load(ours, saved(single)).train(range(2, 3))
        found.append((name, apart(ours, single.train(range(2, 3)))))
    assert all(distance < CLOSE for _, distance in found), found
