"""State that is written from outside: taken, entries of ours included, or refused with the reason.

What is written is looked at as far as it can be judged alone. Whether it fits its parameter is seen before the next
step (state/fits.py): code that prunes a parameter writes its state first, or its memory first, as it likes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selective.base.same_class import class_names
from selective.checkpoint.matches_policies import Checking, kinds_of
from selective.parameter import is_lazy
from selective.plan.policy_groups import PolicyGroup
from selective.policies import Policy
from selective.preconditioner import Preconditioner
from selective.state.entries import BASIS_STEPS, POLICY, PRECONDITIONER, SEED, STEP, decode_model, encode_model
from selective.state.merged_view import Home, Made, MergedEntry, MergedState, apart, shapes_of
from selective.state.one_entry import check_known, number_of
from selective.state.parameter_state import COUNTS, ON_THE_HOST, Own, in_dtype, is_kept, is_of_basis
from selective.state.undivided import Undivided


def not_taken(found: str) -> ValueError:
    """The error for an entry that was written and can't be kept."""
    return ValueError(f"SelectiveUpdate: {found}; it was not taken")


def not_a(where: str, value: object, kind: str) -> TypeError:
    """The error for something of another type than is kept there."""
    return TypeError(f"SelectiveUpdate: {where} is a {type(value).__name__}, must be {kind}; it was not taken")


def not_set(reason: str) -> ValueError:
    """The error for a `__setstate__` that failed."""
    return ValueError(f"SelectiveUpdate: __setstate__ failed ({reason}); nothing was set")


class Writing(Checking):
    """The part of `SelectiveUpdate` whose `state` can be written."""

    @property
    def state(self) -> MergedState:
        """The base's state and ours, by parameter: a live view with the keys of `state_dict()["state"]`."""
        self._count_steps()
        return MergedState(_Home(self))

    @state.setter
    def state(self, value: Any) -> None:
        if not self._constructing:
            _Home(self).put(value, instead=True)

    def _set_as_torch(self, state: Mapping[str, Any]) -> None:
        """What `__setstate__` of torch's optimizers does, which loaders and reset helpers call: all or nothing."""
        unknown = sorted(set(state) - {"state", "param_groups", "defaults"})
        if unknown:
            raise ValueError(
                f"SelectiveUpdate: __setstate__ got {', '.join(map(repr, unknown))}, and takes 'state', 'param_groups' "
                f"and 'defaults', or what __getstate__ returns; nothing was set"
            )
        with self._all_or_nothing(not_set):
            for number, group in enumerate(state.get("param_groups", ())):
                if not all(isinstance(p, Tensor) for p in group["params"]):
                    raise TypeError(
                        f"param_groups[{number}]['params'] must be a list of tensors; numbers are load_state_dict's"
                    )
            if "param_groups" in state:
                self.base.param_groups = state["param_groups"]
            if "state" in state:
                self.state = state["state"]
            theirs = {"state": self.base.state, "param_groups": self.base.param_groups}
            self.base.__setstate__({**theirs, "defaults": state.get("defaults", self.base.defaults)})
            self.defaults = self.base.defaults
            self._plan()

    def _check_all_there(self) -> None:
        """Refuse to save what belongs to a parameter that no group has: torch would name a number that nobody knows."""
        there = {p for group in self.base.param_groups for p in group["params"]}
        gone = [p for p in self.base.state if isinstance(p, Tensor) and p not in there]
        if gone:
            raise ValueError(
                f"SelectiveUpdate: state has entries of {len(gone)} parameter(s) that are in no group, one of shape "
                f"{tuple(gone[0].shape)}, and a checkpoint has no place for them. A parameter that was replaced leaves "
                f"its state behind: delete it (del opt.state[old])"
            )

    def _rewritten(self) -> None:
        """Whole states came or went: hold on to nothing of the old ones."""
        self._own = dict(self._own)  # another object says that entries were replaced
        for plan in self._look():
            plan.look_anew()
        self._forget_those_gone()


