"""The base's state and ours as one mapping, `SelectiveUpdate.state`: live, and written to as torch's is."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor

from selective.state.entries import DECAY, NORM, POLICY, PRECONDITIONER, PREFIX, SEED, STEP
from selective.state.parameter_state import OwnEntries, is_kept
from selective.state.undivided import Undivided

COMPUTED = (STEP, SEED, POLICY, DECAY, NORM, PRECONDITIONER)  # computed when they are read
_MISSING: Any = object()


class ComputedEntries(Protocol):
    """Computed entries (`COMPUTED`): shown in every parameter's state, stored in none."""

    def names(self, own: OwnEntries) -> list[str]:
        """Return their names, for a parameter with the stored entries `own`."""
        ...

    def read(self, key: str) -> Tensor: ...

    def write(self, key: str, value: Any) -> None:
        """Set it for all parameters that share it; raise a ValueError with the reason if it can't be set."""
        ...


class StateBackend(Protocol):
    """The storage behind `SelectiveUpdate.state`."""

    def base_state(self) -> MutableMapping[Any, Any]: ...

    def own(self, param: Any) -> OwnEntries | None: ...

    def keep(self, param: Tensor) -> OwnEntries:
        """Return the wrapper's entries of `param`; store an empty `OwnEntries` if there is none."""
        ...

    def with_own(self) -> list[Tensor]: ...

    def computed(self, param: Any) -> ComputedEntries: ...

    def write_entry(self, own: OwnEntries, key: str, value: Any) -> None:
        """Write one stored entry (None: it was deleted); raise a ValueError or a TypeError if it can't be taken."""
        ...

    def base_written(self) -> None:
        """Note a write to an entry of the base: all groups are checked again before the next step."""
        ...

    def write_states(self, states: Mapping[Any, Any], *, instead: bool) -> None:
        """Write whole states, all or none; `instead=True` first deletes all others."""
        ...

    def drop(self, params: list[Any]) -> None: ...


