"""From one stored basis, rotated steps end where those of whole tensors do, to float32 rounding.

The bound is a backward error. A float32 product of length n is the exact product of factors of which one is off by at
most n · 2^-24 of each coordinate. Two products rotate a gradient, so that a run is the exact run of gradients that are
off by 2 n · 2^-24. The run of whole tensors is repeated with gradients that are moved by as much at random. The
furthest that a repetition ends from the run is what rounding of this size can do here. `TIMES` it is allowed, because
both sides round, and a few draws are not the worst case. To that come the products back to the parameters' space, which
round what has moved, and an addition to each parameter in each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from selective import MGUP, Dense, Eigenbasis

from .given import Given
from .layouts import UNSHARDED, Layout, whole
from .optimizers import BASES, lacking
from .results import Result

TIMES, DRAWS = 4, 3
BEFORE, AFTER = 4, 4  # steps to the checkpoint, and after it
SHAPES = {
    "unsharded": {"columns": [(24, 8), (32, 16), (16, 16), (5,)], "rows": [(8, 24), (16, 32), (16, 16), (5,)]},
    "gathered": {"columns": [(24, 8), (8, 24), (16, 16), (5,)], "rows": [(24, 8), (8, 24), (16, 16), (5,)]},
}
FULL = StateDictOptions(full_state_dict=True)


def rotations(layout: Layout, bases: Sequence[str]) -> Iterator[Result]:
    """A result for each base, rotated on the side that is whole, and on both, which are gathered."""
    for base in bases:
        if reason := lacking(base):
            yield Result("rotations", layout.name, base, None, reason)
            continue
        for kind in ("unsharded", "gathered"):
            yield from_one_basis(layout, base, kind)


def _space(sides: Any, layout: Layout) -> Eigenbasis:
    """Bases that are made once, before the checkpoint, with first moments that follow."""
    return Eigenbasis(sides=sides, solver="eigh", statistic="ema", stagger=False, refresh_every=1000)


def from_one_basis(layout: Layout, base: str, kind: str) -> Result:
    """Go on from the checkpoint of a run of whole tensors, on these and in the layout."""
    side = UNSHARDED.get(layout.name, "columns")
    shapes, device = SHAPES[kind][side], layout.ranks.device
    sides = {"unsharded": "unsharded" if layout.name in UNSHARDED else side, "gathered": "two"}[kind]
    policies = (Dense(), MGUP())

    def run(sides: Any, cut: Layout | None = None) -> Given:
        space = _space(sides, layout)
        both_ways = kind == "gathered"
        return Given(BASES[base], shapes, device, policies, cut, both_ways, preconditioner=space)

    alone = side if kind == "unsharded" else sides
    single = run(alone)
    for number in range(BEFORE):
        single.step(number)
    saved = _saved(single)
    ends = [_ended(_loaded(run(alone), saved), noise=_rounding(shapes), draw=draw) for draw in range(DRAWS)]
    exact, fresh = _ended(single), _loaded(run(sides, layout), saved)
    ours = _ended(fresh)
    spread, apart = max(_furthest(end, exact) for end in ends), _furthest(ours, exact)
    moved, largest = _furthest(exact, list(saved["values"].values())), max(float(x.abs().max()) for x in exact)
    allowed = TIMES * spread + _rounding(shapes) * moved + AFTER * 2.0**-24 * largest
    rotated = [_count_of_bases(given) for given in (fresh, single)]
    passed = apart <= allowed and rotated[0] == rotated[1] > 0
    said = f"{apart:.1e} apart, at most {allowed:.1e}; {rotated[0]} bases of {rotated[1]}"
    numbers = {"apart": apart, "allowed": allowed, "moved": moved, "spread": spread,
               "bases": rotated[0], "bases_of_whole_tensors": rotated[1]}  # fmt: skip
    return Result("rotations", layout.name, f"{base}, {kind}", passed, said, numbers)


def _rounding(shapes: Sequence[tuple[int, ...]]) -> float:
    return 2 * max(max(shape) for shape in shapes) * 2.0**-24


def _saved(run: Given) -> dict[str, Any]:
    """The full checkpoint of a run of whole tensors, in tensors of its own."""
    optimizer = get_optimizer_state_dict(run.module, run.optimizer, options=FULL)
    found = {"model": get_model_state_dict(run.module), "optimizer": optimizer}
    return _copied({**found, "values": {index: whole(p) for index, p in enumerate(run.params)}})


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _loaded(run: Given, saved: dict[str, Any]) -> Given:
    """Load the checkpoint as users do, in copies: torch's loading shares tensors with what it is given."""
    set_model_state_dict(run.module, _copied(saved["model"]), options=FULL)
    set_optimizer_state_dict(run.module, run.optimizer, _copied(saved["optimizer"]), options=FULL)
    return run


def _ended(run: Given, noise: float = 0.0, draw: int = 0) -> list[Tensor]:
    for number in range(BEFORE, BEFORE + AFTER):
        run.step(number, noise, draw)
    return [whole(p).clone() for p in run.params]


def _furthest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _count_of_bases(run: Given) -> int:
    state: Any = run.optimizer.state
    return sum("_basis" in key for p in run.params for key in state.get(p) or {})
