"""The plain data that goes into a kernel: which rule, which selection, which strength, on which tensors.

Kernels know nothing of policies or optimizers; policies describe themselves in these terms
(`Selection`, `Strength`), captures do so for the base's rule. docs/design.md, "Kernels", has the semantics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, get_args, overload

from torch import Tensor

Scalar = float | Tensor  # a Python number, or a 0-d tensor (torch allows `lr` to be one)
SelectionKind = Literal["everything", "agreement", "top_k", "bernoulli", "function"]
StrengthKind = Literal["fixed", "mean_preserving", "norm_preserving", "alignment"]
SELECTION_KINDS = frozenset(get_args(SelectionKind))
STRENGTH_KINDS = frozenset(get_args(StrengthKind))


def refuse_kind(device: str, part: Literal["selection", "strength"], kind: str) -> NoReturn:
    """The end of every dispatch on a kind: a ValueError that names the device and the kind it has no code for."""
    raise ValueError(f"{device} has no {part} of the kind {kind!r}")


def refuse_rule(device: str, rule: object) -> NoReturn:
    """The end of every dispatch on a rule: a ValueError that names the device and the rule it has no code for."""
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
    """Which coordinates of a tensor are selected."""

    kind: SelectionKind
    product: Literal["update", "momentum", "previous_momentum"] = "update"  # agreement: this times g
    strict: bool = True  # agreement: > 0 or >= 0
    score: Literal["update", "momentum", "nesterov"] = "update"  # top_k: this times g
    fraction: float = 0.5  # top_k
    quantile: Literal["exact", "sampled"] = "exact"  # top_k
    probability: float = 0.5  # bernoulli
    unit: Literal["element", "row", "tensor"] = "element"  # bernoulli
    function: Callable[..., Any] | None = None  # function: a Triton function of (grad, update, momentum, *numbers)
    numbers: tuple[float, ...] = ()  # function: its further arguments, at most 4
    reads_momentum: bool = False  # function: whether it needs a momentum (it is handed the update where there is none)
    control: Control | None = None  # select as many at random instead, once it is known how many are selected


@dataclass(frozen=True)
class Strength:
    """The two multipliers: of the selected coordinates, and of the rest."""

    kind: StrengthKind
    selected: float = 1.0  # fixed
    rest: float = 0.0
    cap: float = 2.0  # mean_preserving, norm_preserving
    of: Literal["update", "momentum", "gradient"] = "update"  # norm_preserving
    estimate: Literal["exact", "sampled"] = "exact"  # mean_preserving, norm_preserving
    temperature: float = 2.0  # alignment
    smoothing: float = 0.9  # alignment
    still: bool = False  # fixed: × 0 where the update times the gradient is exactly 0


@dataclass(frozen=True)
class AdamRule:
    """torch's Adam and AdamW. State: `step` (0-d), `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: float = 0.0
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False

    @property
    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        return 0.0 if self.decoupled else self.weight_decay


