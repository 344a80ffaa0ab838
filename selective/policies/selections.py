"""Selections, which say *which* coordinates of a tensor are selected. Strengths say by how much they are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from selective.configured import Configured
from selective.kernels import spec, top_k
from selective.kernels.reference.selections import score_of, select
from selective.policies.kernel import take_kernel
from selective.policies.view import StepView


class Selection(Configured):
    """Selects coordinates of a tensor: a boolean for each. Subclass it and override `select` to write your own.

    With a `kernel` beside `select`, a GPU runs the kernel inside of the step, and no Python code is called for each
    parameter. A class whose `kernel` can't be used raises TypeError where it is defined.
    """

    _family: ClassVar[str] = "selection"
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    _state_is_kept: ClassVar[str] = (
        "a selection has no state; what changes from step to step belongs to a strength or a policy"
    )
    reads: ClassVar[frozenset[str]] = frozenset({"update", "grad"})
    """The tensors of the view that `select` reads: any of update, grad, momentum, previous_momentum, param. A `kernel`
    can read the first three only."""
    kernel: ClassVar[Callable[..., Any] | None] = None
    """`select` as a function of single elements: `kernel(grad, update, momentum, ...)` returns True where an element is
    selected. The further parameters are up to four fields (float, int, bool) by name, handed in as float32. It is a
    `triton.jit` function, or a plain one that Triton can compile. `momentum` holds the momentum only if `reads` has
    it."""
    _numbers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "_registry" not in cls.__dict__:
            cls._numbers = take_kernel(cls, Selection)
        super().__pydantic_init_subclass__(**kwargs)

    def needs(self) -> frozenset[str]:
        """The names of the view's tensors that `select` reads."""
        return self.reads

    def spec(self) -> spec.Selection | None:
        """This selection in the kernels' terms; None for one that exists in Python only."""
        if self.kernel is None:
            return None
        numbers = tuple(float(getattr(self, name)) for name in self._numbers)
        return spec.Selection(
            "function", function=self.kernel, numbers=numbers, reads_momentum="momentum" in self.needs()
        )

    def select(self, view: StepView) -> Tensor:
        """True at the selected coordinates: a bool tensor shaped like the parameter."""
        described = self.spec()
        assert described is not None, f"{type(self).__name__} must override select(view)"
        item, rule, moved = view.kernel_inputs(self.needs())
        return select(described, item, rule, moved, view.draw)


class Everything(Selection):
    """Select every coordinate."""

    def needs(self) -> frozenset[str]:
        return frozenset()

    def spec(self) -> spec.Selection:
        return spec.Selection("everything")


class Agreement(Selection):
    """Select where the step and the gradient agree in sign: their product is > 0 (≥ 0 if not `strict`).

    `of="update"` multiplies g by the base's update, `of="momentum"` by its first moment. There is no previous update,
    so `momentum="previous"` implies `of="momentum"`. With it, a tensor whose previous momentum is zero everywhere, as
    in the first step, is selected everywhere. A NaN product is never selected.
    """

    momentum: Literal["current", "previous"] = "current"
    """"previous" is the first moment before g was mixed in, "current" the one after."""
    of: Literal["update", "momentum"] = "update"
    """The tensor that g is multiplied by."""
    strict: bool = True
    """True: a product of exactly 0 is not selected."""

    @model_validator(mode="before")
    @classmethod
    def _previous_is_of_momentum(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("momentum") == "previous":
            if data.get("of", "momentum") == "update":
                raise ValueError("momentum='previous' needs of='momentum': there is no update of the step before")
            return {**data, "of": "momentum"}
        return data

    def _product(self) -> Literal["update", "momentum", "previous_momentum"]:
        if self.of == "update":
            return "update"
        return "previous_momentum" if self.momentum == "previous" else "momentum"

    def needs(self) -> frozenset[str]:
        return Agreement.spec(self).reads

    def spec(self) -> spec.Selection:
        return spec.Selection("agreement", product=self._product(), strict=self.strict)


class TopK(Selection):
    """Select the K = int(fraction * d) largest *signed* scores of each tensor of d elements (MGUP's selection).

    Of equal scores the one with the lower index is selected first. NaN is never selected. K = 0 (a tensor of one
    element at fraction < 1) leaves the tensor dense.
    """

    fraction: float = Field(default=0.5, gt=0, le=1)
    """The share of each tensor that is selected."""
    score: Literal["update", "momentum", "nesterov"] = "update"
    """"update" is u ⊙ g, "momentum" is m ⊙ g. "nesterov" is (beta m + (1 - beta) g) ⊙ g with the base's own beta, the
    score of MGUP's official Muon variant."""
    quantile: Literal["exact", "sampled"] = "exact"
    """"sampled" takes the threshold from a sample of up to 64k elements, and selects about K, not exactly K."""

    def needs(self) -> frozenset[str]:
        return TopK.spec(self).reads

    def select(self, view: StepView) -> Tensor:
        if self.quantile == "sampled":
            return super().select(view)
        _, rule, moved = view.kernel_inputs(self.needs())  # the same selection, with the device's own top-K
        described = self.spec()
        score = score_of(described, rule, moved)
        return top_k(score, described.k_of(score.numel()))

    def spec(self) -> spec.Selection:
        return spec.Selection("top_k", score=self.score, fraction=self.fraction, quantile=self.quantile)


class Bernoulli(Selection):
    """Flip a coin for each element, row (first dimension) or tensor.

    A coin is a function of seed, step, parameter index and unit index alone: it is the same on every rank, after a
    resume, and on every device. A vector's rows are its elements.
    """

    probability: float = Field(default=0.5, ge=0, le=1)
    """The probability that a unit is selected."""
    unit: Literal["element", "row", "tensor"] = "element"
    """The unit that gets a coin of its own."""

    def needs(self) -> frozenset[str]:
        return frozenset()

    def spec(self) -> spec.Selection:
        return spec.Selection("bernoulli", probability=self.probability, unit=self.unit)


AnySelection = Annotated[SerializeAsAny[Selection], BeforeValidator(Selection.part_from_data)]
