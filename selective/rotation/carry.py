"""A refresh takes the base's moments along: first moments by the maps, second moments by the squares of the maps.

Note [moments of one space]: an Adam-like base divides a first moment m by the root of a second moment v. While both are
averages of the same gradients, |m| <= c √v in each coordinate; c follows from the decay rates (`FusedRule.bound`). A
new basis takes the first moment along exactly, m' = L m R, and the second by the squares of these maps,
v' = (L∘L) v (R∘R): exact for the diagonal of a covariance that was diagonal before (SOAP's authors mention it; the
bounds are ours). Since L and R are orthogonal, v' >= 0, Σ v' = Σ v and Σ m'² <= c² Σ v'. In a single coordinate only
|m'| <= c √(N v') follows, with N coordinates that are mixed: m = √v everywhere, turned by a Hadamard matrix of 64 rows,
goes from 1 to 64. So a second moment is raised to m'²/c² where it is below: then |m'| <= c √v' holds in each
coordinate, and goes on holding in the steps that follow. No update is clipped for that.

Where c is not known it is the largest |m|/√v of the tensor before the refresh. There is no floor for a rule with
β₁² >= β₂, which has no bound without a rotation either, and none for factored second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.measure_moments import Moments
from selective.base.state_entries import dequantized
from selective.kernels import spec
from selective.preconditioner import Carry, Shape, as_matrix
from selective.preconditioner.linalg import Precision, identity_like, in_order, in_precision, per_matrix
from selective.rotation.basis import Carried
from selective.rotation.contract import exact_products
from selective.rotation.moments import Entry, entries_of

Change = Callable[[Tensor], Tensor]  # of float32 [batch, rows, columns]
Around = Callable[[Change], Change]
MOST_RAISES = 64  # each by 16: from the smallest float32 to the largest and back


def as_it_is(change: Change) -> Change:
    return change


class MomentCarrier:
    """Carries the moments of a group's parameters. `bound`: c where the base's rule has one."""

    def __init__(
        self, base: Optimizer, moments: Moments, bound: spec.Scalar | None, has_rule: bool, precision: Precision
    ) -> None:
        self.base, self.moments, self.bound, self.measures = base, moments, bound, not has_rule
        self.precision: Precision = precision

    def carry(
        self, param: Tensor, shape: Shape, carried: Carried, own: Sequence[Tensor] = (), around: Around = as_it_is
    ) -> None:
        """All moments of one parameter into its new basis; `own`: first moments that are not the base's.

        `around` makes a change of a whole matrix one of the part that is here, of a matrix that is gathered.
        """
        maps, valid = carried.maps, carried.valid
        entries = entries_of(self.base, param, self.moments, shape)
        firsts = [entry for entry in entries if entry.name in self.moments.first and entry.shape == shape]
        others = [entry for entry in entries if entry not in firsts]
        divided = [entry for entry in firsts if entry.name in self.moments.of_gradient]
        bounds = [self._bounds(entry, divided) if _squares(maps) else [] for entry in others]
        if maps.left is not None or maps.right is not None:
            for tensor in (*(entry.tensor for entry in firsts), *own):
                rewrite(tensor, shape, around(first_by(maps, self.precision)), valid, self.precision)
        for entry, limits in zip(others, bounds, strict=True):
            self._carry_second(entry, maps, valid, limits, around)

    def _bounds(self, entry: Entry, divided: Sequence[Entry]) -> list[tuple[Entry, spec.Scalar]]:
        """The first moments that this entry divides, and the most that each may be of it."""
        squared = entry.name not in self.moments.norms
        if not self.measures:
            return [] if self.bound is None else [(m, self.bound) for m in divided if m.shape == entry.shape]
        return [(m, _largest_ratio(m, entry, squared)) for m in divided if m.shape == entry.shape]

    def _carry_second(
        self, entry: Entry, maps: Carry, valid: Tensor | None, limits: list[tuple[Entry, spec.Scalar]], around: Around
    ) -> None:
        change = second_by(maps, self.precision, squared=entry.name not in self.moments.norms)
        if change is None:
            return
        linear = around(change)
        squared = entry.name not in self.moments.norms
        floors = [_floor(m, bound, squared) for m, bound in limits]

        def raised(x: Tensor) -> Tensor:
            y = linear(x)
            for floor in floors:
                y = torch.maximum(y, floor.to(y.dtype))
            return y

        rewrite(entry.tensor, entry.shape, raised, valid, self.precision)
        if floors:
            keep_above_zero(entry, torch.stack(floors).amax(0), valid)


def _squares(maps: Carry) -> bool:
    """Whether second moments follow by the squares of the maps, and not in another order."""
    return maps.rows is None and maps.columns is None


def first_by(maps: Carry, precision: Precision) -> Change:
    """x <- left x right."""
    return _linear(maps.left, maps.right, precision)


def second_by(maps: Carry, precision: Precision, *, squared: bool = True) -> Change | None:
    """x <- (left∘left) x (right∘right), or in another order where the maps have one; None where x stays.

    A factor has no columns, or no rows, to be mapped: a side of length 1 is left out. `squared` False: of the roots.
    """
    if not _squares(maps):
        return _ordered(maps)
    if maps.left is None and maps.right is None:
        return None
    left, right = (None if side is None else side.square() for side in (maps.left, maps.right))

    def change(x: Tensor) -> Tensor:
        mine = left if x.shape[1] > 1 else None, right if x.shape[2] > 1 else None
        linear = _linear(*mine, precision)
        if squared:
            return linear(x)
        size = per_matrix(x.abs().amax((1, 2)).clamp(min=torch.finfo(x.dtype).tiny))  # the square keeps its range
        y = linear((x / size).square()).sqrt() * size
        return torch.where(per_matrix(_stays(mine, x)), x, y)

    return change


def _ordered(maps: Carry) -> Change:
    def change(x: Tensor) -> Tensor:
        y = x
        if maps.rows is not None and x.shape[1] > 1:
            y = in_order(y, maps.rows, 1)
        if maps.columns is not None and x.shape[2] > 1:
            y = in_order(y, maps.columns)
        return y

    return change


def _linear(left: Tensor | None, right: Tensor | None, precision: Precision) -> Change:
    def change(x: Tensor) -> Tensor:
        y = x if left is None else left @ x
        y = y if right is None else y @ right
        if y is x or precision == "float32" or len(x) == 1:
            return y
        return torch.where(per_matrix(_stays((left, right), x)), x, y)  # the identity, too, would round it in TF32

    return change


def _stays(maps: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """Which matrices [batch] these maps leave alone."""
    same = [(side == identity_like(side)).flatten(1).all(1) for side in maps if side is not None]
    return torch.stack(same).all(0) if same else torch.ones(len(x), dtype=torch.bool, device=x.device)


def _largest_ratio(first: Entry, second: Entry, squared: bool) -> Tensor:
    """The largest |m|/√v (of a norm: |m|/n) of one tensor where both are positive and finite; 0-d, 0 where none is."""
    m, v = (as_matrix(dequantized(entry.tensor), entry.shape) for entry in (first, second))
    ratio = m.abs() / (v.sqrt() if squared else v)
    return torch.where(ratio.isfinite(), ratio, 0.0).max() if ratio.numel() else ratio.new_zeros(())


def _floor(first: Entry, bound: spec.Scalar, squared: bool) -> Tensor:
    """m²/c² (of a norm: |m|/c), which a second moment may not be below; 0 where there is no c, or no m.

    At least the smallest normal number: the square of a smaller m is 0 in float32, and m is not.
    """
    ratio = as_matrix(dequantized(first.tensor), first.shape).abs() / bound
    if isinstance(bound, Tensor):
        ratio = torch.where(bound > 0, ratio, 0.0)
    floor = (ratio.square() if squared else ratio).clamp(min=torch.finfo(ratio.dtype).tiny)
    return torch.where(ratio == 0, 0.0, floor)


def rewrite(
    moment: Tensor, shape: Shape, change: Change, valid: Tensor | None = None, precision: Precision = "float32"
) -> None:
    """moment <- change(moment), where `change` gets and returns float32 [batch, rows, columns]; rounded once.

    Nothing where `valid` (0-d bool) says no. `precision`: of the products that `change` makes.
    """
    plain = dequantized(moment)
    before = as_matrix(plain, shape)
    with exact_products(moment.device), in_precision(precision):
        changed = change(before)
    if valid is None:
        moment.copy_(changed.reshape(moment.shape).to(plain.dtype))
    elif plain is moment and before.data_ptr() == moment.data_ptr() and before.dtype == moment.dtype:
        torch.where(valid, changed, before, out=before)  # `before` is a view of the moment
    else:
        changed = torch.where(valid, changed, before)
        moment.copy_(changed.reshape(moment.shape).to(plain.dtype))


def keep_above_zero(entry: Entry, floor: Tensor, valid: Tensor | None = None) -> None:
    """Where rounding made 0 of a second moment with a floor above 0: the smallest number that is stored as another.

    bfloat16 and float32 hold any number that matters. float16 has its smallest one at 6e-8, which is that of a moment
    of 2.4e-4. Eight bits have a smallest one for each block, which nobody tells: what is written is raised until it is
    not 0 when it is read (which waits for the device).
    """
    tensor = entry.tensor
    wanted = floor > 0 if valid is None else (floor > 0) & valid
    if dequantized(tensor) is tensor:
        if tensor.dtype == torch.float16:
            smallest = torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps
            low = (as_matrix(tensor, entry.shape) == 0) & wanted
            tensor.masked_fill_(low.reshape(tensor.shape), smallest)
        return
    for _ in range(MOST_RAISES):
        stored = as_matrix(dequantized(tensor), entry.shape)
        low = (stored == 0) & wanted
        if not bool(low.any()):
            return
        floor = floor * 16
        tensor.copy_(torch.where(low, floor, stored).reshape(tensor.shape).to(dequantized(tensor).dtype))


def enter(base: Optimizer, param: Tensor, moments: Moments, shape: Shape, project: Change) -> None:
    """The moments that a base has collected in the parameter's own space into the one that `project` leads to.

    The space of a transform that somebody wrote, which may be another one from the first step on; that of our own
    begins as the parameter's, and moves nothing here. The squares of the maps are not known, so that the squares of
    `project` of √v with random signs are averaged, which is what they give on average. Floors as in a refresh.
    """
    entries = entries_of(base, param, moments, shape)
    whole = [entry for entry in entries if entry.shape == shape]
    firsts = [entry for entry in whole if entry.name in moments.first]
    divided = [entry for entry in firsts if entry.name in moments.of_gradient]
    seconds = [entry for entry in whole if entry not in firsts]
    limits = [[(m, _largest_ratio(m, e, e.name not in moments.norms)) for m in divided] for e in seconds]
    for entry in firsts:
        rewrite(entry.tensor, shape, project)
    for entry, bounds in zip(seconds, limits, strict=True):
        squared = entry.name not in moments.norms
        floors = [_floor(m, bound, squared) for m, bound in bounds]
        rewrite(entry.tensor, shape, _estimated(project, floors, squared))
        if floors:
            keep_above_zero(entry, torch.stack(floors).amax(0))


DRAWS = 16  # of signs: what is estimated is right within 35 %, as 16 squares of normal numbers average
ROUNDED = 2**-7  # an identity whose products are in bfloat16 changes no number by more


def _estimated(project: Change, floors: Sequence[Tensor], squared: bool) -> Change:
    def change(x: Tensor) -> Tensor:
        root = x.clamp(min=0).sqrt() if squared else x
        generator = torch.Generator(device="cpu").manual_seed(0)
        total, moved = torch.zeros_like(x), torch.zeros((), dtype=torch.bool, device=x.device)
        for _ in range(DRAWS):
            signs = 2 * torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int64, device="cpu") - 1
            signed = root * signs.to(x.device, x.dtype)
            projected = project(signed)
            moved = moved | ((projected - signed).abs() > ROUNDED * signed.abs()).any()
            total += projected.square()
        mean = total / DRAWS
        for floor in floors:
            mean = torch.maximum(mean, floor if squared else floor.square())
        return torch.where(moved, mean if squared else mean.sqrt(), x)

    return change
