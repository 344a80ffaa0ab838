"""The contract between a preconditioner and the wrapper: rotate the gradient before the base sees it.

A preconditioner knows nothing of policies, bases and parameter groups. It sees matrices: a parameter comes as a
float32 tensor [batch, rows, columns] (`matrix_view` says how; one plain matrix is a batch of 1), and all tensors of
one call have the same shape and device, so that they can be worked on together. What it has to remember of a parameter
is a dictionary of tensors, which lives in the wrapper: it is saved, loaded and moved with all other state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from selective.configured import Configured

State = dict[str, Tensor]  # what is remembered of one parameter, by name
Shape = tuple[int, int, int]  # batch, rows, columns
Side = Literal["rows", "columns"]  # which sides of a matrix a basis is of


class Carry(NamedTuple):
    """What a refresh did to the rotated space of one parameter: the linear maps from the old one to the new one.

    A first moment follows as m <- left @ m @ right; None is the identity. `left`: [batch, rows, rows], `right`: [batch,
    columns, columns], float32. A second moment follows by the squares of the same maps, v <- left² @ v @ right²
    (elementwise squares), so that it stays as large as its first moment asks for.

    `rows` [batch, rows] and `columns` [batch, columns] (int64), where one of them is given, take the place of the
    squares: they say which old row or column each new one was, and second moments are put in that order. They stay
    below first moments that are rotated by more than an order, and an Adam-like base that divides by them can diverge.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None


class Refreshed(NamedTuple):
    """What became of one matrix that is sharded: whether its basis is new, and which old column each new one was."""

    new: bool
    order: Tensor | None = None  # int64 [batch, n] of the rotated side; None: they stay where they are


