"""The reports of a chain: `explain()`, and the statistics of all members by unique names."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from selective.chained.members import Members
from selective.explain.title import title_of
from selective.optimizer import SelectiveUpdate
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan


class Reported(NamedTuple):
    """A parameter of a wrapped optimizer, and the name under which statistics of all of them have it."""

    name: str
    member: int  # its place among the wrapped optimizers
    plan: GroupPlan
    parameter: Parameter


def reported(optimizers: Sequence[SelectiveUpdate], names: Sequence[str]) -> list[Reported]:
    """Return the parameters of these optimizers with names that are unique among them.

    A parameter's name is what it is in its own optimizer, unless another optimizer uses it, too. Then the name of its
    optimizer is put before it: "rest/0.weight".
    """
    parameters = list(_parameters(optimizers))
    users = Counter(name for name, _ in {(parameter.name, member) for member, _, parameter in parameters})
    taken = {name for name, count in users.items() if count > 1}
    prefixed = {f"{names[member]}/{parameter.name}" for member, _, parameter in parameters if parameter.name in taken}
    if prefixed & (set(users) - taken):  # somebody's name looks like a name with a prefix
        taken = set(users)
    return [
        Reported(f"{names[member]}/{p.name}" if p.name in taken else p.name, member, plan, p)
        for member, plan, p in parameters
    ]


def _parameters(optimizers: Sequence[SelectiveUpdate]) -> Iterator[tuple[int, GroupPlan, Parameter]]:
    for member, optimizer in enumerate(optimizers):
        for plan in optimizer.groups.plans:
            for parameter in plan.params.parameters:
                yield member, plan, parameter


def statistics(members: Members) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of all wrapped members that collect them, under the names of `reported`."""
    named = [(name, optimizer) for name, optimizer in members if isinstance(optimizer, SelectiveUpdate)]
    if not any(optimizer.options.statistics for _, optimizer in named):
        raise RuntimeError(
            "ChainedOptimizer: nothing was collected; wrap a member in SelectiveUpdate, with statistics=True"
        )
    optimizers = [optimizer for _, optimizer in named]
    read = [optimizer.statistics() if optimizer.options.statistics else {} for optimizer in optimizers]
    merged = {}
    for each in reported(optimizers, [name for name, _ in named]):
        if each.parameter.name in read[each.member]:
            merged[each.name] = read[each.member][each.parameter.name]
    return merged


def explain(members: Members) -> str:
    """Return what each member says of itself, under its name."""
    lines, first = [f"ChainedOptimizer of {len(members.optimizers)}: {', '.join(members.names)}"], 0
    for name, optimizer in members:
        end = first + len(optimizer.param_groups)
        which = f"param_groups[{first}]" if end == first + 1 else f"param_groups[{first}:{end}]"
        text = optimizer.explain() if isinstance(optimizer, SelectiveUpdate) else _explain_bare(optimizer)
        lines += [f"member {name!r}, {which} of the chain", textwrap.indent(text, "  ")]
        first = end
    return "\n".join(lines)


def _explain_bare(optimizer: Optimizer) -> str:
    kind = type(optimizer)
    groups = [title_of({number: group}) for number, group in enumerate(optimizer.param_groups)]
    return "\n".join([f"{kind.__module__}.{kind.__name__}, stepped as it is: no policy, no preconditioner", *groups])
