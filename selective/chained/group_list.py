"""GroupList: the parameter groups of all members as one list, which is read and not changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GroupList(list[dict[str, Any]]):
    """The members' own group dictionaries, in order. What is set in a group reaches its member.

    The list itself follows the members. To add a group, call `add_param_group`; to remove one, remove it from its
    member's `param_groups`. Anything else raises TypeError, because it would be without effect. A copy is a plain list.
    """

    def follow(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take in the groups that the members have now."""
        if len(self) != len(groups) or any(a is not b for a, b in zip(self, groups, strict=True)):
            list.__setitem__(self, slice(None), groups)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "ChainedOptimizer: the list `param_groups` is put together from its members' and can't be changed itself. "
            "Add a group by add_param_group({..., 'member': name}); remove one from its member: "
            "del opt.members[i].param_groups[j]"
        )

    append: Any = _refuse
    extend: Any = _refuse
    insert: Any = _refuse
    pop: Any = _refuse
    remove: Any = _refuse
    clear: Any = _refuse
    sort: Any = _refuse
    reverse: Any = _refuse
    __setitem__: Any = _refuse
    __delitem__: Any = _refuse
    __iadd__: Any = _refuse
    __imul__: Any = _refuse

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)
