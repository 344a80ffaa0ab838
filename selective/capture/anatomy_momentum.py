"""Which state entry is a first moment of the gradient: found by what it does, not by its name."""

from __future__ import annotations

import torch

from selective.capture.anatomy_probe import Run

PREFERRED = ("exp_avg", "momentum_buffer", "momentum")


def momentum_key(record: Run, maximize: bool) -> str | None:
    """The entry of every stand-in's state that is one, the customary names first; None where there is none."""
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
