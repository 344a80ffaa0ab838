"""The preconditioners of a comparison: their names, and the parameter groups that they rotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SerializeAsAny
from torch import nn

from selective import Preconditioner, param_groups_for

JOINED = {"qkv": 3, "mlp_in": 2}
"""Of the comparison's GPT: queries, keys and values; gate and value. Rotated as one matrix each they were worse than
not rotated at all, in a run of 34M parameters: docs/how-it-works/rotation.md."""


def preconditioner_of(data: Any) -> Preconditioner:
    """The preconditioner of a short name, a kind's name, or a mapping with a `kind`. Raises ValueError."""
    try:
        return Preconditioner.from_data(data)
    except ValueError as error:
        raise ValueError(f"{error}; short names are adadiag, adadiag++, soap") from error


AnyPreconditioner = Annotated[SerializeAsAny[Preconditioner], BeforeValidator(preconditioner_of)]


def groups_by_kind(
    model: nn.Module,
    weight_decay: float,
    rotated: bool,
    parts: Mapping[str, int | str] | Literal["auto"] | None = JOINED,
    rates: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for the model's inner matrices, embeddings, head and vectors; the first three have weight decay.

    Every contender of a comparison with preconditioners gets these groups, so that random policies number parameters
    alike. If `rotated`, all groups but the matrices have the preconditioner None. `parts` is that of
    `param_groups_for`. `rates` are the learning rates of the matrices and of everything else.
    """
    groups = param_groups_for(model, weight_decay=weight_decay, parts=parts, ask=True)
    names = ("weight_decay", "preconditioner", "matrix_view") if rotated else ("weight_decay",)
    return [
        {
            "params": [p for _, p in group["params"]],
            **{name: group[name] for name in names if name in group},
            **({} if rates is None else {"lr": rates["preconditioner" in group]}),
        }
        for group in groups
    ]
