"""The step of an `Eigenbasis` on stacks: products and averages of all matrices of one shape, in memory that is given.

It computes what `Eigenbasis.project_in`, `project_out`, `denoise` and `observe` compute, without lists of tensors. A
state holds stacks here: `rows_basis` is [count * batch, m, m] for `count` parameters whose matrices are [batch, m, n].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from selective.kernels import average_grams_
from selective.kernels.lasting import lasting
from selective.preconditioner import shards
from selective.preconditioner.base import Preconditioner, Shape, State
from selective.preconditioner.eigenbasis import Eigenbasis
from selective.preconditioner.linalg import float32_products, in_precision, per_matrix
from selective.preconditioner.matrices import lies_in_order

USUAL = 3 * 2**20
"""Elements of a matrix, on average over a group, up to which the group is stepped in stacks: 12 MiB. The time for
larger ones is not that of launches, and the copies into stacks would add to it: 16 bytes an element in a step."""

USUAL_ON_RANKS = 2**23
"""The same for DTensors, 32 MiB of a rank's parts: matrix by matrix, each takes the host longer. With 7.1M elements on
average, a step of 1.1B parameters took 114 ms in stacks, and 147 matrix by matrix (FSDP2, one H200)."""

LARGEST = 2**26
"""Elements of the largest matrix that is part of a stack, 256 MiB. An embedding among the matrices of a small model
does not keep the others from their stacks."""


def steps_in_stacks(preconditioner: Preconditioner) -> bool:
    """True if this module computes the step of this preconditioner: of our classes, in float32 or TF32."""
    ours = type(preconditioner).__module__.startswith("selective.")
    return ours and isinstance(preconditioner, Eigenbasis) and preconditioner.precision != "bfloat16"


def fits_in_stacks(size: torch.Size, shape: Shape) -> bool:
    """True if a contiguous tensor of this size, read as matrices of `shape`, is part of a stack without a copy."""
    return math.prod(shape) <= LARGEST and lies_in_order(size, shape)


def most_on_average(on_ranks: bool) -> int:
    """Return the elements of a matrix, on average, up to which a step in stacks is faster; `on_ranks`: of DTensors."""
    return USUAL_ON_RANKS if on_ranks else USUAL


class Product(NamedTuple):
    """The factors of a product of matrices, and the tensor for its result."""

    first: Tensor
    second: Tensor
    target: Tensor


@dataclass(eq=False)
class Part:
    """The matrices of `count` parameters in a step, [count * batch, m, n] each, and the stacks of their state.

    It is kept from step to step. So its state has the same stacks in all of them.
    """

    count: int
    state: State
    given: Tensor  # what is rotated
    halfway: Tensor  # one product later, where there are two; else any tensor
    result: Tensor

    @cached_property
    def products_in(self) -> list[Product]:
        """The products of PᵀXQ in their order."""
        return self._products(into=True)

    @cached_property
    def products_out(self) -> list[Product]:
        """The products of P X Qᵀ in their order."""
        return self._products(into=False)

    def _products(self, *, into: bool) -> list[Product]:
        products, x, sides = [], self.given, shards.side_of(self.state)
        with lasting():
            for side in sides:
                basis = self.state[f"{side}_basis"]
                basis = basis.mT if into is (side == "rows") else basis
                target = self.result if side == sides[-1] else self.halfway
                products.append(Product(basis, x, target) if side == "rows" else Product(x, basis, target))
                x = target
        return products


def has_two_sides(state: State) -> bool:
    """True if stacks have bases of both sides."""
    return len(shards.side_of(state)) == 2


class StackedEigenbasis:
    """The operations of one `Eigenbasis` on stacks."""

    def __init__(self, options: Eigenbasis) -> None:
        self.options = options

    def project(self, parts: Sequence[Part], *, into: bool) -> None:
        """Write PᵀXQ of each part's `given` X to its `result` (`into`), or P X Qᵀ. A side without a basis is left out.

        Read and written are X, the bases and the result, and what is halfway twice if there are two sides.
        """
        with in_precision(self.options.precision):
            for part in parts:
                for first, second, target in part.products_in if into else part.products_out:
                    torch.bmm(first, second, out=target)

    def denoise(self, parts: Sequence[Part]) -> None:
        """Set elements of the rotated gradients in `result` to 0 that are rounding noise, in place.

        `noise` is 0 for bases that are not new.
        """
        for part in parts:
            if self.options.floor and "noise" in part.state:
                part.result.masked_fill_(part.result.abs() < per_matrix(part.state["noise"]), 0)

    def forget_noise(self, states: Sequence[State]) -> None:
        """Set the noise of all states to 0, after a step."""
        for state in states:
            if "noise" in state:
                state["noise"].zero_()

    def average(self, averaging: Averaging, parts: Sequence[Part]) -> None:
        """Update A ← β A + (1 − β) GGᵀ for each side, in place; G is the `given` of each part, which may be written to.

        A gradient that is not finite counts as zeros, and is counted. One that is so large that GGᵀ could overflow
        changes nothing, and its matrices are counted as skipped: elements above 1e17 for a side of 1,024.
        """
        flags = averaging.look_at(parts, self.options.beta)
        with float32_products():
            for part, factors, left_out in zip(parts, flags.factors, flags.left_out, strict=True):
                average_grams_(
                    part.state.get("rows_gram"), part.state.get("columns_gram"), part.given,
                    factors=factors, left_out=left_out, weight=1 - self.options.beta,
                )  # fmt: skip


class Flags(NamedTuple):
    """By part, for each matrix [count * batch]: True if its gradient is left out, and the factor of its averages.

    On a CPU they are None and one number where no gradient is left out.
    """

    left_out: Sequence[Tensor | None]
    factors: Sequence[Tensor | float]


class Averaging:
    """Finds out which gradients can enter the averages, and counts the others. On a GPU all of it stays there.

    `shapes` are those of the matrices of all parameters, in the order of the parts: of sharded ones the wholes, whose
    averages the ranks add up. `not_finite` counts gradients, and `skipped` matrices: int64 [parameters], in that order.
    """

    def __init__(self, shapes: Sequence[Shape], device: torch.device, not_finite: Tensor, skipped: Tensor) -> None:
        most = torch.finfo(torch.float32).max
        runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]  # made on the device: nobody waits for it
        self.limits = torch.cat(
            [
                torch.full((count,), math.sqrt(most / max(rows, columns)) / 2, dtype=torch.float32, device=device)
                for (_, rows, columns), count in runs
            ]
        )
        batches = [torch.full((count,), batch, dtype=torch.int64, device=device) for (batch, _, _), count in runs]
        self.batches = None if all(batch == 1 for batch, _, _ in shapes) else torch.cat(batches)
        self.not_finite, self.skipped = not_finite, skipped

    def look_at(self, parts: Sequence[Part], beta: float) -> Flags:
        """Count gradients that are not finite or too large, and say what to do with the matrices of each part."""
        if self.limits.device.type == "cpu" and self._all_fit(parts):  # the usual case; for a GPU the host would wait
            return Flags([None] * len(parts), [beta] * len(parts))
        largest = torch.empty_like(self.limits)
        for part, numbers in zip(parts, _split(largest, parts), strict=True):
            if not part.given.numel():  # a shard may be empty
                numbers.zero_()
                continue
            # NaN if there is one
            torch.linalg.vector_norm(part.given.view(part.count, -1), float("inf"), 1, out=numbers)
        fits, finite = largest < self.limits, largest < float("inf")
        too_large = finite.logical_xor(fits)
        self.not_finite.add_(finite.logical_not())
        self.skipped.add_(too_large if self.batches is None else too_large * self.batches)
        left_out, factors = fits.logical_not(), torch.full_like(largest, beta).masked_fill_(too_large, 1.0)
        return Flags(_by_matrix(left_out, parts), _by_matrix(factors, parts))

    def _all_fit(self, parts: Sequence[Part]) -> bool:
        """True if all elements of all parts are within the limits, and none is NaN. It waits for the device."""
        start = 0
        for part in parts:
            limit = float(self.limits[start])  # that of all matrices of one shape
            start += part.count
            if part.given.numel():  # a shard may be empty
                smallest, largest = map(float, torch.aminmax(part.given))
                if not (-limit < smallest and largest < limit):
                    return False
        return True


def _split(numbers: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Divide numbers [parameters] among the parts."""
    return list(numbers.split([part.count for part in parts]))


def _by_matrix(numbers: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Divide numbers [parameters] among the parts, as [count * batch]."""
    repeated = []
    for part, own in zip(parts, _split(numbers, parts), strict=True):
        batch = len(part.given) // part.count
        repeated.append(own if batch == 1 else own.repeat_interleave(batch, output_size=len(part.given)))
    return repeated
