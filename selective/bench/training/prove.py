"""Checks a row's result before its time means anything, on small parameters of every kind."""

from __future__ import annotations

from selective.bench.check import check
from selective.bench.shapes import Kinded
from selective.bench.training.check_rotated import check_rotated
from selective.bench.training.groups import groups_of
from selective.bench.training.rows import Row
from selective.bench.workload import Workload

CHECKED: list[Kinded] = [
    ("embeddings", (129, 33)), ("matrices", (37, 61)), ("matrices", (64, 64)), ("matrices", (65, 40)),
    ("matrices", (64, 64)), ("matrices", (37, 61)), ("columns:3", (24, 96)), ("conv", (6, 5, 3, 3)),
    ("vectors", (63,)), ("head", (129, 33)),
]  # fmt: skip
# Not all of other people's optimizers take these.
ODD: list[Kinded] = [("vectors", ()), ("vectors", (1,))]
UNALIGNED: list[Kinded] = [("vectors", (129,)), ("matrices", (65, 67))]
# For many chunks and sampled brackets.
LARGE: dict[str, list[Kinded]] = {
    "cpu": [("embeddings", (301, 1001))],
    "cuda": [("embeddings", (1001, 999)), ("matrices", (400, 300))],
}


def prove(row: Row, device: str) -> None:
    """Compare the row's optimizer with its reference, or its rotated step with a transcription.

    Raises:
        Mismatch: the results differ.
        Exception: whatever the optimizer itself raises.
    """
    ours = row.contender.agrees != "own"
    parameters = CHECKED + (ODD if ours else []) + (LARGE[device] if ours and row.space is None else [])
    unaligned = UNALIGNED if ours else []
    kinds = [kind for kind, _ in (*parameters, *unaligned)]

    def workload() -> Workload:
        shapes, offset = ([shape for _, shape in those] for those in (parameters, unaligned))
        return Workload(shapes, device, unaligned=offset)

    if row.space is not None:
        check_rotated(row, workload(), kinds)
        return
    check(
        row.contender,
        device,
        make_workload=workload,
        arrange=lambda params: groups_of(params, kinds, row.policy_on),
    )
