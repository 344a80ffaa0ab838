"""Norm control in a step: parameters are held before the jobs, and turned by what these have added to them.

The base, the policy and the preconditioner step them as always. Hooks of the base run before and after all of it. Where
nobody looks at a parameter's value, the jobs step zeros, so that what they leave is the update itself. No digit is lost
against a large weight then, and weight decay, which multiplies, has no effect. Otherwise the update is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from selective.base.hyperparameters import LOW_PRECISION, plain_number
from selective.foreach import PART, copy_, zero_
from selective.kernels import Matrices, hold_matrices_, norm_sums, spec, turn_matrices_, turned_matrices
from selective.kernels.reference.rounding import store
from selective.norms import NormControl
from selective.norms.matrices import reading
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.norm_plan import NormPlan
from selective.plan.options import Options
from selective.sharding.collectives import sums_over_ranks
from selective.sharding.dtensor import is_dtensor, local_of, shard_of
from selective.state.store import StateStore
from selective.step_count import StepCount


@dataclass
class Alike:
    """Parameters of one group and one shape that are under its rule, as the kernels take them."""

    norms: NormPlan
    group: dict[str, Any]
    members: list[Parameter]
    matrices: Matrices
    cut: bool  # True if they are DTensors

    def tensors(self) -> list[Tensor]:
        """This rank's part of each, where it is now."""
        found = [member.tensor.detach() for member in self.members]
        return [local_of(tensor) for tensor in found] if self.cut else found


@dataclass
class Held:
    """Parameters that are alike, and their values before the step, stacked in their own dtype."""

    alike: Alike
    tensors: list[Tensor]
    old: Tensor  # [n, *size]

    def sums(self) -> Tensor:
        """The sums over what is here of each matrix, float64 [3, n, count]."""
        alike = self.alike
        return norm_sums(self.tensors, self.old, matrices=alike.matrices, from_zero=alike.norms.from_zero)


class Runner(Protocol):
    """The part of a step's runner that is needed."""

    options: Options
    count: StepCount
    store: StateStore


class NormsInStep:
    """Norm control in one step of several optimizers: `hold`, then the step, then `turn`; `restore` after an error."""

    def __init__(self, steps: Sequence[tuple[Runner, Sequence[GroupPlan], Sequence[list[Parameter]]]]) -> None:
        self._steps = [(runner, plans, present) for runner, plans, present in steps if _any(plans)]
        self._held: list[tuple[Runner, list[Held]]] = []

    def hold(self) -> None:
        """Copy the parameters whose norm is kept, and let the step begin at zeros where it may.

        Raises:
            ValueError: one that is stepped for the first time is 0. Nothing has moved then.
        """
        alike = []
        for runner, plans, present in self._steps:
            keeps = not runner.store.base._optimizer_step_pre_hooks  # which have run, and may have moved parameters
            mine = [each for plan, members in zip(plans, present, strict=True) for each in _alike(plan, members, keeps)]
            new = [each for each in mine if not each.norms.seen.issuperset(m.tensor for m in each.members)]
            if new and not _recording(new[0].members[0]):
                _refuse_zeros(runner, new)
            alike.append((runner, mine))
        for runner, mine in alike:
            held: list[Held] = []
            self._held.append((runner, held))
            for each in mine:
                tensors, from_zero = each.tensors(), each.norms.from_zero
                by_kernel = from_zero and tensors[0].is_cuda  # the copy and the zeros in one launch
                held.append(Held(each, tensors, hold_matrices_(tensors, zero=by_kernel)))
                if from_zero and not by_kernel:
                    zero_(tensors)

    def turn(self) -> None:
        """Write the parameters that the step leads to: those before it, turned towards where it has moved them."""
        for runner, held in self._held:
            _turn(runner, held)
        self._held = []

    def restore(self) -> None:
        """Put the values from before the step back."""
        for _, held in self._held:
            for each in held:
                copy_(each.tensors, list(each.old.unbind()))
        self._held = []


def _any(plans: Sequence[GroupPlan]) -> bool:
    return any(plan.norms is not None for plan in plans)


