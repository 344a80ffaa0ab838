"""The wrapper's entries of one parameter: tensors by name, and which of them are cut with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from selective.kernels.lasting import lasting
from selective.parameter import is_lazy
from selective.sharding.gathering import cut_like
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_SKIPPED, BASIS_STEPS, MOMENTUM, POLICY_STATE, RESIDUE

COUNTS = (BASIS_STEPS, BASIS_SHAPE, BASIS_SKIPPED)  # int64
ON_THE_HOST = (BASIS_STEPS, BASIS_SHAPE)  # asked in every step, or never: nobody waits for a device


def is_of_basis(key: str) -> bool:
    """True if the entry belongs to the rotation of its parameter."""
    return key in COUNTS or key.startswith(BASIS)


def is_kept(key: str) -> bool:
    """True if the entry is stored per parameter; the others are computed when they are read."""
    return key in (MOMENTUM, RESIDUE) or key.startswith(POLICY_STATE) or is_of_basis(key)


def in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` in this dtype if that holds the same numbers; otherwise return it unchanged.

    torch's `Optimizer.load_state_dict` makes numbers of the parameter's dtype of everything: counts and bytes as well.
    """
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    return cast if torch.equal(cast.to(value.dtype), value) else value


class OwnEntries(dict[str, Tensor]):
    """The wrapper's stored entries of one parameter."""

    def __init__(self, entries: Mapping[str, Tensor] | None = None, shapes: Iterable[torch.Size] = ()) -> None:
        """`shapes` are those of the parameter, and of the base's entries of it."""
        super().__init__(entries or {})
        self.written: set[str] = set()  # from outside, and not checked since
        self.removed: set[str] = set()  # names of entries that the user has deleted: of its basis, and computed ones
        self.basis_form: dict[str, object] = {}  # names, shapes and dtypes of its basis when it was last checked
        self.divided: set[str] = set()  # states of a policy that have the parameter's elements
        self.find_divided(shapes)

    def find_divided(self, shapes: Iterable[torch.Size]) -> None:
        """Find the entries of the policy that have the parameter's elements, and so are cut when it is cut."""
        known = set(shapes)
        self.divided = {k for k, v in self.items() if k.startswith(POLICY_STATE) and v.dim() > 0 and v.shape in known}

    def present_basis_form(self) -> dict[str, object]:
        """Return the names, shapes and dtypes of the tensors of its basis."""
        return {k: (tuple(v.shape), v.dtype) for k, v in self.items() if k.startswith(BASIS)}

    def mark_checked(self) -> None:
        """Record that the entries fit: remember the form of the basis, and clear the marks of writes from outside."""
        self.basis_form = self.present_basis_form()
        self.written.clear()
        self.removed.clear()

    def is_divided(self, key: str) -> bool:
        """True if the entry is cut with its parameter."""
        return key in (MOMENTUM, RESIDUE) or key in self.divided


def own_tensors(entries: dict[str, Tensor], param: Tensor) -> OwnEntries:
    """Return copies of the saved entries of a parameter that are stored."""
    kept = {key: cast(Tensor, value) for key, value in entries.items() if is_kept(key)}
    with lasting():
        made = {
            key: cut_like(value.detach().clone().to("cpu" if key in ON_THE_HOST else param.device), param)
            for key, value in kept.items()
        }
    own = OwnEntries(made, [] if is_lazy(param) else [param.shape])
    own.mark_checked()
    return own
