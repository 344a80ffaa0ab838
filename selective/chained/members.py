"""Members: the optimizers of a chain with their names, and what is known of all of them together."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.chained.group_list import GroupList
from selective.chained.shared_defaults import SharedDefaults
from selective.messages.said_by import CHAIN, member, said_by
from selective.optimizer import SelectiveUpdate
from selective.parameter import Parameter
from selective.plan.shared_parameters import check_sharing


class Members:
    """The members of a chain, in order. Objects that stand in for the chain share it, so all that changes is in here.

    `names[i]` is the name of `optimizers[i]`.
    """

    def __init__(self, optimizers: Sequence[Optimizer], names: Sequence[str]) -> None:
        self.optimizers, self.names = tuple(optimizers), tuple(names)
        self._group_list = GroupList()

    def __iter__(self) -> Iterator[tuple[str, Optimizer]]:
        return iter(zip(self.names, self.optimizers, strict=True))

    @property
    def wrapped(self) -> list[SelectiveUpdate]:
        """Those that are a `SelectiveUpdate`."""
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, SelectiveUpdate)]

    def stepped_together(self) -> tuple[list[SelectiveUpdate], list[Optimizer]]:
        """The members whose step is taken in phases, and those whose own `step` is called."""
        phased = [optimizer for optimizer in self.wrapped if _steps_as_ours(optimizer)]
        return phased, [optimizer for optimizer in self.optimizers if optimizer not in phased]

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all members: the list of the only one, or a list that can't be changed."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].param_groups
        self._group_list.follow([group for optimizer in self.optimizers for group in optimizer.param_groups])
        return self._group_list

    def set_groups(self, groups: list[dict[str, Any]]) -> None:
        """Give each member its part of `groups`, of which there must be as many as there are now."""
        count = len(self.groups())
        if len(groups) != count:
            raise ValueError(
                f"ChainedOptimizer: param_groups was set to {len(groups)} groups, and the members have {count}; set "
                f"opt.members[i].param_groups to change their number; nothing was set"
            )
        parts = [groups] if len(self.optimizers) == 1 else self.parts(groups)
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            optimizer.param_groups = part

    def add_group(self, member: Optimizer, group: dict[str, Any]) -> None:
        """Add a group to a member; nothing is added if a parameter would be in two of them."""
        with self.naming(member):
            member.add_param_group(group)
        try:
            self.check_apart()
        except ValueError:
            self._remove_last_group(member)
            raise
        self.number()

    @staticmethod
    def _remove_last_group(member: Optimizer) -> None:
        member.param_groups.pop()
        if isinstance(member, SelectiveUpdate):
            member.policy_groups.pop()

    def shared_defaults(self) -> SharedDefaults:
        """The options that all members have, with the first member's values."""
        return SharedDefaults(*(optimizer.defaults for optimizer in self.optimizers))

    def parts(self, groups: Sequence[Any]) -> list[list[Any]]:
        """Split what belongs to all groups, in order, by member."""
        rest = iter(groups)
        return [[next(rest) for _ in optimizer.param_groups] for optimizer in self.optimizers]

    def number(self) -> None:
        """Number the parameters of wrapped members on, so that no two of the chain draw the same random numbers."""
        address = 0
        for optimizer in self.optimizers:
            if isinstance(optimizer, SelectiveUpdate):
                optimizer.groups.first_address = address
            address += sum(len(group["params"]) for group in optimizer.param_groups)

    def find(self, which: object) -> Optimizer:
        """Return the member with this name or index. Raises ValueError if there is none."""
        if isinstance(which, int) and not isinstance(which, bool) and 0 <= which < len(self.optimizers):
            return self.optimizers[which]
        if which in self.names:
            return self.optimizers[self.names.index(str(which))]
        raise ValueError(f"ChainedOptimizer: there is no member {which!r}; the members are {self.listed()}")

    def owner_of(self, param: object) -> Optimizer | None:
        """Return the member that has this parameter in a group; None if none has it."""
        for optimizer in self.optimizers:
            if any(p is param for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        return None

    def listed(self) -> str:
        """The names and classes of all members, for messages."""
        return ", ".join(f"{name!r} ({described(optimizer)})" for name, optimizer in self)

    def check_apart(self) -> None:
        """Refuse a parameter that two members have, and two that share memory if one of them is masked or rotated."""
        seen: dict[int, str] = {}
        for name, optimizer in self:
            for number, group in enumerate(optimizer.param_groups):
                for p in group["params"]:
                    before = seen.setdefault(id(p), name)
                    if before != name:
                        raise ValueError(
                            f"ChainedOptimizer: a parameter of shape {tuple(p.shape)} is in member {before!r} and in "
                            f"param_groups[{number}] of member {name!r}: it would be stepped twice in each step. Give "
                            f"each parameter to one member"
                        )
        everything = [pair for name, optimizer in self for pair in _parameters(name, optimizer)]
        with said_by(CHAIN):
            check_sharing([parameter for parameter, _ in everything], [ours for _, ours in everything])

    def naming(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """A context in which this member's errors begin with its name."""
        return said_by(next(member(name) for name, each in self if each is optimizer))


def named_members(members: Any) -> Members:
    """Return the members that a user gave, as a list or a mapping of names. Raises TypeError or ValueError."""
    if isinstance(members, Optimizer):
        raise TypeError(f"ChainedOptimizer: pass a list of optimizers, not one {type(members).__name__}")
    if not isinstance(members, Iterable):
        raise TypeError(f"ChainedOptimizer: members is a {type(members).__name__}, must be a list of optimizers")
    if isinstance(members, Mapping):
        names, optimizers = list(members), list(members.values())
    else:
        optimizers = list(members)
        names = [str(number) for number in range(len(optimizers))]
    if not optimizers:
        raise ValueError("ChainedOptimizer: no optimizer was given")
    for name, optimizer in zip(names, optimizers, strict=True):
        _check(name, optimizer)
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ValueError("ChainedOptimizer: an optimizer was given twice")
    return Members(optimizers, names)


def described(optimizer: Optimizer) -> str:
    """The class of a member, and of its base."""
    base = f" over {type(optimizer.base).__name__}" if isinstance(optimizer, SelectiveUpdate) else ""
    return type(optimizer).__name__ + base


def present_parameters(name: str, optimizer: Optimizer) -> list[Parameter]:
    """The parameters of a member that have a gradient, under names with the member's."""
    return [parameter for parameter, _ in _parameters(name, optimizer) if parameter.tensor.grad is not None]


def _check(name: object, optimizer: object) -> None:
    if not isinstance(name, str) or not name or "/" in name:
        raise TypeError(f"ChainedOptimizer: a member's name is {name!r}, must be a text without '/'")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"ChainedOptimizer: member {name!r} is a {type(optimizer).__name__}, must be a torch.optim.Optimizer or a "
            f"SelectiveUpdate; build it first, over its own parameters"
        )
    if getattr(type(optimizer), "chains_optimizers", False):
        raise TypeError(f"ChainedOptimizer: member {name!r} is a ChainedOptimizer itself; pass its members")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"ChainedOptimizer: the step of member {name!r} ({type(optimizer).__name__}) requires a closure, and here "
            f"the closure runs once for all members"
        )


def _steps_as_ours(optimizer: SelectiveUpdate) -> bool:
    """True unless a subclass, or somebody who has set `step` on the instance, steps in another way."""
    replaced = vars(optimizer).get("step")
    ours = replaced is None or hasattr(replaced, "_wrapped_by_lr_sched")
    return ours and inspect.unwrap(type(optimizer).step) is inspect.unwrap(SelectiveUpdate.step)


def _parameters(name: str, optimizer: Optimizer) -> Iterator[tuple[Parameter, bool]]:
    """The parameters of a member, each with True if it is masked or rotated."""
    if isinstance(optimizer, SelectiveUpdate):
        for plan in optimizer.groups.plans:
            for parameter in plan.params.parameters:
                named = Parameter(parameter.tensor, 0, f"{name}/{parameter.name}", plan.number)
                yield named, plan.masks_or_rotates(parameter)
        return
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            assert isinstance(p, Tensor)
            yield Parameter(p, 0, f"{name}/param_groups[{number}][{place}]", number), False
