"""The refresh of stacked bases: of all parameters of one shape that are due together, and of several such shapes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from selective.preconditioner import Eigenbasis
from selective.preconditioner.linalg import REFRESHED
from selective.preconditioner.refresh_stacks import Due, Renewed, refresh_stacks, starts_alike
from selective.rotation.basis import CarriedTogether, Matrices
from selective.rotation.stacks import Bucket


def all_due(options: Eigenbasis, buckets: Sequence[Bucket], due: Collection[int]) -> list[Bucket]:
    """Return the buckets of which every parameter is due, and none for the first time while others are not."""
    return [b for b in buckets if all(i in due for i in b.indices) and starts_alike(options, b.state)]


def in_parts(options: Eigenbasis, buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
    """Divide buckets into lists whose matrices are refreshed together: `REFRESHED` elements, or one bucket."""
    part: list[Bucket] = []
    count = 0
    for bucket in buckets:
        batch, *sides = bucket.shape
        numel = len(bucket.indices) * batch * sum(side**2 for side in sides)
        if options.refreshes_from_gradients():
            numel += len(bucket.indices) * math.prod(bucket.shape)
        if part and count + numel > REFRESHED:
            yield part
            part, count = [], 0
        part.append(bucket)
        count += numel
    if part:
        yield part


def refresh_together(
    options: Eigenbasis, buckets: Sequence[Bucket], finite: Mapping[int, Tensor], matrices: Matrices
) -> Iterator[CarriedTogether]:
    """Refresh the bases of whole buckets, and yield what has to be carried once all of them are written.

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
