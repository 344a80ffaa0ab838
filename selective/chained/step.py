"""The step of a chain: the wrapped members take theirs together, then the others take theirs."""

from __future__ import annotations

from contextlib import ExitStack

from selective.base.step_base import base_hooks, run_step
from selective.chained.members import Members
from selective.kernels import Exchange
from selective.step.begin import begin_step, take_steps
from selective.step.gradients import is_initialisation


def step_members(members: Members) -> None:
    """Take one step with all members, or with none of them. Each fires its own hooks, and not torch's global ones.

    Wrapped members go through the phases of a step together: all are checked before anything moves. They share the
    collectives of sharded parameters, and kernel calls where their rules and masks are the same. The other members come
    last, because a policy's own code may raise, and puts back only what wrapped members have moved.
    """
    members.number()
    together, others = members.stepped_together()
    with ExitStack() as hooks:
        for one in members.optimizers:
            hooks.enter_context(base_hooks(one))
        begun = [begin_step(one.runner, one.groups) for one in together]
        recording = any(step.recording for step in begun)
        if not recording and is_initialisation(members.groups()):
            for step in begun:
                step.initialise()
        elif sum(step.has_nonfinite() for step in begun):  # all are asked: other ranks may wait for each of them
            for step in begun:
                step.skip()
            return
        elif begun:
            # The replays of a CUDA graph read the tables of each member's own calls.
            recorded = recording or any(one.count.clocks.recorded for one in together)
            take_steps(begun, Exchange(), None if recorded else members.calls)
        for one in others:
            run_step(one)