@dataclass(frozen=True)
class _Made(Made):
    """The entries that are made when somebody looks: of the optimizer, and of one of its groups."""

    optimizer: Writing
    group: PolicyGroup | None

    def names(self, own: Own) -> list[str]:
        if self.group is None:
            return [STEP, SEED]
        rotated = self.group.preconditioning.preconditioner is not None and BASIS_STEPS in own
        return [STEP, SEED, POLICY, *([PRECONDITIONER] if rotated else [])]

    def read(self, key: str) -> Tensor:
        if key in (STEP, SEED):
            return torch.tensor(self.optimizer._steps if key == STEP else self.optimizer._seed, device="cpu")
        assert self.group is not None
        if key == POLICY:
            return encode_model(self.group.policy, class_names(self.optimizer.base))
        preconditioner = self.group.preconditioning.preconditioner
        assert preconditioner is not None
        return encode_model(preconditioner)

    def write(self, key: str, value: Any) -> None:
        self.judge(key, value)()

    def judge(self, key: str, value: Any) -> Callable[[], None]:
        """What takes it; a ValueError or a TypeError with the reason where it can't be taken."""
        where = f"{key!r} of a parameter's state"
        check_known(key, "a parameter's state", not_taken)
        if key in (STEP, SEED):
            number = number_of(key, value, where, not_taken)
            if isinstance(value, Tensor) and value.is_floating_point() and number > 2 / torch.finfo(value.dtype).eps:
                raise not_taken(f"{where} is {number} in {value.dtype}, which may have rounded it")
            return partial(self._count, key, number)
        if not isinstance(value, Tensor):
            raise not_a(where, value, "a tensor of bytes")
        family: Any = Policy if key == POLICY else Preconditioner
        found = decode_model(in_dtype(value, torch.uint8), family, "a parameter's state", not_taken)
        if self.group is None:  # a parameter that comes into a group is under what that one says
            return lambda: None
        now = self.group.policy if key == POLICY else self.group.preconditioning.preconditioner
        if now is None or kinds_of(found.model_dump()) != kinds_of(now.model_dump()):
            raise not_taken(f"{where} is {found!r}, and its group has {now!r}: another kind")
        if found == now:
            return lambda: None
        if key == POLICY:
            return partial(setattr, self.group, "policy", found)
        return partial(setattr, self.group.preconditioning, "preconditioner", found)

    def _count(self, key: str, number: int) -> None:
        optimizer = self.optimizer
        optimizer._count_steps()
        if key == STEP:
            optimizer._steps = number
        else:
            optimizer._seed = number
        optimizer._clocks.set(optimizer._seed, optimizer._steps)


