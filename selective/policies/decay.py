"""Selective weight decay: which coordinates decoupled decay reaches, beside any policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from selective.configured import Configured
from selective.kernels import spec


class Decay(Configured):
    """Decides which coordinates decoupled weight decay reaches. Each of them is decayed fully, or not at all.

        p <- p - mask * u - (1 - factor) * p    where the decay reaches a coordinate
        p <- p - mask * u                       elsewhere

    The factor is 1 - lr * weight_decay, or the base's own. Which of the two lines holds is known before the parameter
    is written, and it is written once.
    """

    _family: ClassVar[str] = "decay"
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    at_random: ClassVar[bool] = False

    if TYPE_CHECKING:

        def __init__(self, **data: Any) -> None: ...

    weight_decay: float | None = Field(default=None, ge=0)
    """λ, for a base without decay of its own (`weight_decay=0` there); the factor is 1 - lr · λ. None takes over the
    decoupled decay of the base."""
    of: Literal["update", "masked"] = "update"
    """The update whose sign is compared with the parameter's: the base's own, or the one that the policy's mask has
    gone over. A masked update is 0 wherever the mask is, and there `strict` decides alone."""
    strict: bool = False
    """False: coordinates whose update is exactly 0 decay, too (u · θ >= 0, as in the paper). True: they don't (> 0)."""

    def spec(self, of: Literal["update", "masked", "gradient"] | None = None) -> spec.Decay:
        """This decay in the kernels' terms; `of` says which of their tensors has the update to compare."""
        return spec.Decay("cautious", of or self.of, self.strict)


class CautiousDecay(Decay):
    """Decay a coordinate only where the update also moves it towards 0: where u · θ >= 0 (arXiv 2510.12402).

        opt = SelectiveUpdate(AdamW(model.parameters(), weight_decay=0.1), policy=MGUP(), decay=CautiousDecay())

    The paper's step is θ <- θ - lr (u + λ 1[u θ >= 0] θ). Here u is the base's update in the parameter's own space,
    before any mask, or with `of="masked"` after it. We differ in one thing: signs are compared instead of multiplied,
    so that no product underflows. With a negative learning rate, u is the direction before the rate, as there.
    """


class RandomDecay(Decay):
    """The random control of `CautiousDecay`: as large a share of each tensor decays, but random coordinates.

    In each step it measures which share of a tensor `CautiousDecay` with the same fields would decay. Each coordinate
    then decays with that probability. The numbers follow from the seed, the step and the coordinate's place, and are
    not those of the policy. It runs in plain torch on every device.
    """

    at_random: ClassVar[bool] = True


def decay_from(data: Any) -> Decay | None:
    """Make a decay of a `Decay`, a kind's name ("CautiousDecay"), a dict with a `kind`, or JSON text; None is None.

    Raises `pydantic.ValidationError` for a wrong key or value, and `ValueError` for an unknown kind.
    """
    return None if data is None else Decay.from_data(data)
