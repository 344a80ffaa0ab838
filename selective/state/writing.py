"""Writes to `SelectiveUpdate.state`: they are stored, or refused with the reason.

An entry that is written is checked as far as it can be checked alone. Whether it fits its parameter is checked before
the next step (`check_before_step.py`), because code that prunes a parameter may write its state or its memory first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.same_class import class_names
from selective.configured import kinds_of
from selective.norms import Norm
from selective.parameter import is_lazy
from selective.plan.groups import Groups
from selective.plan.policy_groups import PolicyGroup
from selective.policies import Decay, Policy
from selective.policies.function import with_live_function
from selective.preconditioner import Preconditioner
from selective.state.entries import (
    BASIS_STEPS,
    DECAY,
    NORM,
    POLICY,
    PRECONDITIONER,
    SEED,
    STEP,
    decode_model,
    encode_model,
)
from selective.state.merged_view import ComputedEntries, MergedEntry, StateBackend, shapes_of, split_own
from selective.state.one_entry import check_known, number_of
from selective.state.parameter_state import COUNTS, ON_THE_HOST, OwnEntries, in_dtype, is_kept, is_of_basis
from selective.state.store import StateStore
from selective.state.undivided import Undivided
from selective.step_count import StepCount


def refused_write_error(found: str) -> ValueError:
    """Build the error for a write that can't be stored."""
    return ValueError(f"SelectiveUpdate: {found}; it was not taken")


def wrong_type_error(where: str, value: object, kind: str) -> TypeError:
    """Build the error for a write of another type than is stored there."""
    return TypeError(f"SelectiveUpdate: {where} is a {type(value).__name__}, must be {kind}; it was not taken")


@dataclass(frozen=True)
class _Computed(ComputedEntries):
    """The computed entries of one optimizer and one of its groups; `group` is None for a parameter without a group."""

    base: Optimizer
    count: StepCount
    group: PolicyGroup | None

    def names(self, own: OwnEntries) -> list[str]:
        if self.group is None:
            return [STEP, SEED]
        rotated = self.group.preconditioning.preconditioner is not None and BASIS_STEPS in own
        there = {
            DECAY: self.group.decaying.decay is not None,
            NORM: self.group.norming.norm is not None,
            PRECONDITIONER: rotated,
        }
        return [STEP, SEED, POLICY, *(key for key, is_there in there.items() if is_there)]

    def read(self, key: str) -> Tensor:
        if key in (STEP, SEED):
            return torch.tensor(self.count.steps if key == STEP else self.count.seed, device="cpu")
        assert self.group is not None
        if key == POLICY:
            return encode_model(self.group.policy, class_names(self.base))
        group = self.group
        others = {DECAY: group.decaying.decay, NORM: group.norming.norm}
        found = others.get(key, group.preconditioning.preconditioner)
        assert found is not None
        return encode_model(found)

    def write(self, key: str, value: Any) -> None:
        self.judge(key, value)()

    def judge(self, key: str, value: Any) -> Callable[[], None]:
        """Return a function that sets the value; raise a ValueError or a TypeError if it can't be set."""
        where = f"{key!r} of a parameter's state"
        check_known(key, "a parameter's state", refused_write_error)
        if key in (STEP, SEED):
            number = number_of(key, value, where, refused_write_error)
            if isinstance(value, Tensor) and value.is_floating_point() and number > 2 / torch.finfo(value.dtype).eps:
                raise refused_write_error(f"{where} is {number} in {value.dtype}, which may have rounded it")
            return partial(self._count, key, number)
        if not isinstance(value, Tensor):
            raise wrong_type_error(where, value, "a tensor of bytes")
        family: Any = {POLICY: Policy, DECAY: Decay, NORM: Norm}.get(key, Preconditioner)
        found = decode_model(in_dtype(value, torch.uint8), family, "a parameter's state", refused_write_error)
        if self.group is None:  # a parameter that comes into a group is under what that one says
            return lambda: None
        group = self.group
        places = {POLICY: (group, "policy"), DECAY: (group.decaying, "decay"), NORM: (group.norming, "norm")}
        place, name = places.get(key, (group.preconditioning, "preconditioner"))
        now = getattr(place, name)
        if now is None or kinds_of(found.model_dump()) != kinds_of(now.model_dump()):
            raise refused_write_error(f"{where} is {found!r}, and its group has {now!r}: another kind")
        if isinstance(now, Policy):
            found = with_live_function(found, now)
        if found == now:
            return lambda: None
        return partial(setattr, place, name, found)

    def _count(self, key: str, number: int) -> None:
        self.count.read()
        if key == STEP:
            self.count.set(steps=number)
        else:
            self.count.set(seed=number)


