"""ChainedState: the state of all members as one mapping by parameter, live."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from selective.chained.checkpoint import member_snapshot
from selective.chained.members import Members


class ChainedState(MutableMapping[Any, Any]):
    """`opt.state` of a chain: each member's own state, by parameter. Reading and writing reaches the member.

    State can be written for parameters that a member has in a group. Anything else is a ValueError, because it belongs
    to no member.
    """

    def __init__(self, members: Members) -> None:
        self._members = members

    def __getitem__(self, param: Any) -> Any:
        for optimizer in self._members.optimizers:
            if param in optimizer.state:
                return optimizer.state[param]
        owner = self._members.owner_of(param)
        if owner is None:
            raise KeyError(param)
        return owner.state[param]  # as torch's does it: a parameter of a group has an empty state at first

    def __setitem__(self, param: Any, entries: Any) -> None:
        owner = self._owner(param)
        with self._members.naming(owner):
            owner.state[param] = entries

    def __delitem__(self, param: Any) -> None:
        for optimizer in self._members.optimizers:
            if param in optimizer.state:
                del optimizer.state[param]
                return
        raise KeyError(param)

    def __contains__(self, param: object) -> bool:
        return any(param in optimizer.state for optimizer in self._members.optimizers)

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self._members.optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._members.optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))

    def get(self, param: Any, default: Any = None) -> Any:
        """The state of a parameter that has one; `default` of any other."""
        return self[param] if param in self else default

    def clear(self) -> None:
        """Remove all state: everything starts anew in the next step."""
        for optimizer in self._members.optimizers:
            optimizer.state.clear()

    def replace(self, states: Mapping[Any, Any]) -> None:
        """Write these states instead of all that there is.

        Nothing is written if one belongs to no member, or if a member refuses one.
        """
        parts: dict[int, dict[Any, Any]] = {id(optimizer): {} for optimizer in self._members.optimizers}
        for param, entries in states.items():
            parts[id(self._owner(param))][param] = entries
        undo_all = [member_snapshot(optimizer) for optimizer in self._members.optimizers]
        try:
            for optimizer in self._members.optimizers:
                with self._members.naming(optimizer):
                    optimizer.state = defaultdict(dict, parts[id(optimizer)])  # as torch's is
        except BaseException:
            for undo in undo_all:
                undo()
            raise

    def _owner(self, param: Any) -> Any:
        owner = self._members.owner_of(param)
        if owner is None:
            raise ValueError(
                "ChainedOptimizer: state was written of something that is in no member's groups; put the parameter "
                "into a group first, or write opt.members[i].state; nothing was written"
            )
        return owner