def _turn(runner: Runner, held: Sequence[Held]) -> None:
    """Turn the parameters of one optimizer."""
    found = [each.sums() for each in held]
    _add_up(runner, [(each.alike, total) for each, total in zip(held, found, strict=True)])
    for each, totals in zip(held, found, strict=True):
        alike, old = each.alike, each.old
        norm, lr = alike.norms.norm, plain_number(alike.group["lr"])
        assert isinstance(norm, NormControl)
        options: Any = {
            "matrices": alike.matrices, "from_zero": alike.norms.from_zero, "rate": abs(lr) * norm.scale,
        }  # fmt: skip
        if runner.options.rounding and old.dtype in LOW_PRECISION:
            _round(runner, each, turned_matrices(each.tensors, old, totals, **options))
        else:
            turn_matrices_(each.tensors, old, totals, **options)


def _alike(plan: GroupPlan, members: list[Parameter], keeps: bool) -> list[Alike]:
    """The parameters of one group that are under its rule, by shape, at most `PART` elements together.

    The list of the last step is taken again as long as `members` is the same list, which has others of the same tensors
    after a change of their shape, dtype or device. Without `keeps` it is made anew.
    """
    norms = plan.norms
    if norms is None:
        return []
    kept = norms.kept if keeps else None
    if kept is not None and kept[0] is members and kept[1] is plan.group:
        return kept[2]
    by_kind: dict[tuple[Any, ...], list[Parameter]] = {}
    for member in members:
        shape = norms.shapes.get(member.tensor)
        if shape is not None:
            here, cut = local_of(member.tensor), is_dtensor(member.tensor)
            by_kind.setdefault((here.shape, shape, cut, here.dtype, here.device), []).append(member)
    found = []
    for (size, shape, cut, *_), same in by_kind.items():
        count = max(1, PART // max(1, size.numel()))
        parts = [same[at : at + count] for at in range(0, len(same), count)]
        found += [Alike(norms, plan.group, part, reading(size, shape), cut) for part in parts]
    norms.kept = None if any(alike.cut for alike in found) else (members, plan.group, found)
    return found


def _add_up(runner: Runner, parts: Sequence[tuple[Alike, Tensor]]) -> None:
    """Add sums [k, n, count] over the ranks that have parts of the same n parameters, in place.

    There is one all-reduce for each group of ranks. Parameters come in the order of their addresses, which all ranks
    share, whatever shapes their parts have.
    """
    if runner.options.scope == "local":
        return
    cut = [(alike.members, total) for alike, total in parts if alike.cut]
    rows = [(m.address, m.tensor, total[:, j]) for members, total in cut for j, m in enumerate(members)]
    shards = [(row, shard) for _, tensor, row in sorted(rows, key=_first) if (shard := shard_of(tensor)) is not None]
    wholes = sums_over_ranks([row for row, _ in shards], [shard for _, shard in shards])
    for (row, _), whole in zip(shards, wholes, strict=True):
        row.copy_(whole)


def _first(row: tuple[int, Tensor, Tensor]) -> int:
    return row[0]


def _refuse_zeros(runner: Runner, new: Sequence[Alike]) -> None:
    """Refuse a matrix that is 0, which would stay so. Waits for the device, in a parameter's first step only."""
    parts = []
    for alike in new:
        tensors = alike.tensors()
        before = hold_matrices_(tensors, zero=False)
        parts.append((alike, norm_sums(tensors, before, matrices=alike.matrices, from_zero=True)[:1]))
    _add_up(runner, parts)
    for alike, (squares,) in parts:
        empty = (squares == 0).any(dim=1).tolist()
        for member, is_zero in zip(alike.members, empty, strict=True):
            is_part = runner.options.scope == "local" and shard_of(member.tensor) is not None
            if is_zero and member.tensor.numel() and not is_part:  # a part may be 0, or nothing
                raise ValueError(
                    f"SelectiveUpdate: {member.name!r}, or a matrix in it, is 0, and {alike.norms.norm!r} would keep "
                    f"it so. Begin with other values, small ones for instance, or make the groups with "
                    f"param_groups_for and put it into one whose norm is None"
                )
        alike.norms.seen.update(member.tensor for member in alike.members)


def _recording(member: Parameter) -> bool:
    """True if the step goes into a CUDA graph, in which nothing can be read."""
    return member.tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _round(runner: Runner, held: Held, new: Tensor) -> None:
    """Write a stack to its parameters, rounded stochastically."""
    draw = spec.Draw(runner.count.seed, runner.count.steps, True, runner.count.clocks.on(new.device))
    for member, tensor, exact in zip(held.alike.members, held.tensors, new.unbind(), strict=True):
        store(tensor, exact, draw, member.address, shard=shard_of(member.tensor))
