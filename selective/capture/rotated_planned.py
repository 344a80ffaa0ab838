"""PlannedStep: the step of a group's rotated parameters together, on stacks of their bases and gradients.

    gradients -> stacks -> P^T g Q, a product or two for each shape -> the rule and the mask, one call for all
    -> P (mask u) Q^T, a product or two for each shape -> parameters, one call for all -> averages of Gram matrices

It computes what `RotatedFusedJob` computes bucket by bucket. Everything that lists are made of lasts from step to step:
stacks, views of buffers, the items of kernels. So a step makes about ten launches for each shape, and a dozen besides,
however many parameters there are. The gradients are copied into their stack for the products, and again for the
averages, because in between its memory holds the updates. That costs less than the memory of another stack.

Of sharded parameters the stacks hold this rank's parts. Where the mask needs sums over the ranks, all that comes after
it waits for the end of the step, when all groups' sums are made together. Another rank may take the same step bucket by
bucket. So the rule is called for each bucket, as there: what ranks add up together has one order on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor

from selective.foreach import many_of
from selective.kernels import Exchange, RunningPart, begin_sharded, selective_step, spec
from selective.kernels.lasting import lasting
from selective.parameter import Parameter
from selective.preconditioner.stacked import Averaging, Part, StackedEigenbasis, has_two_sides
from selective.rotation.buffers import Buffer, aligned, all_in_use
from selective.rotation.noise import clear_noise_
from selective.rotation.rotation import Rotation
from selective.rotation.stacks import Bucket, Stacks
from selective.sharding.dtensor import is_dtensor, local_like, local_of

States = Sequence[dict[str, Any]]  # of each parameter
Report = Callable[[list[Parameter], Sequence[spec.Sums]], None]


@dataclass(frozen=True)
class Calls:
    """The arguments of the two kernel calls of a step: the rule with the mask, and the write to the parameters."""

    rule: dict[str, Any]
    write: dict[str, Any]
    report: Report  # gets the statistics, if there are any
    exchange: Exchange  # makes the sums over the ranks


@dataclass(frozen=True)
class Step:
    """One step: what all rounds work with. `gradients` are not rotated, and given by index."""

    rotation: Rotation
    basis: StackedEigenbasis
    gradients: Sequence[Tensor]
    calls: Calls


class Stepped:
    """A parameter that is stepped in stacks, with this rank's parts of it and of its state."""

    def __init__(
        self, parameter: Parameter, state: dict[str, Any], own: dict[str, Tensor], shard: spec.Shard | None
    ) -> None:
        p = parameter.tensor
        self.parameter, self.own, self.shard = parameter, own, shard
        self.tensor: Tensor = local_of(p)
        self.state = {name: local_like(x, p) for name, x in state.items()} if is_dtensor(p) else state


