"""The preconditioners of a comparison: how they are named, and which parameters they rotate."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from torch import nn

from selective import AdaDiag, Preconditioner, Soap, param_groups_for

ALIASES: dict[str, Preconditioner] = {
    "adadiag": AdaDiag(),
    "adadiag++": AdaDiag(sides="two"),
    "soap": Soap(),
}
"""As people say them on a command line; any kind's name, or a mapping with a `kind`, does as well."""


def _space(data: Any) -> Preconditioner:
    alias = ALIASES.get(data.lower()) if isinstance(data, str) else None
    try:
        return Preconditioner.from_data(data) if alias is None else alias
    except ValueError as error:
        raise ValueError(f"{error}; short names are {', '.join(ALIASES)}") from error


AnyPreconditioner = Annotated[SerializeAsAny[Preconditioner], BeforeValidator(_space)]


def groups_by_kind(model: nn.Module, weight_decay: float, rotated: bool) -> list[dict[str, Any]]:
    """Matrices of the model's inside, then embeddings, head and vectors, the first three decayed.

    Everyone in a comparison with preconditioners gets these groups, so that random policies number parameters alike;
    with `rotated` all but the first say that they are not.
    """
    found = param_groups_for(model, weight_decay=weight_decay)
    names = ("weight_decay", "preconditioner", "matrix_view") if rotated else ("weight_decay",)
    return [
        {"params": [p for _, p in group["params"]], **{name: group[name] for name in names if name in group}}
        for group in found
    ]
