"""The plain data of the kernels: how to step (`StepSpec`), the tensors (`Item`), and the report (`Sums`).

Kernels know nothing of policies and optimizers. Policies describe themselves as a `Selection` and a `Strength`,
captures describe the base's rule. docs/reference/kernels.md has the semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args, overload

from torch import Tensor

from .decay import DECAY_KINDS, Decay
from .rules import AdamRule, GivenRule, LionRule, Rule, SGDRule
from .rules import Scalar as Scalar
from .shard import Shard

SelectionKind = Literal["everything", "agreement", "top_k", "bernoulli", "function"]
StrengthKind = Literal["fixed", "mean_preserving", "norm_preserving", "alignment"]
Score = Literal["update", "momentum", "nesterov"]
SELECTION_KINDS = frozenset(get_args(SelectionKind))
STRENGTH_KINDS = frozenset(get_args(StrengthKind))
SCORES = frozenset(get_args(Score))


def refuse_kind(device: str, part: Literal["selection", "strength", "decay"], kind: str) -> NoReturn:
    """End a dispatch on a kind: raise a ValueError that names the device and the kind it has no code for."""
    raise ValueError(f"{device} has no {part} of the kind {kind!r}")


def refuse_score(device: str, score: str) -> NoReturn:
    """End a dispatch on a score: raise a ValueError that names the device and the score it has no code for."""
    raise ValueError(f"{device} has no score {score!r} for a top-K")


def refuse_rule(device: str, rule: object) -> NoReturn:
    """End a dispatch on a rule: raise a ValueError that names the device and the rule it has no code for."""
    raise ValueError(f"{device} has no rule {type(rule).__name__}")


@dataclass(frozen=True)
class Control:
    """A matched random control: as many coordinates of each tensor as were selected, but random ones.

    They get the multipliers that the selected would have got. Coordinates that stand still are taken last.
    """

    norm: bool = True  # scale both multipliers so that the norm of mask * u stays what it would have been
    cap: float = 10.0  # of that scale


@dataclass(frozen=True)
class Selection:
    """The description of which coordinates of a tensor are selected."""

    kind: SelectionKind
    product: Literal["update", "momentum", "previous_momentum"] = "update"  # agreement: this times g
    strict: bool = True  # agreement: > 0 or >= 0
    score: Score = "update"  # top_k: this times g
    fraction: float = 0.5  # top_k
    quantile: Literal["exact", "sampled"] = "exact"  # top_k
    probability: float = 0.5  # bernoulli
    unit: Literal["element", "row", "tensor"] = "element"  # bernoulli
    function: Callable[..., Any] | None = None  # function: a Triton function of (grad, update, momentum, *numbers)
    numbers: tuple[float, ...] = ()  # function: its further arguments, at most 4
    reads_momentum: bool = False  # function: whether it needs a momentum (it is handed the update where there is none)
    control: Control | None = None  # select as many at random instead, once it is known how many are selected

    @property
    def reads(self) -> frozenset[str]:
        """The tensors that a coordinate is selected by, of "grad", "update", "momentum" and "previous_momentum"."""
        if self.kind == "agreement":
            return frozenset({"grad", self.product})
        if self.kind == "top_k":
            return frozenset({"grad", "update" if self.score == "update" else "momentum"})
        if self.kind == "function":
            return frozenset({"grad", "update", "momentum"} if self.reads_momentum else {"grad", "update"})
        return frozenset()

    def k_of(self, numel: int) -> int:
        """top_k: K, the number of coordinates that are selected of a tensor or a sample of `numel`."""
        return int(self.fraction * numel)

    def leaves_dense(self, numel: int) -> bool:
        """True if this is a top-K whose K is 0: then every multiplier of the tensor is 1, whatever the strength."""
        return self.kind == "top_k" and self.k_of(numel) == 0

    @property
    def random_limit(self) -> int:
        """bernoulli: a unit is selected where its random number of 24 bits is below this."""
        return round(self.probability * 2**24)


@dataclass(frozen=True)
class Strength:
    """The description of the two multipliers: of the selected coordinates, and of the rest."""

    kind: StrengthKind
    selected: float = 1.0  # fixed
    rest: float = 0.0
    cap: float = 2.0  # mean_preserving, norm_preserving
    of: Literal["update", "momentum", "gradient"] = "update"  # norm_preserving
    estimate: Literal["exact", "sampled"] = "exact"  # mean_preserving, norm_preserving
    temperature: float = 2.0  # alignment
    smoothing: float = 0.9  # alignment
    still: bool = False  # fixed: × 0 where the update times the gradient is exactly 0

    @property
    def reads(self) -> frozenset[str]:
        """The tensors that the multipliers are made from besides the selection, by the names of `Selection.reads`."""
        if self.kind == "norm_preserving":
            return frozenset({"grad" if self.of == "gradient" else self.of})
        if self.kind == "alignment":
            return frozenset({"grad", "momentum"})
        return frozenset({"grad", "update"} if self.still else ())

    @property
    def is_sampled(self) -> bool:
        """True if the multipliers are estimated from a sample of a large tensor."""
        return self.estimate == "sampled" and self.kind in ("mean_preserving", "norm_preserving")


@dataclass(frozen=True)
class Draw:
    """The source of this step's random numbers, which are counter-based."""

    seed: int
    step: int  # the number of steps that were taken before this one: 0 in the first
    stochastic: bool = False  # round bfloat16 and float16 parameters stochastically, not to nearest
    # [seed, step] as int64 on the GPU, read there instead of the two above, so that replays of a CUDA graph go on
    clock: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)  # compared by identity: a rule may hold tensors