class Preconditioner(Configured):
    """The head of the family. Frozen, keyword arguments only, to JSON and back by its `kind`, as policies are.

    The wrapper calls, in a step: `is_due`, `refresh` of those that are, `project_in` of gradients, `denoise` of those
    whose basis is new, then base and policy, `project_out` of the masked update, `observe`. Nothing is written on what
    is passed in but the tensors of `states`, in place.
    """

    _family: ClassVar[str] = "preconditioner"
    _registry: ClassVar[dict[str, type[Any]]] = {}

    def takes(self, shape: Shape) -> bool:
        """Whether matrices of this shape are rotated; others are left to the base as they are."""
        return True

    def init_state(self, like: Tensor) -> State:
        """What is remembered of a parameter that looks like this ([batch, rows, columns]); float32, counters int64.

        On the parameter's device. A counter that the host has to read may be on the CPU, 0-d.
        """
        return {}

    def is_due(self, steps: int, place: int, count: int) -> bool:
        """Whether the basis is refreshed in the step before which `steps` were taken.

        `steps` counts those in which this parameter had a gradient: one whose first gradient comes late starts at 0.
        `place`: the number of the parameter among the `count` rotated ones, to spread refreshes over steps.
        """
        return False

    def is_overdue(self, state: State, steps: int) -> bool:
        """Whether this parameter is refreshed out of its turn, because its turn has given it nothing.

        Looks at what the state keeps on the CPU only: it is asked in every step, of every parameter that is not due.
        """
        return False

    def stands_still(self, steps: int) -> bool:
        """Whether rotated parameters do not step at all now: they get no gradient, and nothing of the base moves.

        `steps` is counted as for `is_due`.
        """
        return False

    def observes(self) -> bool:
        """Whether `observe` reads the gradients. Where not, they are not looked through for NaN in every step."""
        return type(self).observe is not Preconditioner.observe

    def refreshes_from_gradients(self) -> bool:
        """Whether `refresh` reads the gradients. Where not, it gets zeros for them, and more parameters at a time."""
        return True

    def refresh_writes(self, name: str) -> bool:
        """Whether `refresh` may write this entry of a state. The others are not copied, to be put back."""
        return True

    def moves_moments(self) -> bool:
        """Whether a refresh may return a `Carry` with maps. Then a base is refused that keeps what can't follow."""
        mine, ours = type(self), Preconditioner
        return mine.refresh is not ours.refresh or mine.carries_from is not ours.carries_from

    def refresh(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Carry | None]:
        """New bases, from what was observed or from these gradients (not rotated); None where nothing changed."""
        return [None] * len(states)

    def observe(self, states: Sequence[State], grads: Sequence[Tensor]) -> None:
        """Take note of this step's gradients (not rotated), after the parameters have moved."""

    def project_in(self, states: Sequence[State], xs: Sequence[Tensor]) -> list[Tensor]:
        """Each x in its parameter's rotated space, P^T x Q: new tensors of the same shape.

        In float32, or in the bfloat16 or float16 that they have been rounded to.
        """
        raise NotImplementedError(f"{type(self).__name__} must define project_in")

    def carries_in(self) -> Literal["float32", "tf32"]:
        """In what precision float32 first moments are multiplied with the maps of a `Carry`, on devices that tell."""
        return "float32"

    def itemsize(self) -> int:
        """Bytes of an element of what `project_in` returns: how many are worked on at a time goes by it."""
        return 4

    def denoise(self, states: Sequence[State], rotated: Sequence[Tensor]) -> list[Tensor]:
        """Gradients that `project_in` has rotated (nothing else is handed in), without what is only rounding in them.

        Asked in the step of a refresh only, of the parameters that were refreshed: where a basis comes from the
        gradient itself, the rotated one is zero up to rounding in most places. These tensors, written in place, or
        others of the same shape and dtype.
        """
        return list(rotated)

    def project_out(self, states: Sequence[State], xs: Sequence[Tensor]) -> list[Tensor]:
        """Each x back in the parameter's own space, P x Q^T.

        x is float32, or of the dtype that `project_in` gave the gradient; so is what is returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must define project_out")

    # --- matrices of which each rank has some rows, or some columns ---

    def on_shards(self, shape: Shape, whole: frozenset[Side]) -> Preconditioner | str:
        """What makes the state of a matrix [1, rows, columns], of which only these sides are whole on each rank.

        That is this preconditioner with the side that it rotates spelled out. Or, in words, why such a matrix is left
        alone. Of a matrix that is taken, `project_in`, `project_out`, `denoise` and `observe` get each rank's part,
        which may be empty, and must not ask other ranks for anything. A refresh is `refresh_parts`, a sum over ranks,
        `refresh_from` on one of them, and `carries_from` on all.
        """
        return f"sharded, and {type(self).__name__} does not say how shards are rotated"

    def gathers(self, shape: Shape) -> bool:
        """Whether a sharded matrix [1, rows, columns] that `on_shards` leaves alone is rotated as a whole all the same.

        Then it is gathered wherever this preconditioner is called, in every step, and everything is as on one device,
        but that `denoise` gets each rank's part.
        """
        return False

    def is_part(self, name: str) -> bool:
        """Whether this entry of a sharded matrix's state is a part, and the sum over ranks the whole. Checkpoints have
        the whole."""
        return False

    def refresh_parts(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
        """What of each the ranks have to add up for a refresh: float32, of the same shape on all of them.

        `grads` are zeros where `refreshes_from_gradients` says that they are not read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define refresh_parts")

    def refresh_from(self, states: Sequence[State], sums: Sequence[Tensor]) -> list[Refreshed]:
        """New bases in the `states`, in place, from the sums. One rank does it; the others get what it has written."""
        raise NotImplementedError(f"{type(self).__name__} must define refresh_from")

    def carries_from(
        self, old: Sequence[State], new: Sequence[State], refreshed: Sequence[Refreshed]
    ) -> list[Carry | None]:
        """What `refresh` would have returned, from the states before and after; None where nothing is new."""
        raise NotImplementedError(f"{type(self).__name__} must define carries_from")

    def on_load(self, replaced: Preconditioner) -> str | None:
        """What to tell the user whose checkpoint brings this preconditioner in the place of `replaced`; None: nothing.

        A sentence without its subject ("has ...") that ends in what to write, `opt.preconditioner_groups[{number}]`.
        """
        return None

    def report(self, states: Sequence[State]) -> list[dict[str, Tensor]]:
        """What `statistics()` shows of each parameter: 0-d tensors on its device."""
        return [{} for _ in states]


def preconditioner_from(data: Any) -> Preconditioner | None:
    """A preconditioner as it is, or from a kind's name, a dict with a `kind` or JSON of one; None stays None."""
    return None if data is None else Preconditioner.from_data(data)
