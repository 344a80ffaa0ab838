"""The refresh of stacked bases: all that are due in a step are refreshed together, whatever their shapes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from selective.preconditioner import Eigenbasis
from selective.preconditioner.refresh import solver_for
from selective.preconditioner.refresh_stacks import Due, Renewed, refresh_stacks
from selective.rotation.basis import CarriedTogether, Matrices
from selective.rotation.stacks import Bucket


def due_runs(options: Eigenbasis, buckets: Sequence[Bucket], due: Collection[int]) -> list[Bucket]:
    """Return the parameters that are due, as parts of stacks: those that lie one after the other.

    One that is due for the first time is of another part than the others, because another solver makes its basis.
    """
    runs = []
    for bucket in buckets:
        solvers = [None] * len(bucket.indices)
        if any(i in due for i in bucket.indices):
            solvers = [solver_for(options.solver, count) for count in bucket.state["refreshes"].tolist()]
        kinds = [solver if i in due else None for i, solver in zip(bucket.indices, solvers, strict=True)]
        first = 0
        for kind, members in groupby(kinds):
            stop = first + len(list(members))
            if kind is not None:
                runs.append(bucket.run(first, stop))
            first = stop
    return runs


def in_parts(options: Eigenbasis, buckets: Sequence[Bucket], limit: int) -> Iterator[list[Bucket]]:
    """Divide buckets into lists whose matrices are refreshed together: `limit` elements at most, or one bucket."""
    part: list[Bucket] = []
    count = 0
    for bucket in buckets:
        batch, *sides = bucket.shape
        numel = len(bucket.indices) * batch * sum(side**2 for side in sides)
        if options.refreshes_from_gradients():
            numel += len(bucket.indices) * math.prod(bucket.shape)
        if part and count + numel > limit:
            yield part
            part, count = [], 0
        part.append(bucket)
        count += numel
    if part:
        yield part


def refresh_together(
    options: Eigenbasis, buckets: Sequence[Bucket], finite: Mapping[int, Tensor], matrices: Matrices
) -> Iterator[CarriedTogether]:
    """Refresh the bases of these buckets, and yield what has to be carried once all of them are written.

    `finite` is 0-d bool for each parameter: False if its gradient is not finite, which changes nothing of its basis.
    """
    dues = [_due(options, bucket, finite, matrices) for bucket in buckets]
    renewed: list[Renewed | None] = refresh_stacks(options, dues)
    for bucket, new in zip(buckets, renewed, strict=True):
        if new is not None:
            yield CarriedTogether(bucket.indices, new.maps, new.valid)


def _due(options: Eigenbasis, bucket: Bucket, finite: Mapping[int, Tensor], matrices: Matrices) -> Due:
    (batch, rows, columns), count = bucket.shape, len(bucket.indices)
    is_finite = torch.stack([finite[i] for i in bucket.indices])
    if not options.refreshes_from_gradients():
        unread = torch.zeros((), dtype=torch.float32, device=is_finite.device)
        return Due(count, bucket.state, unread.expand(count * batch, rows, columns), is_finite)
    grads = torch.stack(matrices(bucket.indices)).masked_fill_(~is_finite[:, None, None, None], 0.0)
    return Due(count, bucket.state, grads.view(count * batch, rows, columns), is_finite)