class MergedEntry(MutableMapping[str, Any]):
    """One parameter's state: the base's entries and ours. Writes go to whoever owns the entry.

    Like the dictionary that it stands for, it goes on after the parameter's state was deleted, and can be given to
    another parameter: `opt.state[new] = entry`.
    """

    def __init__(self, base_entries: MutableMapping[str, Any], backend: StateBackend, param: Any) -> None:
        self.base_entries = base_entries
        self._backend, self._computed = backend, backend.computed(param)
        self._own = backend.own(param)
        self._param = param if self._own is None else None  # looked up as long as nothing is stored of it

    @property
    def backend(self) -> StateBackend:
        """The storage of this entry."""
        return self._backend

    @property
    def own(self) -> OwnEntries | None:
        """The wrapper's stored entries of the parameter; None if there are none."""
        if self._own is None:
            self._own = self._backend.own(self._param)
        if self._own is not None:
            self._param = None  # an entry that somebody holds keeps no parameter alive
        return self._own

    def _computed_names(self) -> list[str]:
        own = self.own
        return [] if own is None else [name for name in self._computed.names(own) if name not in own.removed]

    def __getitem__(self, key: str) -> Any:
        own = self.own
        if own is None or not str(key).startswith(PREFIX):
            return self.base_entries[key]
        if key in own and own.is_divided(key):
            return own[key]
        if key in own or key in self._computed_names():
            value = own[key] if key in own else self._computed.read(key)
            return Undivided.of(value, lambda written: self.__setitem__(key, written))
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if not str(key).startswith(PREFIX):
            self.base_entries[key] = value
            self._backend.base_written()
        elif isinstance(value, Undivided) and value.cut_up:
            return  # it says nothing
        else:
            value = value.plain() if isinstance(value, Undivided) else value
            if is_kept(key):
                self._backend.write_entry(self._kept(), key, value)
            else:
                self._computed.write(key, value)
                self._kept().removed.discard(key)

    def _kept(self) -> OwnEntries:
        own = self.own
        if own is None:
            assert self._param is not None
            own = self._own = self._backend.keep(self._param)
            self._param = None
        return own

    def __delitem__(self, key: str) -> None:
        own = self.own
        if own is None or not str(key).startswith(PREFIX):
            del self.base_entries[key]
            self._backend.base_written()
        elif key in own:
            del own[key]
            own.removed.add(key)
            self._backend.write_entry(own, key, None)
        elif key in COMPUTED and key not in own.removed:
            own.removed.add(key)
        else:
            raise KeyError(key)

    def clear(self) -> None:
        """Remove all entries, the base's and ours."""
        self.base_entries.clear()
        if self.own is not None:
            for key in list(self):
                del self[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.base_entries
        own, computed = self.own, self._computed_names()
        if own is not None:
            yield from computed
            yield from own

    def __len__(self) -> int:
        return len(self.base_entries) + len(self.own or ()) + len(self._computed_names())

    def __repr__(self) -> str:
        return repr(dict(self))

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    copy = __copy__

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class MergedState(MutableMapping[Any, Any]):
    """The state of all parameters, live: true as soon as the base or we hold any."""

    def __init__(self, backend: StateBackend) -> None:
        self._backend = backend

    def _keys(self) -> list[Any]:
        base = self._backend.base_state()
        return [*base, *(p for p in self._backend.with_own() if p not in base)]

    def __getitem__(self, param: Any) -> Any:
        base = self._backend.base_state()
        base_entries = base.get(param, _MISSING)
        if base_entries is not _MISSING and not (
            isinstance(base_entries, MutableMapping) and isinstance(param, Tensor)
        ):
            return base_entries  # some base optimizers keep more than states of parameters there
        # like the defaultdict it stands for: a parameter without state has an empty one, which is not stored by reading
        return MergedEntry(_Inserting(base, param) if base_entries is _MISSING else base_entries, self._backend, param)

    def get(self, param: Any, default: Any = None) -> Any:
        """The state of a parameter that has one; `default` of any other."""
        return self[param] if param in self else default

    def setdefault(self, param: Any, default: Any = None) -> Any:
        """The state of a parameter, `default` from now on where it has none."""
        if param not in self:
            self[param] = {} if default is None else default
        return self[param]

    def pop(self, param: Any, default: Any = _MISSING) -> Any:
        """Remove a parameter's state, and return it: the base's entries and ours."""
        if param not in self:
            if default is _MISSING:
                raise KeyError(param)
            return default
        found = self[param]
        del self[param]
        return found

    def clear(self) -> None:
        """Remove all state: everything starts anew in the next step."""
        self._backend.drop(self._keys())

    def __setitem__(self, param: Any, entries: Any) -> None:
        self._backend.write_states({param: entries}, instead=False)

    def __delitem__(self, param: Any) -> None:
        if param not in self:
            raise KeyError(param)
        self._backend.drop([param])

    def __contains__(self, param: object) -> bool:
        return param in self._backend.base_state() or self._backend.own(param) is not None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return repr({param: dict(entry) if isinstance(entry, Mapping) else entry for param, entry in self.items()})

    def copy(self) -> dict[Any, Any]:
        """The states by parameter; they are the live ones."""
        return dict(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = defaultdict(dict)
        for param, entry in self.items():
            made[copy.deepcopy(param, memo)] = copy.deepcopy(entry, memo)
        return made

    def __reduce__(self) -> Any:
        return dict, ({param: dict(entry) if isinstance(entry, Mapping) else entry for param, entry in self.items()},)


class _Inserting(dict[str, Any]):
    """An empty state that joins the base's dictionary with its first entry."""

    def __init__(self, owner: MutableMapping[Any, Any], param: Any) -> None:
        super().__init__()
        self._joins: tuple[MutableMapping[Any, Any], Any] | None = (owner, param)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if self._joins is not None:
            owner, param = self._joins
            self.forget_owner()
            owner[param] = self

    def forget_owner(self) -> None:
        """It is some parameter's state now: from here on an ordinary dictionary, which keeps no parameter alive."""
        self._joins = None

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def split_own(entries: Any) -> tuple[Any, OwnEntries | dict[str, Any]]:
    """Split what is written as a parameter's state into the base's entries and the wrapper's.

    A dictionary that has none of the wrapper's is handed on as it is, and the base keeps that object. So are both parts
    of a `MergedEntry`.
    """
    if isinstance(entries, MergedEntry):
        if isinstance(entries.base_entries, _Inserting):
            entries.base_entries.forget_owner()
        own = entries.own
        return entries.base_entries, {} if own is None else own
    wrapper_entries = {key: value for key, value in entries.items() if str(key).startswith(PREFIX)}
    if not wrapper_entries and isinstance(entries, dict):
        return entries, {}
    return {key: value for key, value in entries.items() if key not in wrapper_entries}, wrapper_entries


def shapes_of(entries: Mapping[str, Any]) -> Iterator[torch.Size]:
    """The shapes of the tensors among a base's entries, single numbers aside."""
    return (value.shape for value in entries.values() if isinstance(value, Tensor) and value.dim() > 0)
