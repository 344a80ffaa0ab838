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

from selective.base.hyperparameters import plain_number
from selective.foreach import PART, copy_, zero_
from selective.kernels import spec
from selective.kernels.reference.rounding import store
from selective.norms import NormControl
from selective.norms.keep_norms import Blocks, sums, turned_
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.preconditioner import Shape
from selective.sharding.collectives import sums_over_ranks
from selective.sharding.dtensor import local_of, shard_of
from selective.step.run import StepRunner


@dataclass
class Held:
    """Parameters of one group and one shape: their values before the step, stacked in their own dtype."""

    plan: GroupPlan
    members: list[Parameter]
    blocks: Blocks
    old: Tensor  # [n, *size]

    @property
    def tensors(self) -> list[Tensor]:
        """This rank's part of each parameter."""
        return [local_of(member.tensor.detach()) for member in self.members]

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
    held = [each for plan, members in zip(plans, present, strict=True) for each in _hold(plan, members)]
    new = [each for each in held if not _norms_of(each.plan).seen.issuperset(m.tensor for m in each.members)]
    if new and not _recording(new):
        _refuse_zeros(new, runner)
    for each in held:
        if _norms_of(each.plan).from_zero:
            zero_(each.tensors)
    return held


def turn(runner: StepRunner, held: Sequence[Held]) -> None:
    """Write the parameters that the step leads to: those before it, turned towards where it has moved them."""
    if not held:
        return
    moved = [_moved(each) for each in held]
    totals = _totals(runner, held, [each.old for each in held], moved)
    for each, added, total in zip(held, moved, totals, strict=True):
        norm, lr = _norms_of(each.plan).norm, plain_number(each.plan.group["lr"])
        assert isinstance(norm, NormControl)
        new = turned_(each.blocks, _wide(each.old), added, total, abs(lr) * norm.scale)
        _write(runner, each, new)


def _norms_of(plan: GroupPlan) -> Any:
    assert plan.norms is not None
    return plan.norms


def _hold(plan: GroupPlan, members: Sequence[Parameter]) -> list[Held]:
    """The parameters of one group that are under its rule, in stacks of one shape and at most `PART` elements."""
    if plan.norms is None:
        return []
    alike: dict[tuple[Any, ...], list[Parameter]] = {}
    for member in members:
        shape = plan.norms.shapes.get(member.tensor)
        if shape is not None:
            here = local_of(member.tensor)
            alike.setdefault((here.shape, shape, here.dtype, here.device), []).append(member)
    held = []
    for (size, shape, *_), same in alike.items():
        count = max(1, PART // max(1, size.numel()))
        for first in range(0, len(same), count):
            some = same[first : first + count]
            old = torch.stack([local_of(member.tensor.detach()) for member in some])
            held.append(Held(plan, some, Blocks(size, _here(shape, size)), old))
    return held


def _here(shape: Shape, size: torch.Size) -> Shape:
    """The shape of the matrix that is here: of a DTensor, which is one matrix, a part."""
    return shape if size.numel() == shape[0] * shape[1] * shape[2] else (1, size[0], size[1])


def _moved(held: Held) -> Tensor:
    """What the step has added to the parameters, float32 or float64."""
    now = torch.stack(held.tensors)
    return _wide(now) if _norms_of(held.plan).from_zero else _wide(now).sub_(_wide(held.old))


def _wide(stack: Tensor) -> Tensor:
    return stack if stack.dtype == torch.float64 else stack.float()


def _totals(runner: StepRunner, held: Sequence[Held], old: Sequence[Tensor], moved: Sequence[Tensor]) -> list[Tensor]:
    """The sums over whole matrices, by stack. Ranks add them up in the order of the parameters."""
    found = [sums(e.blocks, _wide(o), m) for e, o, m in zip(held, old, moved, strict=True)]
    if runner.options.scope == "local":
        return found
    places = [(m.address, i, j) for i, e in enumerate(held) for j, m in enumerate(e.members)]
    cut = [(i, j, shard) for _, i, j in sorted(places) if (shard := shard_of(held[i].members[j].tensor)) is not None]
    wholes = sums_over_ranks([found[i][:, j] for i, j, _ in cut], [shard for *_, shard in cut])
    for (i, j, _), whole in zip(cut, wholes, strict=True):
        found[i][:, j] = whole
    return found


def _refuse_zeros(new: Sequence[Held], runner: StepRunner) -> None:
    """Refuse a matrix that is 0, which would stay so. Waits for the device, in a parameter's first step only."""
    nothing = [torch.zeros((), device=each.old.device).expand(each.old.shape) for each in new]
    totals = _totals(runner, new, [each.old for each in new], nothing)
    for each, total in zip(new, totals, strict=True):
        empty = (total[0].reshape(len(each.members), -1) == 0).any(dim=1).tolist()
        for member, is_zero in zip(each.members, empty, strict=True):
            whole = each.old[0] if runner.options.scope == "local" else member.tensor
            if is_zero and whole.numel():  # a rank may have no part of it
                raise ValueError(
                    f"SelectiveUpdate: {member.name!r}, or a matrix in it, is 0, and {_norms_of(each.plan).norm!r} "
                    f"would keep it so: begin with other values, or put it into a group whose norm is None"
                )
        _norms_of(each.plan).seen.update(member.tensor for member in each.members)


def _recording(held: Sequence[Held]) -> bool:
    """True if the step goes into a CUDA graph, in which nothing can be read."""
    return any(each.old.is_cuda for each in held) and torch.cuda.is_current_stream_capturing()


def _write(runner: StepRunner, held: Held, new: Tensor) -> None:
    """Write a stack to its parameters, rounded as the step rounds."""
    options, tensors = runner.options, held.tensors
    if not options.rounding or held.old.dtype == new.dtype:
        copy_(tensors, list(new.unbind()))
        return
    draw = spec.Draw(runner.count.seed, runner.count.steps, True, runner.count.clocks.on(new.device))
    for member, tensor, exact in zip(held.members, tensors, new.unbind(), strict=True):
        store(tensor, exact, draw, member.address, shard=shard_of(member.tensor))