class OptimizerStateBackend(StateBackend):
    """The state of one optimizer: the base's entries are in the base, the wrapper's in the store."""

    def __init__(self, base: Optimizer, groups: Groups, store: StateStore, count: StepCount) -> None:
        self.base, self.groups, self.store, self.count = base, groups, store, count
        self._looked = False

    def base_state(self) -> MutableMapping[Any, Any]:
        return self.base.state

    def own(self, param: Any) -> OwnEntries | None:
        return self.store.table.get(param)

    def keep(self, param: Tensor) -> OwnEntries:
        self._changed()
        return self.store.table.setdefault(param, OwnEntries())

    def with_own(self) -> list[Tensor]:
        return list(self.store.table)

    def computed(self, param: Any) -> _Computed:
        if not self._looked:  # once for each view: reading all of a state stays linear
            self.groups.update_plans()
            self._looked = True
        plan = self.groups.plan_of(param)
        return _Computed(self.base, self.count, None if plan is None else plan.policy_group)

    def write_entry(self, own: OwnEntries, key: str, value: Any) -> None:
        """Store one entry; None says that it was deleted."""
        if value is not None:
            own[key] = self._checked(key, value, own.get(key))
            own.written.add(key)
            own.removed.discard(key)
        self._changed()

    def base_written(self) -> None:
        for plan in self.groups.plans:
            plan.params.state_checked = False

    def _changed(self) -> None:
        self.store.mark_replaced()
        self.base_written()

    @staticmethod
    def _checked(key: str, value: Any, now: Tensor | None) -> Tensor:
        """Return the value in the form in which it is stored."""
        where = f"{key!r} of a parameter's state"
        if not isinstance(value, Tensor):
            raise wrong_type_error(where, value, "a tensor")
        if value.layout != torch.strided:
            raise refused_write_error(f"{where} is a {value.layout} tensor, must be a dense one")
        if key in COUNTS or (is_of_basis(key) and now is not None):
            value = in_dtype(value, torch.int64 if now is None else now.dtype)
        if is_of_basis(key) and now is not None and (value.shape, value.dtype) != (now.shape, now.dtype):
            raise refused_write_error(
                f"{where} is {value.dtype} of shape {tuple(value.shape)}, must be {now.dtype} of {tuple(now.shape)}: "
                f"a basis is not cut with its parameter, whose rows it mixes. It starts anew where the parameter got "
                f"another shape"
            )
        return value.detach().to("cpu") if key in ON_THE_HOST else value.detach()

    def write_states(self, states: Mapping[Any, Any], *, instead: bool) -> None:
        if not isinstance(states, Mapping):
            raise TypeError(
                f"SelectiveUpdate: state is a {type(states).__name__}, must be a mapping of parameters to entries"
            )
        taken: dict[Any, tuple[Any, OwnEntries | None]] = {}
        deferred_writes: list[Callable[[], None]] = []
        for param, entries in states.items():
            if not isinstance(param, Tensor):  # some base optimizers keep more than states of parameters there
                taken[param] = entries, None
                continue
            if not isinstance(entries, Mapping):
                raise wrong_type_error("a parameter's state", entries, "a mapping")
            if isinstance(entries, MergedEntry) and not self._is_ours(entries):
                entries = dict(entries)  # another optimizer's: what it says is judged, and that one keeps what it has
            base_entries, wrapper_entries = split_own(entries)
            if isinstance(entries, MergedEntry):  # as it is: what it says of the optimizer is this one's
                taken[param] = base_entries, entries.own
                continue
            wrapper_entries = {key: _plain(value) for key, value in wrapper_entries.items() if not _is_cut_up(value)}
            taken[param] = base_entries, self._own_of(param, base_entries, wrapper_entries)
            computed = self.computed(param)
            deferred_writes += [
                computed.judge(key, value) for key, value in wrapper_entries.items() if not is_kept(key)
            ]
        for take in deferred_writes:
            take()
        self._commit(states, taken, instead)

    def _is_ours(self, entries: MergedEntry) -> bool:
        backend = entries.backend
        return isinstance(backend, OptimizerStateBackend) and backend.store is self.store

    def _own_of(
        self, param: Tensor, base_entries: Mapping[str, Any], wrapper_entries: Mapping[str, Any]
    ) -> OwnEntries | None:
        if not wrapper_entries:
            return None
        own = OwnEntries()
        for key, value in wrapper_entries.items():
            if is_kept(key):
                own[key] = self._checked(key, value, None)
                own.written.add(key)
        own.find_divided([*([] if is_lazy(param) else [param.shape]), *shapes_of(base_entries)])
        return own

    def _commit(
        self, states: Mapping[Any, Any], taken: Mapping[Any, tuple[Any, OwnEntries | None]], instead: bool
    ) -> None:
        if instead:
            as_it_is = isinstance(states, defaultdict) and all(
                base_entries is states[p] for p, (base_entries, _) in taken.items()
            )
            self.base.state = states if as_it_is else defaultdict(dict)  # type: ignore[assignment]
            self.store.table = {}
        table = self.store.table
        for param, (base_entries, own) in taken.items():
            self.base.state[param] = base_entries
            before = table.pop(param, None)
            if own is not None:
                own.basis_form = own.basis_form or (before.basis_form if before is not None else {})
                table[param] = own
        self._rewritten()

    def drop(self, params: list[Any]) -> None:
        for param in params:
            self.base.state.pop(param, None)
            self.store.table.pop(param, None)
        self._rewritten()

    def _rewritten(self) -> None:
        """Forget what is remembered of the old states: whole states were written or deleted."""
        self.store.mark_replaced()
        self.groups.update_plans()
        self.groups.look_anew()
        remaining = self.groups.forget_removed()
        if remaining is not None:
            self.store.forget_all_but(remaining)


def _is_cut_up(value: Any) -> bool:
    return isinstance(value, Undivided) and value.cut_up


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Undivided) else value
