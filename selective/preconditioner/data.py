"""The data that preconditioners and the wrapper hand each other: states, shapes, and the results of a refresh."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

State = dict[str, Tensor]  # a preconditioner's state of one parameter, by name
Shape = tuple[int, int, int]  # batch, rows, columns
Side = Literal["rows", "columns"]  # a side of a matrix: the one that a basis rotates


class Carry(NamedTuple):
    """The linear maps from the old rotated space of one parameter to the new one, which a refresh returns.

    `left` [batch, rows, rows] and `right` [batch, columns, columns] are float32; None is the identity. The wrapper
    carries a first moment by m <- left @ m @ right, and a second moment by the elementwise squares of these maps,
    v <- left² @ v @ right². So a second moment does not become too small for its first moment.

    If `rows` [batch, rows] or `columns` [batch, columns] is given (int64), second moments are permuted instead: the
    numbers are the old row or column at each new place. This is SOAP's way (arXiv 2409.11321). First moments are still
    rotated, so that a second moment may become too small for its first moment, and an Adam-like base can diverge.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None


class Refreshed(NamedTuple):
    """The result of refreshing one sharded matrix: True in `new` if its basis is new, and the order of its columns.

    `order` has the old place of each new column, int64 [batch, n], where n is the length of the rotated side.
    """

    new: bool
    order: Tensor | None = None  # None: all columns stay at their places


class LargeSide(NamedTuple):
    """A side of a matrix whose basis would be too large, or is: its length, the bytes of its state, and the reason.

    `Soap().left_out((1, 8, 4096))` is `[LargeSide("columns", 4096, 134_217_728, "max_state_ratio=32")]`.
    """

    side: Side
    length: int
    bytes: int  # of the basis, and of the running average if there is one
    why: str  # the limit by which it is left out ("max_state_ratio=32"), or its size ("1,024 times its matrix")
