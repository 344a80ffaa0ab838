"""Selections: *which* coordinates of a tensor are selected. How much they get is a strength's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from selective.configured import Configured
from selective.kernels import spec, top_k
from selective.kernels.reference.masks import score_of, select
from selective.policies.kernel import take_kernel
from selective.policies.view import StepView


class Selection(Configured):
    """A boolean for each coordinate. Subclass it and override `select` for one of your own.

    With a `kernel` beside `select`, a GPU runs that inside of the step, and calls nothing from Python.
    """

    _family: ClassVar[str] = "selection"
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    reads: ClassVar[frozenset[str]] = frozenset({"update", "grad"})
    """Which of update, grad, momentum, previous_momentum, param `select` reads (a `kernel`: of the first three)."""
    kernel: ClassVar[Callable[..., Any] | None] = None
    """`select` as a function of single elements: `kernel(grad, update, momentum, ...)`, which returns whether they are
    selected; what follows are up to four fields (float, int, bool) by name, handed in as float32. A `triton.jit`
    function, or a plain one that Triton can compile. `momentum` means something where `reads` has it."""
    _numbers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "_registry" not in cls.__dict__:
            cls._numbers = take_kernel(cls, Selection)
        super().__pydantic_init_subclass__(**kwargs)

    def needs(self) -> frozenset[str]:
        """Which tensors of the view `select` reads."""
        return self.reads

    def spec(self) -> spec.Selection | None:
        """This selection in the kernels' terms; None for one that only exists in Python."""
        if self.kernel is None:
            return None
        numbers = tuple(float(getattr(self, name)) for name in self._numbers)
        return spec.Selection(
            "function", function=self.kernel, numbers=numbers, reads_momentum="momentum" in self.needs()
        )

    def select(self, view: StepView) -> Tensor:
        """The selected coordinates: a bool tensor shaped like the parameter."""
        described = self.spec()
        assert described is not None, f"{type(self).__name__} must override select(view)"
        item, rule, moved = view.kernel_inputs(self.needs())
        return select(described, item, rule, moved, view.draw)


class Everything(Selection):
    """Every coordinate."""

    def needs(self) -> frozenset[str]:
        return frozenset()

    def spec(self) -> spec.Selection:
        return spec.Selection("everything")


class Agreement(Selection):
    """Where the step and the gradient agree in sign: their product is > 0 (>= 0 when not `strict`).

    `of="update"` multiplies g with the base's update, `of="momentum"` with its first moment, `current` or `previous`
    (before g was mixed in; there is no previous update, so `momentum="previous"` implies `of="momentum"`). A tensor
    whose previous momentum is zero everywhere, as in the first step, is selected everywhere. NaN is never selected.
    """

    momentum: Literal["current", "previous"] = "current"
    of: Literal["update", "momentum"] = "update"
    strict: bool = True

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
        return frozenset({"grad", self._product()})

    def spec(self) -> spec.Selection:
        return spec.Selection("agreement", product=self._product(), strict=self.strict)


class TopK(Selection):
    """The K = int(fraction * d) largest *signed* scores of each tensor, ties to the lower index (MGUP).

    K = 0 (a tensor of one element at fraction < 1) leaves the tensor dense. NaN is never selected.
    """

    fraction: float = Field(default=0.5, gt=0, le=1)
    """The share of each tensor that is selected."""
    score: Literal["update", "momentum", "nesterov"] = "update"
    """"update" is u ⊙ g, "momentum" m ⊙ g, "nesterov" (beta m + (1 - beta) g) ⊙ g with the base's own beta, the score
    of the official Muon variant."""
    quantile: Literal["exact", "sampled"] = "exact"
    """"sampled" takes the threshold from a sample of up to 64k elements: not exactly K."""

    def needs(self) -> frozenset[str]:
        return frozenset({"grad", "update" if self.score == "update" else "momentum"})

    def select(self, view: StepView) -> Tensor:
        if self.quantile == "sampled":
            return super().select(view)
        _, rule, moved = view.kernel_inputs(self.needs())  # the same, but the ranking is picked by device
        score = score_of(self.spec(), rule, moved)
        return top_k(score, int(self.fraction * score.numel()))

    def spec(self) -> spec.Selection:
        return spec.Selection("top_k", score=self.score, fraction=self.fraction, quantile=self.quantile)


class Bernoulli(Selection):
    """A coin for each element, row (first dimension) or tensor, by address: f(seed, step, parameter, element)."""

    probability: float = Field(default=0.5, ge=0, le=1)
    """Of each unit to be selected."""
    unit: Literal["element", "row", "tensor"] = "element"
    """What a coin is thrown for."""

    def needs(self) -> frozenset[str]:
        return frozenset()

    def spec(self) -> spec.Selection:
        return spec.Selection("bernoulli", probability=self.probability, unit=self.unit)


AnySelection = Annotated[SerializeAsAny[Selection], BeforeValidator(Selection.from_data)]
