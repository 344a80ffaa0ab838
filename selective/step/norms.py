"""Norm control in a step: parameters are held before the jobs, and turned by what these have added to them.

The base, the policy and the preconditioner step them as always. Where nobody looks at a parameter's value, the jobs
step zeros, so that what they leave is the update itself: no digit of it is lost against a large weight, and weight
decay, which multiplies, has no effect. Otherwise the update is the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective.base.hyperparameters import LOW_PRECISION, plain_number
from selective.foreach import PART, copy_
from selective.kernels import Matrices, hold_matrices_, norm_sums, spec, turn_matrices_, turned_matrices
from selective.kernels.reference.rounding import store
from selective.norms import NormControl
from selective.norms.matrices import reading
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.norm_plan import NormPlan
from selective.sharding.collectives import sums_over_ranks
from selective.sharding.dtensor import local_of, shard_of
from selective.step.run import StepRunner


@dataclass
class Held:
    """Parameters of one group and one shape: their values before the step, stacked in their own dtype."""

    norms: NormPlan
    group: dict[str, Any]
    members: list[Parameter]
    tensors: list[Tensor]  # this rank's part of each
    matrices: Matrices
    old: Tensor  # [n, *size]

    def sums(self) -> Tensor:
        """The sums over what is here of each matrix, float64 [3, n, count]."""
        return norm_sums(self.tensors, self.old, matrices=self.matrices, from_zero=self.norms.from_zero)

    def restore(self) -> None:
        """Put the values from before the step back."""
        copy_(self.tensors, list(self.old.unbind()))


@contextmanager
def norms_kept(steps: Sequence[tuple[StepRunner, Sequence[GroupPlan], Sequence[list[Parameter]]]]) -> Iterator[None]:
    """Take a step of these optimizers in the body, and keep the norms that are to be kept.

    If the body raises, the parameters have the values that they had before.
    """
    held = [(runner, hold_norms(runner, plans, present)) for runner, plans, present in steps if _any(plans)]
    try:
        yield
    except BaseException:
        for _, of_one in held:
            for each in of_one:
                each.restore()
        raise
    for runner, of_one in held:
        turn(runner, of_one)


def _any(plans: Sequence[GroupPlan]) -> bool:
    return any(plan.norms is not None for plan in plans)


def hold_norms(runner: StepRunner, plans: Sequence[GroupPlan], present: Sequence[list[Parameter]]) -> list[Held]:
    """Copy the parameters whose norm is kept, and let the step begin at zeros where it may.

    Raises:
        ValueError: one that is stepped for the first time is 0. Nothing has moved then.
    """
    alike = [each for plan, members in zip(plans, present, strict=True) for each in _alike(plan, members)]
    new = [(norms, some) for norms, _, some in alike if not norms.seen.issuperset(m.tensor for m in some)]
    if new and not _recording(new[0][1][0]):
        _refuse_zeros(runner, new)
    return [_hold(norms, group, some) for norms, group, some in alike]


def turn(runner: StepRunner, held: Sequence[Held]) -> None:
    """Write the parameters that the step leads to: those before it, turned towards where it has moved them."""
    found = [each.sums() for each in held]
    _add_up(runner, [(each.members, total) for each, total in zip(held, found, strict=True)])
    for each, totals in zip(held, found, strict=True):
        norm, lr = each.norms.norm, plain_number(each.group["lr"])
        assert isinstance(norm, NormControl)
        options: Any = {
            "matrices": each.matrices, "from_zero": each.norms.from_zero, "rate": abs(lr) * norm.scale,
        }  # fmt: skip
        if runner.options.rounding and each.old.dtype in LOW_PRECISION:
            _round(runner, each, turned_matrices(each.tensors, each.old, totals, **options))
        else:
            turn_matrices_(each.tensors, each.old, totals, **options)


Alike = tuple[NormPlan, dict[str, Any], list[Parameter]]  # a group's rule, the group, parameters of one shape in it


def _alike(plan: GroupPlan, members: Sequence[Parameter]) -> list[Alike]:
    """The parameters of one group that are under its rule, by shape, at most `PART` elements together."""
    norms = plan.norms
    if norms is None:
        return []
    by_kind: dict[tuple[Any, ...], list[Parameter]] = {}
    for member in members:
        shape = norms.shapes.get(member.tensor)
        if shape is not None:
            here = local_of(member.tensor)
            by_kind.setdefault((here.shape, shape, here.dtype, here.device), []).append(member)
    found = []
    for (size, *_), same in by_kind.items():
        count = max(1, PART // max(1, size.numel()))
        found += [(norms, plan.group, same[at : at + count]) for at in range(0, len(same), count)]
    return found


def _hold(norms: NormPlan, group: dict[str, Any], members: list[Parameter]) -> Held:
    tensors = _here(members)
    matrices = reading(tensors[0].shape, norms.shapes[members[0].tensor])
    return Held(norms, group, members, tensors, matrices, hold_matrices_(tensors, zero=norms.from_zero))


def _here(members: Sequence[Parameter]) -> list[Tensor]:
    return [local_of(member.tensor.detach()) for member in members]


def _add_up(runner: StepRunner, parts: Sequence[tuple[list[Parameter], Tensor]]) -> None:
    """Add sums [k, n, count] over the ranks that have parts of the same n parameters, in place.

    There is one all-reduce for each group of ranks. Parameters come in the order of their addresses, which all ranks
    share, whatever shapes their parts have.
    """
    if runner.options.scope == "local":
        return
    rows = [(m.address, m.tensor, total[:, j]) for members, total in parts for j, m in enumerate(members)]
    cut = [(row, shard) for _, tensor, row in sorted(rows, key=_first) if (shard := shard_of(tensor)) is not None]
    wholes = sums_over_ranks([row for row, _ in cut], [shard for _, shard in cut])
    for (row, _), whole in zip(cut, wholes, strict=True):
        row.copy_(whole)


def _first(row: tuple[int, Tensor, Tensor]) -> int:
    return row[0]


def _refuse_zeros(runner: StepRunner, new: Sequence[tuple[NormPlan, list[Parameter]]]) -> None:
    """Refuse a matrix that is 0, which would stay so. Waits for the device, in a parameter's first step only."""
    parts = []
    for norms, members in new:
        tensors = _here(members)
        matrices = reading(tensors[0].shape, norms.shapes[members[0].tensor])
        before = torch.stack(tensors)
        parts.append((members, norm_sums(tensors, before, matrices=matrices, from_zero=True)[:1]))
    _add_up(runner, parts)
    for (norms, members), (_, squares) in zip(new, parts, strict=True):
        empty = (squares[0] == 0).any(dim=1).tolist()
        for member, is_zero in zip(members, empty, strict=True):
            whole = local_of(member.tensor) if runner.options.scope == "local" else member.tensor
            if is_zero and whole.numel():  # a rank may have no part of it
                raise ValueError(
                    f"SelectiveUpdate: {member.name!r}, or a matrix in it, is 0, and {norms.norm!r} would keep it so: "
                    f"begin with other values, or put it into a group whose norm is None"
                )
        norms.seen.update(member.tensor for member in members)


def _recording(member: Parameter) -> bool:
    """True if the step goes into a CUDA graph, in which nothing can be read."""
    return member.tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _round(runner: StepRunner, held: Held, new: Tensor) -> None:
    """Write a stack to its parameters, rounded stochastically."""
    draw = spec.Draw(runner.count.seed, runner.count.steps, True, runner.count.clocks.on(new.device))
    for member, tensor, exact in zip(held.members, held.tensors, new.unbind(), strict=True):
        store(tensor, exact, draw, member.address, shard=shard_of(member.tensor))
