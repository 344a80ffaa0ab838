"""Carrying the base's moments into a new basis: first moments by the maps, second moments by their squares.

Note [moments of one space]: an Adam-like base divides a first moment m by the root of a second moment v. While both are
averages of the same gradients, |m| <= c √v in each coordinate; c follows from the decay rates (`FusedRule.bound`). The
first moment is carried exactly into a new basis, m' = L m R. The second is carried by the squares of these maps,
v' = (L∘L) v (R∘R), which is exact for the diagonal of a covariance that was diagonal before. (SOAP's authors mention
this; the bounds are ours.) Since L and R are orthogonal, v' >= 0, Σ v' = Σ v and Σ m'² <= c² Σ v'. For a single
coordinate only |m'| <= c √(N v') follows, where N is the number of coordinates that are mixed: if m = √v everywhere, a
rotation by a Hadamard matrix of 64 rows takes the ratio from 1 to 64. So a second moment below m'²/c² is raised to it.
Then |m'| <= c √v' holds in each coordinate, also after the steps that follow. No update is clipped for that.

If c is not known, the largest |m|/√v of the tensor before the refresh is used. There is no floor for a rule with
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
from selective.preconditioner.matrices import from_matrices
from selective.rotation.basis import Carried
from selective.rotation.contract import exact_products
from selective.rotation.moments import Entry, entries_of
from selective.rotation.noise import clear_noise_

Change = Callable[[Tensor], Tensor]  # takes and returns float32 [batch, rows, columns]
Around = Callable[[Change], Change]  # adapts a change of whole matrices to this rank's parts
MOST_RAISES = 64  # times a floor is multiplied by 16: enough for the whole range of float32, twice


def as_it_is(change: Change) -> Change:
    """Return `change`, for matrices that are not gathered."""
    return change


class MomentCarrier:
    """Carries the moments of a group's parameters.

    `bound` is the c of the base's fused rule; None if it has none. Without a fused rule (`has_rule`), c is measured.
    """

    def __init__(
        self, base: Optimizer, moments: Moments, bound: spec.Scalar | None, has_rule: bool, precision: Precision
    ) -> None:
        self.base, self.moments, self.bound, self.measures = base, moments, bound, not has_rule
        self.precision: Precision = precision

    def carry(
        self,
        param: Tensor,
        shape: Shape,
        carried: Carried,
        own_momenta: Sequence[Tensor] = (),
        around: Around = as_it_is,
    ) -> None:
        """Carry all moments of one parameter into its new basis, and `own_momenta`, which are the wrapper's.

        `around` turns a change of whole matrices into one of this rank's part, if the matrix is gathered.
        """
        entries = entries_of(self.base, param, self.moments, shape)
        self.carry_entries(entries, own_momenta, shape, carried.maps, carried.valid, around)

    def carry_entries(
        self,
        entries: Sequence[Entry],
        own_momenta: Sequence[Tensor],
        shape: Shape,
        maps: Carry,
        valid: Tensor | None,
        around: Around = as_it_is,
        *,
        some_stay: bool = True,
    ) -> None:
        """Carry these entries. `valid` is 0-d bool, or [batch, 1, 1]; where it is False, a moment stays as it is.

        `some_stay` is False if no matrix with a valid map has the identity for one.
        """
        looks = self.precision if some_stay else "float32"  # only of the search for identities
        firsts = [entry for entry in entries if entry.name in self.moments.first and entry.shape == shape]
        others = [entry for entry in entries if entry not in firsts]
        divided = [entry for entry in firsts if entry.name in self.moments.of_gradient]
        bounds = [self._bounds(entry, divided) if _squares(maps) else [] for entry in others]
        if maps.left is not None or maps.right is not None:
            change = first_moment_map(maps, looks)
            change = without_noise(change) if self.moments.full_steps else change
            for tensor in (*(entry.tensor for entry in firsts), *own_momenta):
                rewrite(tensor, shape, around(change), valid, self.precision)
        for entry, limits in zip(others, bounds, strict=True):
            self._carry_second(entry, maps, valid, limits, around, looks)

    def _bounds(self, entry: Entry, divided: Sequence[Entry]) -> list[tuple[Entry, spec.Scalar]]:
        """Return the first moments that are divided by the root of `entry`, each with the bound c on the ratio."""
        if not self.measures:
            return [] if self.bound is None else [(m, self.bound) for m in divided if m.shape == entry.shape]
        return [(m, _largest_ratio(m, entry)) for m in divided if m.shape == entry.shape]

    def _carry_second(
        self,
        entry: Entry,
        maps: Carry,
        valid: Tensor | None,
        limits: list[tuple[Entry, spec.Scalar]],
        around: Around,
        looks: Precision,
    ) -> None:
        """Carry one second moment or norm, and raise it to the floors that follow from `limits`."""
        change = second_moment_map(maps, looks, squared=not entry.is_norm)
        if change is None:
            return
        linear = around(change)
        floors = [_floor(m, bound, entry) for m, bound in limits]

        def raised(x: Tensor) -> Tensor:
            y = linear(x)
            for floor in floors:
                y = torch.maximum(y, floor.to(y.dtype))
            return y

        rewrite(entry.tensor, entry.shape, raised, valid, self.precision)
        if floors:
            keep_above_zero(entry, floors, valid)


def _squares(maps: Carry) -> bool:
    """True if second moments are carried by the squares of the maps, and not by a permutation."""
    return maps.rows is None and maps.columns is None


def first_moment_map(maps: Carry, precision: Precision) -> Change:
    """Return the change x -> left x right."""
    return _linear(maps.left, maps.right, precision)


def without_noise(change: Change) -> Change:
    """Return `change`, with zeros in the place of rounding noise in its results: Note [signs of noise]."""

    def changed(x: Tensor) -> Tensor:
        y = change(x)
        y = y.clone() if y is x else y
        clear_noise_(y)
        return y

    return changed


def second_moment_map(maps: Carry, precision: Precision, *, squared: bool = True) -> Change | None:
    """Return the change x -> (left∘left) x (right∘right), or the permutation of `maps` if they have one.

    None if x stays as it is. A side of length 1 is not mapped: it is that of a factored statistic. With
    `squared=False`, x holds roots: they are squared, carried, and the root is taken again.
    """
    if not _squares(maps):
        return _ordered(maps)
    if maps.left is None and maps.right is None:
        return None
    left, right = (None if side is None else side.square() for side in (maps.left, maps.right))

    def change(x: Tensor) -> Tensor:
        sides = left if x.shape[1] > 1 else None, right if x.shape[2] > 1 else None
        linear = _linear(*sides, precision)
        if squared:
            return linear(x)
        size = per_matrix(x.abs().amax((1, 2)).clamp(min=torch.finfo(x.dtype).tiny))  # avoids overflow of the squares
        y = linear((x / size).square()).sqrt() * size
        return torch.where(per_matrix(_is_identity(sides, x)), x, y)

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
        return torch.where(per_matrix(_is_identity((left, right), x)), x, y)  # in TF32 even the identity would round x

    return change


def _is_identity(maps: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """Return bool [batch]: True where all maps are the identity."""
    same = [(side == identity_like(side)).flatten(1).all(1) for side in maps if side is not None]
    return torch.stack(same).all(0) if same else torch.ones(len(x), dtype=torch.bool, device=x.device)


def _largest_ratio(first: Entry, second: Entry) -> Tensor:
    """Return the largest finite |m|/√v (for a norm n: |m|/n) of one tensor, 0-d; 0 if there is none."""
    m, v = (as_matrix(dequantized(entry.tensor), entry.shape) for entry in (first, second))
    ratio = m.abs() / (v if second.is_norm else v.sqrt())
    return torch.where(ratio.isfinite(), ratio, 0.0).max() if ratio.numel() else ratio.new_zeros(())


def _floor(first: Entry, bound: spec.Scalar, second: Entry) -> Tensor:
    """Return the lower bound of a second moment, m²/c² (for a norm: |m|/c); 0 if c or m is 0.

    It is at least the smallest normal number, because in float32 the square of a tiny m is 0.
    """
    ratio = as_matrix(dequantized(first.tensor), first.shape).abs() / bound
    if isinstance(bound, Tensor):
        ratio = torch.where(bound > 0, ratio, 0.0)
    floor = (ratio if second.is_norm else ratio.square()).clamp(min=torch.finfo(ratio.dtype).tiny)
    return floor.masked_fill_(ratio == 0, 0.0)


def rewrite(
    moment: Tensor, shape: Shape, change: Change, valid: Tensor | None = None, precision: Precision = "float32"
) -> None:
    """Replace `moment` by `change(moment)` in place. `change` takes and returns float32 [batch, rows, columns].

    The result is rounded once. The moment stays as it is where `valid` (bool, 0-d or [batch, 1, 1]) is False.
    `precision` is that of the products in `change`.
    """
    plain = dequantized(moment)
    before = as_matrix(plain, shape)
    with exact_products(moment.device), in_precision(precision):
        changed = change(before)
    if valid is None:
        moment.copy_(from_matrices(changed, moment.shape).to(plain.dtype))
    elif plain is moment and before.data_ptr() == moment.data_ptr() and before.dtype == moment.dtype:
        torch.where(valid, changed, before, out=before)  # `before` is a view of the moment
    else:
        changed = torch.where(valid, changed, before)
        moment.copy_(from_matrices(changed, moment.shape).to(plain.dtype))


def keep_above_zero(entry: Entry, floors: Sequence[Tensor], valid: Tensor | None = None) -> None:
    """Raise elements of a second moment that were rounded to 0 though one of their floors is above 0.

    They become the smallest number that the storage does not round to 0. bfloat16 and float32 need nothing: their range
    is large enough. The smallest float16 is 6e-8, the square of 2.4e-4. Eight-bit storage has an unknown smallest
    number for each block, so the written value is raised until 0 is not read back, which waits for the device.
    """
    tensor = entry.tensor
    is_plain = dequantized(tensor) is tensor
    if is_plain and tensor.dtype != torch.float16:
        return
    floor = torch.stack(list(floors)).amax(0)
    wanted = floor > 0 if valid is None else (floor > 0) & valid
    if is_plain:
        smallest = torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps
        low = (as_matrix(tensor, entry.shape) == 0) & wanted
        tensor.masked_fill_(from_matrices(low, tensor.shape), smallest)
        return
    for _ in range(MOST_RAISES):
        stored = as_matrix(dequantized(tensor), entry.shape)
        low = (stored == 0) & wanted
        if not bool(low.any()):
            return
        floor = floor * 16
        raised = torch.where(low, floor, stored)
        tensor.copy_(from_matrices(raised, tensor.shape).to(dequantized(tensor).dtype))


def rotate_existing_moments(base: Optimizer, param: Tensor, moments: Moments, shape: Shape, project: Change) -> None:
    """Carry moments that a base has collected in the parameter's own space into the space of `project`.

    This matters for a user's preconditioner, whose space may differ from the parameter's before the first refresh. Ours
    begin with the identity, which changes nothing here. The maps are not known, and neither are their squares. So
    `project` is applied to √v with random signs, and the squares of the results are averaged; their expectation is v
    carried by the squared maps. The floors are those of a refresh.
    """
    entries = entries_of(base, param, moments, shape)
    whole = [entry for entry in entries if entry.shape == shape]
    firsts = [entry for entry in whole if entry.name in moments.first]
    divided = [entry for entry in firsts if entry.name in moments.of_gradient]
    seconds = [entry for entry in whole if entry not in firsts]
    limits = [[(m, _largest_ratio(m, entry)) for m in divided] for entry in seconds]
    for entry in firsts:
        rewrite(entry.tensor, shape, without_noise(project) if moments.full_steps else project)
    for entry, bounds in zip(seconds, limits, strict=True):
        floors = [_floor(m, bound, entry) for m, bound in bounds]
        rewrite(entry.tensor, shape, _estimated(project, floors, squared=not entry.is_norm))
        if floors:
            keep_above_zero(entry, floors)


DRAWS = 16  # draws of signs: the average of 16 squares of normal numbers has a relative error of 35 %
ROUNDED = 2**-7  # largest relative change of a number by an identity whose products are in bfloat16


def _estimated(project: Change, floors: Sequence[Tensor], *, squared: bool) -> Change:
    """Return the change that averages the squares of `project` of the root of x with random signs.

    With `squared=False`, x holds roots. x stays as it is if `project` is the identity except for rounding.
    """

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