class Round:
    """Buckets that are stepped together: their buffers, views and items.

    `given` holds gradients, and then what the rule makes of zeros: -mask u. `rotated` holds the results of products.
    `halfway` is as large as the largest bucket with two sides.
    """

    def __init__(self, buckets: Sequence[Bucket], members: Sequence[Stepped]) -> None:
        device = members[0].tensor.device
        shapes = [(len(b.indices) * b.shape[0], *b.shape[1:]) for b in buckets]
        numels = [aligned(rows * m * n) for rows, m, n in shapes]
        self.part = slice(buckets[0].start, buckets[-1].part.stop)
        self.averaging: Averaging | None = None  # made in the first step that needs it
        self.given, self.rotated = Buffer(sum(numels), device), Buffer(sum(numels), device)
        between = [n if has_two_sides(bucket.state) else 0 for n, bucket in zip(numels, buckets, strict=True)]
        self.halfway = Buffer(max(between), device)
        self.indices = [i for bucket in buckets for i in bucket.indices]
        self.members = [members[i] for i in self.indices]
        self.is_sharded = self.members[0].shard is not None
        with all_in_use(self.buffers), lasting():
            given, rotated = self.given.views(shapes), self.rotated.views(shapes)
            halfway = [
                self.halfway.views([shape])[0] if n else result
                for shape, n, result in zip(shapes, between, rotated, strict=True)
            ]
            self.parts = [
                Part(len(bucket.indices), bucket.state, *stacks)
                for bucket, *stacks in zip(buckets, given, halfway, rotated, strict=True)
            ]
            self.views = self._by_parameter(buckets, given)
            results = self._by_parameter(buckets, rotated)
        self.lists, self.writes = [spec.ItemList()], spec.ItemList()
        first_of_buckets = {bucket.indices[0] for bucket in buckets[1:]} if self.is_sharded else set[int]()
        for i, one, buffer, result in zip(self.indices, self.members, self.views, results, strict=True):
            p, address = one.tensor, one.parameter.address
            if i in first_of_buckets:
                self.lists.append(spec.ItemList())
            self.lists[-1].append(spec.Item(buffer, result, one.state, address, one.own, one.shard))
            self.writes.append(spec.Item(p, result, {"update": result, "start": p}, address))

    @property
    def buffers(self) -> list[Buffer]:
        return [self.given, self.rotated, self.halfway]

    def _by_parameter(self, buckets: Sequence[Bucket], stacks: Sequence[Tensor]) -> list[Tensor]:
        """Return a view of each parameter's part of the stacks, of the parameter's shape."""
        parts = (part for bucket, x in zip(buckets, stacks, strict=True) for part in x.split(bucket.shape[0]))
        return [x.view(one.tensor.shape) for one, x in zip(self.members, parts, strict=True)]

    def gather(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradients, given by index, into their stacks."""
        many_of._foreach_copy_(self.views, [gradients[i] for i in self.indices])

    def give_back(self) -> None:
        """Give the memory of all buffers back, whatever has become of the step."""
        for buffer in self.buffers:
            buffer.give_back()

    def step(self, step: Step) -> None:
        """Take steps 4 to 8 for these parameters, or begin them: the exchange ends them if sums are needed."""
        for buffer in self.buffers:
            buffer.take()
        try:
            self._rotate(step)
            if self.is_sharded:
                step.calls.exchange.add(self._begun(step.calls), len(self.members), partial(self._finish, step))
            else:
                self._finish(step, selective_step(self.lists[0], **step.calls.rule))
        except BaseException:
            self.give_back()
            raise

    def _rotate(self, step: Step) -> None:
        """Put the rotated gradients into `rotated`, and zeros into `given`."""
        rotation, basis = step.rotation, step.basis
        self.gather(step.gradients)
        with rotation.named("project_in"):
            basis.project(self.parts, into=True)
        if rotation.has_refreshed:
            with rotation.named("denoise"):
                basis.denoise(self.parts)
        if rotation.full_steps:
            for part in self.parts:
                clear_noise_(part.result)
        self.given.flat.zero_()

    def _begun(self, calls: Calls) -> list[RunningPart]:
        """Begin the rule and the mask of each bucket, and return what is left of them."""
        begun: list[RunningPart] = []
        count = 0
        for items in self.lists:
            for part in begin_sharded(items, **calls.rule):
                part.places = [count + place for place in part.places]
                begun.append(part)
            count += len(items)
        return begun

    def _finish(self, step: Step, sums: Sequence[spec.Sums] | None) -> None:
        """Apply the masked updates in `given` to the parameters, and let the averages take up the gradients."""
        rotation, basis, write = step.rotation, step.basis, step.calls.write
        try:
            with rotation.named("project_out"):
                basis.project(self.parts, into=False)
            writes: Sequence[spec.Item] = self.writes
            if self.is_sharded and write["draw"].stochastic:  # which reads places in the whole
                writes = [replace(item, shard=one.shard) for item, one in zip(writes, self.members, strict=True)]
            selective_step(writes, **write)
            self.rotated.give_back()
            self.halfway.give_back()
            with rotation.named("observe"):
                basis.forget_noise([part.state for part in self.parts])
                if self.averaging is not None:
                    self.gather(step.gradients)
                    basis.average(self.averaging, self.parts)
        finally:
            self.give_back()
        if sums is not None:
            step.calls.report([one.parameter for one in self.members], sums)


class PlannedStep:
    """The rounds of one group's step: as many buckets at a time as `limit` elements allow."""

    def __init__(self, stacks: Stacks, states: States, members: Sequence[Stepped], limit: int) -> None:
        self.stacks, self.states = stacks, list(states)
        self.parameters = [one.parameter for one in members]
        self.locals = _locals(stacks, self.parameters, self.states)
        self.rounds = [Round(part, members) for part in _rounds(stacks.buckets, limit)]

    def are_in_place(self) -> bool:
        """True if the local tensors of DTensors are those that this step was made of; plain ones are looked at later.

        Kernels look at the addresses of what they get, and would not notice that another tensor is meant.
        """
        return _same(self.locals, _locals(self.stacks, self.parameters, self.states))

    def step(self, step: Step) -> None:
        """Take steps 4 to 8 for all parameters, or begin them."""
        observes = step.basis.options.observes()
        for one_round in self.rounds:
            if observes and one_round.averaging is None:
                one_round.averaging = self._averaging(one_round.part)
            one_round.step(step)

    def _averaging(self, part: slice) -> Averaging:
        stacks = self.stacks
        counters = stacks.not_finite[part], stacks.numbers["skipped"][part]
        return Averaging(stacks.wholes[part], stacks.not_finite.device, *counters)


class KeptStep:
    """The planned step of one group, kept from step to step. It is neither copied nor pickled with the optimizer."""

    def __init__(self) -> None:
        self._step: PlannedStep | None = None
        self._own: object = None
        self._rules: tuple[spec.Rule, spec.Rule] | None = None  # the last one that was asked for, and without decay
        self._token: object = None  # `StepContext.base_token` of a step in which the base had all of the states

    def drop(self) -> None:
        """Forget it, so that state which was replaced is not kept in memory until the next step."""
        self._step, self._own, self._token = None, None, None

    def give_back(self) -> None:
        """Give the memory of a step back that was begun, and will not be ended."""
        if self._step is not None:
            for one_round in self._step.rounds:
                one_round.give_back()

    def drop_unless(self, token: object) -> None:
        """Forget it in a step without it, if state may have been replaced since."""
        if token is None or token is not self._token:
            self.drop()

    def states(self, token: object, parameters: Sequence[Parameter]) -> States | None:
        """Return the base's state of these parameters, if it is known to be that of the last step; else None."""
        kept = self._step
        if kept is None or token is None or token is not self._token or not _same(kept.parameters, parameters):
            return None
        return kept.states if all(kept.states) else None

    def undecayed(self, rule: spec.Rule) -> spec.Rule:
        """Return a rule without decay and `maximize`: the same object as long as `rule` is the same."""
        if self._rules is None or self._rules[0] is not rule:
            factor: Any = {"decay_factor": 1.0} if isinstance(rule, spec.LionRule) else {}
            self._rules = rule, replace(rule, weight_decay=0.0, maximize=False, **factor)
        return self._rules[1]

    def trust(self, token: object) -> None:
        """The states of the step that is kept are those for which `token` stands, and none of them is new."""
        self._token = token

    def get(
        self,
        stacks: Stacks,
        parameters: Sequence[Parameter],
        states: States,
        own: object,
        own_state: Callable[[Parameter], dict[str, Any]],
        shard: Callable[[int], spec.Shard | None],
        limit: int,
    ) -> PlannedStep:
        """Return the step of these parameters with this state of the base, as it was kept or made anew.

        `own` is the table that `own_state` reads: another one if an entry of it was replaced. `shard` gets an index.
        """
        kept = self._step
        if (
            kept is None
            or kept.stacks is not stacks
            or own is not self._own
            or not _same(kept.states, states)
            or not kept.are_in_place()
        ):
            self.drop()
            given = enumerate(zip(parameters, states, strict=True))
            members = [Stepped(p, state, own_state(p), shard(i)) for i, (p, state) in given]
            kept = PlannedStep(stacks, states, members, limit)
            self._step, self._own = kept, own
        return kept


def _locals(stacks: Stacks, parameters: Sequence[Parameter], states: States) -> list[object]:
    """Return the local tensors of DTensors and of their state; none of plain tensors."""
    if not stacks.on_ranks:
        return []
    found = [local_of(parameter.tensor) for parameter in parameters]
    return [*found, *(local_of(x) for state in states for x in state.values())]


def _same(before: Sequence[object], now: Sequence[object]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _rounds(buckets: Sequence[Bucket], limit: int) -> Iterator[list[Bucket]]:
    """Divide buckets, in order, into lists of at most `limit` elements, or of one bucket."""
    taken: list[Bucket] = []
    count = 0
    for bucket in buckets:
        numel = len(bucket.indices) * math.prod(bucket.shape)
        if taken and count + numel > limit:
            yield taken
            taken, count = [], 0
        taken.append(bucket)
        count += numel
    if taken:
        yield taken
