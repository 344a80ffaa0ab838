"""Checks a step in a rotated space against a transcription of it in float64, which knows nothing of how it is done.

Bases can't be compared with those of another run: where a gradient has a null space, any basis of it is right, and the
last bit decides. So they are read from the optimizer, which has to keep them orthogonal. Everything else of the step is
computed from them: the moments in the new basis, the update, the mask, and the movement of the parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from selective.base.fused_rules import FusedAdam
from selective.bench.check import Mismatch
from selective.bench.contenders import ADAMW, POLICIES
from selective.bench.training.groups import groups_of
from selective.bench.training.rows import Row
from selective.bench.workload import Workload
from selective.kernels import selective_step, spec
from selective.param_groups.settings import MATRICES, VIEWS
from selective.policies import Dense
from selective.preconditioner import Eigenbasis, Shape
from selective.preconditioner.matrices import from_matrices, in_own_dtype, matrix_shape
from selective.state.entries import BASIS

STEPS = 13  # with a refresh every ten steps there are two of each matrix by then, also where they take turns
LOOKED_AT = (0, 1, 2, 10, 11, 12)
ORTHOGONAL = 1e-3  # the largest element of PᵀP - 1: rounding of a factorisation in float32, many times over
# By the precision of a step's products: the relative error of moments, which are linear in their factors (second ones
# in the squares), and of the update of one coordinate, as a share of the learning rate. A coordinate whose gradient or
# moment is as small as the rounding may take any update: `SHARE` of them, and one of a small tensor.
MOMENTS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}
UPDATE = {"float32": 1e-2, "tf32": 0.1, "bfloat16": 0.3}
SHARE = {"float32": 1e-3, "tf32": 0.03, "bfloat16": 0.1}


@dataclass
class Seen:
    """A parameter with its state at one moment, as matrices [batch, rows, columns] in float64."""

    value: Tensor
    first: Tensor
    second: Tensor
    step: Tensor  # 0-d: the base's count of steps
    rows: Tensor | None  # the basis P; None if the rows are not rotated
    columns: Tensor | None  # the basis Q


def check_rotated(row: Row, workload: Workload, kinds: list[str]) -> None:
    """Take `STEPS` steps with the row's optimizer on new gradients, and compare some of them with the transcription.

    Raises:
        Mismatch: a basis is missing, is the identity or is not orthogonal, or a step has another result.
    """
    assert isinstance(row.space, Eigenbasis)
    optimizer = row.contender.make_optimizer(groups_of(workload.params, kinds, row.policy_on))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    places = [(p, _shape(p, kind)) for p, kind in zip(workload.params, kinds, strict=True)]
    for step in range(STEPS):
        workload.fresh_gradients()
        workload.hand_out()
        before = [_seen(optimizer, p, shape) for p, shape in places] if step in LOOKED_AT else []
        optimizer.step()
        for (p, shape), was, kind in zip(places if before else (), before, kinds, strict=bool(before)):
            is_rotated = kind in MATRICES and row.space.takes(shape)
            problem = _problem(row, p, shape, (was, _seen(optimizer, p, shape)), decays[p], step, is_rotated)
            if problem is not None:
                raise Mismatch(
                    f"{row.name}: {problem} of a parameter of shape {tuple(p.shape)} in step {step + 1}; a time would "
                    f"be that of another step"
                )


def _shape(p: Tensor, kind: str) -> Shape:
    view: Any = kind if kind in VIEWS else "matrices"
    shape = matrix_shape(p, view)
    return (1, 1, p.numel()) if isinstance(shape, str) else shape


def _seen(optimizer: torch.optim.Optimizer, p: Parameter, shape: Shape) -> Seen:
    state = optimizer.state[p]

    def matrices(x: Tensor) -> Tensor:
        return in_own_dtype(x.detach(), shape).double().clone()

    first, second = (matrices(state.get(name, torch.zeros_like(p))) for name in ("exp_avg", "exp_avg_sq"))
    step = torch.as_tensor(state.get("step", 0.0)).double().cpu().clone()
    bases = [state.get(f"{BASIS}{side}_basis") for side in ("rows", "columns")]
    return Seen(matrices(p), first, second, step, *(None if b is None else b.double().clone() for b in bases))


def _problem(
    row: Row, p: Parameter, shape: Shape, seen: tuple[Seen, Seen], decay: float, step: int, is_rotated: bool
) -> str | None:
    """The fault of one parameter's step, in words that go before "of a parameter of shape"; None if there is none."""
    before, after = seen
    assert isinstance(row.space, Eigenbasis)
    assert p.grad is not None
    bases = [basis for basis in (after.rows, after.columns) if basis is not None]
    if is_rotated and len(bases) != len(row.space.sides_of(shape)):
        return "the basis is missing"
    if bases and max(_distance_from_identity(b.mT @ b) for b in bases) > ORTHOGONAL:
        return "the basis is not orthogonal"
    if step == STEPS - 1 and any(_distance_from_identity(b) == 0 for b in bases):
        return "the basis is still the identity"
    if is_rotated and row.space.stands_still(step):
        return None if torch.equal(after.value, before.value) else "elements have moved in a step that stands still"
    lr, precision = ADAMW["lr"], row.space.precision
    moved = _into(before.value * (1 - lr * decay) - after.value, after)
    expected, first, second = _transcribed(row, p, shape, before, after)
    for name, mine, theirs in (("the first moment", after.first, first), ("the second moment", after.second, second)):
        apart, size = float((mine - theirs).norm()), float(theirs.norm())
        if not apart <= MOMENTS[precision] * size:
            return f"{name} is {apart / size:.1e} of its norm away from the transcription"
    rounding = 4 * torch.finfo(torch.float32).eps * float(before.value.abs().max())
    differing = int((~((moved - expected).abs() <= UPDATE[precision] * lr + rounding)).sum())
    if differing > 1 + SHARE[precision] * p.numel():
        return f"{differing} of {p.numel()} rotated elements have another update than the transcription"
    return None