@dataclass(frozen=True)
class SGDRule:
    """torch's SGD. State: `momentum_buffer` where momentum is not 0 (absent or None before the first step)."""

    lr: Scalar
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0  # coupled, as torch has it
    maximize: bool = False

    @property
    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class LionRule:
    """Lion (arXiv 2302.06675): u = lr * sign(beta1 m + (1 - beta1) g), then m moves with beta2. State: `exp_avg`."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    decay_factor: Scalar = 1.0  # the parameter is multiplied by it (decoupled decay)
    weight_decay: float = 0.0  # coupled: added to the gradient
    maximize: bool = False

    @property
    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class GivenRule:
    """An update that somebody else computed: p <- factor * start + (offset - mask) * u.

    State: `update` holds u (or -u where `negated`), may share storage with the parameter; `start` the parameter
    before the step; optionally `momentum` and `previous_momentum`. The gradient is taken as it is given.
    scratch: start = the saved copy, offset 0. delta: start = the parameter after the base's step, offset 1, so that
    where the mask is 1 the result is exactly the base's.
    """

    factor: Scalar = 1.0
    offset: float = 0.0
    negated: bool = False
    momentum_beta: float = 0.95  # top_k's "nesterov" score: (1 - beta) g + beta m, m a running average (Muon's)
    rate: Scalar = 1.0  # the base's learning rate, of which only the sign is read: Note [a negative learning rate]
    maximize: ClassVar[bool] = False  # the gradient is taken as it is given,
    coupled_decay: ClassVar[float] = 0.0  # and nothing is added to it


Rule = AdamRule | SGDRule | LionRule | GivenRule  # How the moments of a parameter group move.


def check_kinds(device: str, rule: Rule, selection: Selection, strength: Strength) -> None:
    """Refuse a rule, a selection or a strength of no kind that is defined here, before anything moves.

    Raises a ValueError with the device's name. A kind that is defined here and that a device has no code for ends in
    `refuse_kind` or `refuse_rule` there.
    """
    if not isinstance(rule, (AdamRule, SGDRule, LionRule, GivenRule)):
        refuse_rule(device, rule)
    if selection.kind not in SELECTION_KINDS:
        refuse_kind(device, "selection", selection.kind)
    if strength.kind not in STRENGTH_KINDS:
        refuse_kind(device, "strength", strength.kind)


@dataclass(frozen=True)
class Shard:
    """What of a whole tensor is here, where the rest is elsewhere: plain numbers and a process group.

    In each dimension the local indices stand for `runs` of the whole tensor's, ascending: (start, length) each. So
    local flat (row-major) order is the whole's order, but what is here need not lie in one piece: columns, strided
    shards.

    Ties go to the lower index of the whole tensor, which several ranks have between them. For those the whole is cut
    into `cells`, numbered in its order, each on one rank (and its replicas): every index of the dimensions before the
    last sharded one, times that one's pieces; `places` says which piece each local run of it is.
    """

    shape: tuple[int, ...]  # of the whole tensor
    runs: tuple[tuple[tuple[int, int], ...], ...]
    group: Any  # of processes: a sum over it is a sum over the whole tensor, if only those count that are `counted`
    counted: bool = True  # False on all replicas but one, which add zeros
    cut: int = 0  # the last sharded dimension
    pieces: int = 1  # that it is cut into
    places: tuple[int, ...] = (0,)
    # Whether, on every rank, what is there is one stretch of the whole's flat order; ... and its rows one of its rows.
    # (Ranks have to know the same of each other: they ask together for what they step in the same way.)
    stretches: bool = False
    row_stretches: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def cells(self) -> int:
        return math.prod(self.shape[: self.cut]) * self.pieces

    @property
    def offset(self) -> int | None:
        """The whole's flat index of the first local element where all others follow it; None where they don't.

        0 where there are none.
        """
        if not all(self.runs):
            return 0
        stride, offset, whole = 1, 0, True  # whole: the dimensions after this one are complete here
        for size, runs in zip(reversed(self.shape), reversed(self.runs), strict=True):
            if len(runs) != 1 or not (whole or runs[0][1] == 1):
                return None
            whole = whole and runs[0] == (0, size)
            offset, stride = offset + runs[0][0] * stride, stride * size
        return offset

    def first(self, unit: Literal["element", "row", "tensor"]) -> int | None:
        """The whole's number of the first element or row here, where all others follow it, on every rank; else None."""
        if unit == "tensor":
            return 0
        if self.numel > 1 << 32 or not (self.stretches if unit == "element" else self.row_stretches):
            return None
        if unit == "element":
            return self.offset
        return self.runs[0][0][0] if self.runs[0] else 0


@dataclass
class Item:
    """One parameter's share of a step. `param`, `state` and `policy_state` are changed in place."""

    param: Tensor
    grad: Tensor  # same shape; its dtype may differ from the parameter's
    state: dict[str, Tensor]
    address: int  # the parameter's index in the optimizer: the third coordinate of randomness
    policy_state: dict[str, Tensor] = field(default_factory=dict)  # "average" (0-d float32) for alignment
    shard: Shard | None = None  # what of a whole tensor `param` (and `grad`, and `state`) is; None: all of it


class ItemList(list[Item]):
    """Items that are handed in again in every step: the GPU path keeps its tables in `cache`.

    The list may change from step to step (gradients, state, even members); what is cached is checked against it.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        super().__init__(items)
        self.cache: dict[Any, Any] = {}


@dataclass(frozen=True)
class Draw:
    """Where the counter-based random numbers of this step come from."""

    seed: int
    step: int
    stochastic: bool = False  # round bfloat16 and float16 parameters stochastically, not to nearest
    # [seed, step] as int64 on the GPU, read there instead of the two above, so that replays of a CUDA graph go on
    clock: Tensor | None = field(default=None, compare=False)


@dataclass
class Sums:
    """What a tensor's step reports: 0-d float64 tensors on the tensor's device (numel: an int); no synchronisation."""

    numel: int
    selected: Tensor  # how many coordinates
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
    """The sums of many tensors as the rows of one float64 table, columns as in `SUM_NAMES`; cut up when looked at."""

    def __init__(self, values: Tensor, numels: Sequence[int]) -> None:
        self.values, self.numels = values, numels

    @overload
    def __getitem__(self, index: int) -> Sums: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sums]: ...

    def __getitem__(self, index: int | slice) -> Sums | list[Sums]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Sums(self.numels[index], *self.values[index].unbind())

    def __len__(self) -> int:
        return len(self.numels)

    def __iter__(self) -> Iterator[Sums]:
        return (self[i] for i in range(len(self)))
