"""The step of a chain: the wrapped members take theirs together, then the others take theirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch.optim import Optimizer

from selective.base.step_base import base_hooks, run_step
from selective.chained.members import Members, present_parameters
from selective.kernels import Exchange
from selective.messages.said_by import CHAIN, member, said_by
from selective.optimizer import SelectiveUpdate
from selective.step.begin import BegunStep, begin_step, take_steps
from selective.step.gradients import has_nonfinite, is_initialisation


def step_members(members: Members) -> None:
    """Take one step with all members, or with none of them. Each fires its own hooks, and not torch's global ones.

    Wrapped members go through the phases of a step together: all are checked before anything moves. They share the
    collectives of sharded parameters, and launches where their rules and masks are of the same kinds. The other members
    come last, because a policy's own code may raise, and puts back only what wrapped members have moved.
    """
    members.number()
    together, others = members.stepped_together()
    names = {id(optimizer): name for name, optimizer in members}
    with ExitStack() as hooks:
        for optimizer in members.optimizers:
            hooks.enter_context(base_hooks(optimizer))
        begun = [begin_step(optimizer.runner, optimizer.groups, member(names[id(optimizer)])) for optimizer in together]
        recording = any(step.recording for step in begun)
        if not recording and is_initialisation(members.groups()):
            for step in begun:
                step.initialise()
        elif _is_skipped(members, begun):
            for step in begun:
                step.skip()
            return
        elif begun:
            take_steps(begun, Exchange())
        for optimizer in others:
            with said_by(member(names[id(optimizer)])):
                run_step(optimizer)


def _is_skipped(members: Members, begun: Sequence[BegunStep]) -> bool:
    """True if a gradient is not finite and a member says "skip"; a FloatingPointError if one says "raise".

    What a member says holds for the gradients of all members that say nothing.
    """
    skipped = sum(step.has_nonfinite() for step in begun)  # all are asked: other ranks may wait for each of them
    said = {optimizer.options.on_nonfinite for optimizer in members.wrapped}
    if not said & {"raise", "skip"}:
        return False
    silent = [p for name, optimizer in members if not _looks(optimizer) for p in present_parameters(name, optimizer)]
    steps = max((optimizer.count.steps for optimizer in members.wrapped), default=0)
    with said_by(CHAIN):
        return has_nonfinite([silent], "raise" if "raise" in said else "skip", steps) or skipped > 0


def _looks(optimizer: Optimizer) -> bool:
    """True if a member looks at its own gradients."""
    return isinstance(optimizer, SelectiveUpdate) and optimizer.options.on_nonfinite != "ignore"