def _transcribed(row: Row, p: Parameter, shape: Shape, before: Seen, after: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The masked update in the rotated space, and the moments after the step."""
    first, second = before.first, before.second
    left, right = _map(before.rows, after.rows), _map(before.columns, after.columns)
    if left is not None or right is not None:  # squared maps: Note [moments of one space] in rotation/carry.py
        first = _around(left, first, None if right is None else right.mT)
        second = _around(_squared(left), second, _squared(None if right is None else right.mT))
        bound = FusedAdam().bound({"betas": ADAMW["betas"]})
        if bound is not None:
            second = torch.maximum(second, (first / bound).square())
    assert p.grad is not None
    grad = _into(in_own_dtype(p.grad, shape).double(), after)
    state = {"exp_avg": first, "exp_avg_sq": second}
    state = {name: from_matrices(x, p.shape).clone() for name, x in state.items()} | {"step": after.step - 1}
    zeros = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
    policy = POLICIES["Everything × Fixed"] if isinstance(row.policy, Dense) or row.policy is None else row.policy
    parts = policy.specs()
    assert parts is not None
    beta1, beta2 = ADAMW["betas"]
    rule = spec.AdamRule(lr=ADAMW["lr"], beta1=beta1, beta2=beta2, eps=ADAMW["eps"])
    item = spec.Item(zeros, from_matrices(grad, p.shape), state, 0)
    selective_step([item], rule=rule, selection=parts[0], strength=parts[1], draw=spec.Draw(0, 0), backend="reference")
    update, first, second = (in_own_dtype(x, shape) for x in (-zeros, state["exp_avg"], state["exp_avg_sq"]))
    return update, first, second


def _map(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """The map from the coordinates of a side's old basis to those of the new one; None if the basis has not moved."""
    if after is None or (before is not None and torch.equal(before, after)):
        return None
    return after.mT if before is None else after.mT @ before


def _squared(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.square()


def _around(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    x = x if left is None else left @ x
    return x if right is None else x @ right


def _into(x: Tensor, seen: Seen) -> Tensor:
    return _around(None if seen.rows is None else seen.rows.mT, x, seen.columns)


def _distance_from_identity(x: Tensor) -> float:
    return float((x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max())
