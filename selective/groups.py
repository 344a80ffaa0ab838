"""Policies of parameter groups: a table of the wrapper's own, beside the base's groups and never inside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping
from typing import Any

from selective.policies import Policy, policy_from


class PolicyGroup(MutableMapping[str, Any]):
    """The policy of one parameter group, with its hyper-parameters by name.

    `opt.policy_groups[0]["alpha"] = 1.5` is validated at once and used from the next step on, so that a scheduler can
    move it as it moves `lr`. Nested ones have dotted names (`"selection.fraction"`). The set of names is fixed.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._listener: Callable[[Policy], None] | None = None

    @property
    def policy(self) -> Policy:
        """The policy that is used from the next step on. To switch it, set it."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        if self._listener is not None:
            self._listener(policy)

    def listen(self, listener: Callable[[Policy], None] | None) -> None:
        """Have `listener` called with each policy that is set, at once: the replays of a CUDA graph run no step."""
        self._listener = listener

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listener": None}  # who listens is not copied or pickled along

    def _dump(self) -> dict[str, Any]:
        return self.policy.model_dump()

    def __getitem__(self, name: str) -> Any:
        value: Any = self._dump()
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value or part == "kind":
                raise KeyError(self._no_such(name))
            value = value[part]
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self:
            raise KeyError(self._no_such(name))
        data = self._dump()
        *path, last = name.split(".")
        inner = data
        for part in path:
            inner = inner[part]
        inner[last] = value
        policy = type(self.policy).model_validate(data)
        policy.as_if_written()
        self.policy = policy

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{type(self.policy).__name__}: the hyper-parameters of a policy can be set, not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(_leaves(self._dump(), ""))

    def __len__(self) -> int:
        return len(_leaves(self._dump(), ""))

    def _no_such(self, name: str) -> str:
        return f"{type(self.policy).__name__} has no hyper-parameter {name!r}; it has {', '.join(self) or 'none'}"

    def __repr__(self) -> str:
        return f"PolicyGroup({self.policy!r})"


def _leaves(data: dict[str, Any], prefix: str) -> list[str]:
    names: list[str] = []
    for key, value in data.items():
        if key == "kind":
            continue
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def take_policy(group: dict[str, Any], default: Policy, known: Collection[str]) -> Policy:
    """Move a group's `policy` out of it: the default where it names none, `Dense()` where it says None.

    `known` are the base's own options. A hyper-parameter of the policy beside it would be silently without effect.
    """
    if "policy" not in group:
        return default
    policy = policy_from(group["policy"])
    fields = [name for name in type(policy).model_fields if name != "policy"]  # that one is the group's own key
    stray = [name for name in fields if name in group and name not in known]
    if stray:
        raise ValueError(
            f"SelectiveUpdate: a parameter group has {stray[0]!r} beside its policy {policy!r}; hyper-parameters of a "
            f"policy go into it: 'policy': {{'kind': {policy.kind!r}, {stray[0]!r}: ...}}"
        )
    del group["policy"]
    return policy
