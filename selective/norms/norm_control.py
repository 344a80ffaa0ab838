"""The rules about the norms of matrices: `NormControl`, and what is a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from selective.configured import Configured


class Norm(Configured):
    """A rule about a matrix's norm in a step. `NormControl` keeps it; without a rule the base moves it."""

    _family: ClassVar[str] = "norm"
    _registry: ClassVar[dict[str, type[Configured]]] = {}

    if TYPE_CHECKING:

        def __init__(self, **data: Any) -> None: ...


class NormControl(Norm):
    """Keep the norm of each matrix, and move it by a rate that is relative to that norm.

        lr = {"matrices": 0.036, "rest": 0.006}
        opt = SelectiveUpdate.for_model(model, preconditioner="soap", norm=NormControl(), lr=lr)

    With the matrix W before the step, r = ‖W‖ (Frobenius), and u what the whole step would subtract from it without
    weight decay, after rotation and mask:

        W' = W - |lr| · scale · r · u / ‖u‖
        W <- W' · r / ‖W'‖

    The rule is "hyperball" (arXiv 2606.16899), which we read in other projects' code. r is the norm of now, which is
    that of the start up to rounding, so that nothing is kept. The rate is relative: 0.02 turns a matrix by about 0.02
    radians. The size of u does not count, and neither do bias corrections. Weight decay does not reach these matrices.

    It is for the inner matrices of a model. `matrix_view` says which parameters are matrices, as for a preconditioner:
    each matrix of a stack of experts, or of joined queries, keys and values, has a norm of its own. Vectors, and what
    has no matrices, are stepped by the base at `lr`, as without the rule.

    A matrix that is 0 would stay 0. The first step refuses it. A matrix stays as it is in a step whose update is 0.
    Where the update can only be got as a difference of parameters, because the base or the policy looks at them,
    rounding counts as 0. The norm of 16-bit parameters follows their rounding: by about 1 % in 6,000 steps of bfloat16.
    """

    scale: float = Field(default=1.0, gt=0)
    """The relative rate of a step is `lr` times this, so that one schedule of `lr` can be for everything."""


def norm_from(data: Any) -> Norm | None:
    """Make a rule of a `Norm`, a kind's name ("NormControl"), a dict with a `kind`, or JSON text; None is None.

    Raises `pydantic.ValidationError` for a wrong key or value, and `ValueError` for an unknown kind.
    """
    return None if data is None else Norm.from_data(data)