class StepSpec:
    """Everything about a step but the tensors: one of these holds for all items of a call."""

    rule: Rule
    selection: Selection
    strength: Strength
    draw: Draw
    statistics: bool = False  # whether a `Sums` is returned for each item
    decay: Decay | None = None  # the coordinates that the rule's factor of decoupled decay reaches; None: all

    @property
    def keeps_previous(self) -> bool:
        """True if the momentum before the step is read after the moments have moved."""
        return "previous_momentum" in self.selection.reads


@dataclass(eq=False)
class StepCall:
    """Tensors that are stepped by one `StepSpec`; several of these are stepped together."""

    items: Sequence[Item]
    spec: StepSpec
    looked: bool = False  # True: the caller knows that dtypes, shapes and strides of parameters are those of last time
    graphs: bool = False  # True: launches that repeat those of last time may be recorded in a CUDA graph, and replayed


def check_kinds(device: str, spec: StepSpec) -> None:
    """Refuse a rule, selection, score, strength or decay of no kind that is defined here, before anything moves.

    Raises a ValueError with the device's name. A kind that is defined here and that a device has no code for ends in
    `refuse_kind`, `refuse_score` or `refuse_rule` there.
    """
    if not isinstance(spec.rule, (AdamRule, SGDRule, LionRule, GivenRule)):
        refuse_rule(device, spec.rule)
    if spec.selection.kind not in SELECTION_KINDS:
        refuse_kind(device, "selection", spec.selection.kind)
    if spec.selection.kind == "top_k" and spec.selection.score not in SCORES:
        refuse_score(device, spec.selection.score)
    if spec.strength.kind not in STRENGTH_KINDS:
        refuse_kind(device, "strength", spec.strength.kind)
    if spec.decay is not None and spec.decay.kind not in DECAY_KINDS:
        refuse_kind(device, "decay", spec.decay.kind)


@dataclass
class Item:
    """One parameter's tensors in a step. `param`, `state` and `policy_state` are changed in place."""

    param: Tensor
    grad: Tensor  # same shape; its dtype may differ from the parameter's
    state: dict[str, Tensor]
    address: int  # the parameter's index in the optimizer: the third coordinate of randomness
    policy_state: dict[str, Tensor] = field(default_factory=dict)  # "average" (0-d float32) for alignment
    shard: Shard | None = None  # the place of `param` (and `grad`, and `state`) in a whole tensor; None: it is whole


class ItemList(list[Item]):
    """A list of items that is given to every step again: the GPU path keeps its tables in `cache`.

    The list may change from step to step (gradients, state, even members); the cache is checked against it.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        super().__init__(items)
        self.cache: dict[Any, Any] = {}


@dataclass(frozen=True)
class Matrices:
    """A reading of a parameter as matrices, for norm control: `count` of them, `rows` x `columns` each.

    They lie one after the other in the row-major order of the parameter, unless there are several `beside` each other:
    then the parameter has `beside` times as many columns.
    """

    count: int
    rows: int
    columns: int
    beside: int = 1


@dataclass
class Sums:
    """The report of a tensor's step: 0-d float64 tensors on the tensor's device (numel: an int); no synchronisation."""

    numel: int
    selected: Tensor  # number of selected coordinates
    strength_selected: Tensor
    strength_rest: Tensor
    update_sq: Tensor  # sum of u^2
    grad_sq: Tensor  # sum of g^2
    update_grad: Tensor  # sum of u g
    masked_sq: Tensor  # sum of (mask u)^2


SUM_NAMES = (
    "selected", "strength_selected", "strength_rest", "update_sq", "grad_sq", "update_grad", "masked_sq",
)  # fmt: skip


class SumsTable(Sequence[Sums]):
    """The sums of many tensors as the rows of one float64 table, with the columns `SUM_NAMES`.

    The table may be given as a function, which is called whenever somebody reads it: after another replay of a CUDA
    graph the memory that it reads has other sums.
    """

    def __init__(self, values: Tensor | Callable[[], Tensor], numels: Sequence[int]) -> None:
        self._values, self.numels = values, numels

    @property
    def values(self) -> Tensor:
        """The table, float64 [tensors, 7]."""
        return self._values if isinstance(self._values, Tensor) else self._values()

    @overload
    def __getitem__(self, index: int) -> Sums: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sums]: ...

    def __getitem__(self, index: int | slice) -> Sums | list[Sums]:
        if isinstance(index, slice):
            return list(self)[index]
        return Sums(self.numels[index], *self.values[index].unbind())

    def __len__(self) -> int:
        return len(self.numels)

    def __iter__(self) -> Iterator[Sums]:
        return (Sums(numel, *row.unbind()) for numel, row in zip(self.numels, self.values, strict=True))