class _Home(Home):
    """Where the state is kept: the base, and one optimizer of ours."""

    def __init__(self, optimizer: Writing) -> None:
        self.optimizer, self._looked = optimizer, False

    def base_state(self) -> MutableMapping[Any, Any]:
        return self.optimizer.base.state

    def own(self, param: Any) -> Own | None:
        return self.optimizer._own.get(param)

    def keep(self, param: Tensor) -> Own:
        self._changed()
        return self.optimizer._own.setdefault(param, Own())

    def with_own(self) -> list[Tensor]:
        return list(self.optimizer._own)

    def made(self, param: Any) -> _Made:
        if not self._looked:  # once for each view: reading all of a state stays linear
            self.optimizer._look()
            self._looked = True
        plans = self.optimizer._plans
        return _Made(self.optimizer, next((plan.policy_group for plan in plans if plan.params.has(param)), None))

    def accept(self, own: Own, key: str, value: Any) -> None:
        """Take one entry; None where it was removed."""
        if value is not None:
            own[key] = self._checked(key, value, own.get(key))
            own.written.add(key)
            own.removed.discard(key)
        self._changed()

    def touched(self) -> None:
        for plan in self.optimizer._plans:
            plan.params.settled = False

    def _changed(self) -> None:
        self.optimizer._own = dict(self.optimizer._own)  # another object says that entries were replaced
        self.touched()

    @staticmethod
    def _checked(key: str, value: Any, now: Tensor | None) -> Tensor:
        """What is written, as it is kept."""
        where = f"{key!r} of a parameter's state"
        if not isinstance(value, Tensor):
            raise not_a(where, value, "a tensor")
        if value.layout != torch.strided:
            raise not_taken(f"{where} is a {value.layout} tensor, must be a dense one")
        if key in COUNTS or (is_of_basis(key) and now is not None):
            value = in_dtype(value, torch.int64 if now is None else now.dtype)
        if is_of_basis(key) and now is not None and (value.shape, value.dtype) != (now.shape, now.dtype):
            raise not_taken(
                f"{where} is {value.dtype} of shape {tuple(value.shape)}, must be {now.dtype} of {tuple(now.shape)}: "
                f"a basis is not cut with its parameter, whose rows it mixes. It starts anew where the parameter got "
                f"another shape"
            )
        return value.detach().to("cpu") if key in ON_THE_HOST else value.detach()

    def put(self, states: Mapping[Any, Any], *, instead: bool) -> None:
        if not isinstance(states, Mapping):
            raise TypeError(
                f"SelectiveUpdate: state is a {type(states).__name__}, must be a mapping of parameters to entries"
            )
        taken: dict[Any, tuple[Any, Own | None]] = {}
        said: list[Callable[[], None]] = []
        for param, entries in states.items():
            if not isinstance(param, Tensor):  # some bases keep more than states of parameters there
                taken[param] = entries, None
                continue
            if not isinstance(entries, Mapping):
                raise not_a("a parameter's state", entries, "a mapping")
            if isinstance(entries, MergedEntry) and not self._is_ours(entries):
                entries = dict(entries)  # another optimizer's: what it says is judged, and that one keeps what it has
            theirs, ours = apart(entries)
            if isinstance(entries, MergedEntry):  # as it is: what it says of the optimizer is this one's
                taken[param] = theirs, entries.own
                continue
            ours = {key: _plain(value) for key, value in ours.items() if not _is_cut_up(value)}
            taken[param] = theirs, self._own_of(param, theirs, ours)
            made = self.made(param)
            said += [made.judge(key, value) for key, value in ours.items() if not is_kept(key)]
        for take in said:
            take()
        self._commit(states, taken, instead)

    def _is_ours(self, entries: MergedEntry) -> bool:
        home = entries.home
        return isinstance(home, _Home) and home.optimizer is self.optimizer

    def _own_of(self, param: Tensor, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Own | None:
        if not ours:
            return None
        own = Own()
        for key, value in ours.items():
            if is_kept(key):
                own[key] = self._checked(key, value, None)
                own.written.add(key)
        own.know([*([] if is_lazy(param) else [param.shape]), *shapes_of(theirs)])
        return own

    def _commit(self, states: Mapping[Any, Any], taken: Mapping[Any, tuple[Any, Own | None]], instead: bool) -> None:
        optimizer = self.optimizer
        if instead:
            as_it_is = isinstance(states, defaultdict) and all(theirs is states[p] for p, (theirs, _) in taken.items())
            optimizer.base.state = states if as_it_is else defaultdict(dict)  # type: ignore[assignment]
            optimizer._own = {}
        for param, (theirs, own) in taken.items():
            optimizer.base.state[param] = theirs
            before = optimizer._own.pop(param, None)
            if own is not None:
                own.layout = own.layout or (before.layout if before is not None else {})
                optimizer._own[param] = own
        optimizer._rewritten()

    def drop(self, params: list[Any]) -> None:
        for param in params:
            self.optimizer.base.state.pop(param, None)
            self.optimizer._own.pop(param, None)
        self.optimizer._rewritten()


def _is_cut_up(value: Any) -> bool:
    return isinstance(value, Undivided) and value.cut_up


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Undivided) else value
