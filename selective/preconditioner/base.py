"""Preconditioner: the contract between the wrapper and a class that rotates gradients before the base steps.

A preconditioner knows nothing of policies, base optimizers and parameter groups. It gets a parameter as a float32
tensor [batch, rows, columns]. `matrix_view` says how the parameter is read like that; a plain matrix is a batch of 1.
All tensors of one call have the same shape and device, so that they can be stacked. The state of a parameter is a
dictionary of tensors. The wrapper keeps it, and saves, loads and moves it with all other state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from selective.configured import Configured
from selective.preconditioner.data import Carry, LargeSide, Refreshed, Shape, Side, State


class Preconditioner(Configured):
    """The base class of preconditioners.

    An instance is frozen, takes keyword arguments only, and can be turned into JSON and back by its `kind`, as policies
    can. In a step the wrapper calls `is_due`, `refresh` for parameters that are due, `project_in` for gradients,
    `denoise` for gradients whose basis is new, then the base and the policy, `project_out` for the masked update, and
    `observe`. A method may write into the tensors of `states`, in place, and into the gradients that `denoise` gets,
    but into no other argument.

    Arguments have these shapes: `states` is a list of states, `grads` and `xs` are lists of as many float32 tensors
    [batch, rows, columns], all of one shape and on one device.

    An error that a method raises in a step, or a result of a wrong shape or dtype, becomes a `PreconditionerError` with
    the name of the method.
    """

    _short_names: ClassVar[dict[str, dict[str, Any]]] = {"adadiag++": {"kind": "AdaDiag", "sides": "two"}}
    _family: ClassVar[str] = "preconditioner"
    _registry: ClassVar[dict[str, type[Any]]] = {}
    _state_is_kept: ClassVar[str] = (
        "make what changes from step to step in init_state(like), and write into the tensors of states. To change a "
        "hyper-parameter: opt.preconditioner_groups[i][{name!r}] = ..."
    )

    def takes(self, shape: Shape) -> bool:
        """Return True if matrices of this shape are rotated; others are left to the base.

        Args:
            shape: (batch, rows, columns).
        """
        return True

    def left_out(self, shape: Shape) -> list[LargeSide]:
        """Return the sides of such a matrix that are not rotated because their bases would be too large.

        `explain()` prints them.

        Args:
            shape: (batch, rows, columns).
        """
        return []

    def oversized(self, shape: Shape) -> list[LargeSide]:
        """Return the sides of such a matrix that are rotated, and would not be with the default limits.

        The wrapper warns of them.

        Args:
            shape: (batch, rows, columns).
        """
        return []

    def init_state(self, like: Tensor) -> State:
        """Make the state of a parameter.

        Args:
            like: a tensor of the parameter's shape [batch, rows, columns], and on its device.

        Returns:
            Tensors by name: float32, and counters int64, on the device of `like`. A counter that the host has to read
            may be on the CPU, 0-d. {} if nothing has to be remembered.
        """
        return {}

    def is_due(self, steps: int, place: int, count: int) -> bool:
        """Return True if a parameter's basis is refreshed in this step.

        Args:
            steps: the number of earlier steps in which this parameter had a gradient. A parameter whose first gradient
                comes late starts at 0.
            place: the number of the parameter among the rotated ones, by which refreshes can be spread over steps; or
                that of its shape and group (`turns_of`).
            count: the number of rotated parameters, or of shapes.
        """
        return False

    def turns_of(self) -> Literal["parameters", "shapes"]:
        """Return "shapes" if `is_due` is given the number of a parameter's shape in the place of its own number."""
        return "parameters"

    def is_overdue(self, state: State, steps: int) -> bool:
        """Return True if a parameter that is not due is refreshed anyway, because it got no basis when it was.

        It is called in every step for every parameter that is not due. So it should read only tensors of `state` that
        are on the CPU.

        Args:
            state: the parameter's state.
            steps: as for `is_due`.
        """
        return False

    def stands_still(self, steps: int) -> bool:
        """Return True if a rotated parameter skips this step: the base gets no gradient of it, and it does not move.

        It is refreshed and observed anyway.

        Args:
            steps: as for `is_due`.
        """
        return False

    def observes(self) -> bool:
        """Return True if `observe` reads the gradients. If it does not, they are not searched for NaN in every step."""
        return type(self).observe is not Preconditioner.observe

    def refreshes_from_gradients(self) -> bool:
        """Return True if `refresh` reads the gradients. If not, it gets zeros, and more parameters at a time."""
        return True

    def refresh_writes(self, name: str) -> bool:
        """Return True if `refresh` may write the entry `name` of a state.

        These entries are copied before a refresh, and restored if it fails or the gradient is not finite.
        """
        return True

    def moves_moments(self) -> bool:
        """Return True if a refresh may return a `Carry` with maps.

        Then the wrapper refuses a base whose state cannot be carried into another basis.
        """
        cls = type(self)
        return cls.refresh is not Preconditioner.refresh or cls.carries_from is not Preconditioner.carries_from

    def refresh(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Carry | None]:
        """Make new bases, from what was observed or from these gradients.

        Args:
            states: the states, which are written in place.
            grads: the gradients, not rotated; zeros if `refreshes_from_gradients` returns False. A gradient that is not
                finite is replaced by zeros, and its refresh is undone.

        Returns:
            A `Carry` for each state; None if its basis did not change.
        """
        return [None] * len(states)

    def observe(self, states: Sequence[State], grads: Sequence[Tensor]) -> None:
        """Collect statistics of this step's gradients, after the parameters have moved.

        Args:
            states: the states, which are written in place.
            grads: the gradients, not rotated. If `observes` returns True, one that is not finite is replaced by zeros.
        """

    def project_in(self, states: Sequence[State], xs: Sequence[Tensor]) -> list[Tensor]:
        """Rotate each x into its parameter's space, P^T x Q.

        Returns:
            New tensors of the shape of `xs`, in float32, bfloat16 or float16.

        Raises:
            NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define project_in")

    def carries_in(self) -> Literal["float32", "tf32"]:
        """Return the precision of the products of moments with the maps of a `Carry`; only some devices have TF32."""
        return "float32"

    def itemsize(self) -> int:
        """Return the bytes of an element that `project_in` returns. With fewer, more are rotated at a time."""
        return 4

    def denoise(self, states: Sequence[State], rotated: Sequence[Tensor]) -> list[Tensor]:
        """Set elements of rotated gradients to 0 that are nothing but rounding noise.

        It is called only for parameters that were refreshed in this step. If a basis was made from the gradient itself,
        most elements of the rotated gradient are 0 except for rounding.

        Args:
            states: the states.
            rotated: gradients as `project_in` has returned them.

        Returns:
            These tensors, written in place, or others of the same shape and dtype.
        """
        return list(rotated)

    def project_out(self, states: Sequence[State], xs: Sequence[Tensor]) -> list[Tensor]:
        """Rotate each x back into its parameter's own space, P x Q^T.

        Args:
            states: the states.
            xs: tensors in float32, or in the dtype that `project_in` returns.

        Returns:
            New tensors of the shape of `xs`, in float32, bfloat16 or float16.

        Raises:
            NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define project_out")

    # --- matrices of which each rank has some rows, or some columns ---

    def on_shards(self, shape: Shape, whole: frozenset[Side]) -> Preconditioner | str:
        """Return the preconditioner for a sharded matrix [1, rows, columns], or the reason why it is not rotated.

        If the matrix is rotated, `project_in`, `project_out`, `denoise` and `observe` get each rank's part, which may
        be empty, and must not communicate with other ranks. A refresh calls `refresh_parts` on all ranks, adds up the
        results, calls `refresh_from` on one rank, and `carries_from` on all.

        Args:
            shape: of the whole matrix.
            whole: the sides that are whole on each rank.

        Returns:
            This preconditioner with the name of the side that it rotates, or the reason as part of a sentence.
        """
        return f"sharded, and {type(self).__name__} does not say how shards are rotated"

    def gathers(self, shape: Shape) -> bool:
        """Return True if a sharded matrix [1, rows, columns] that `on_shards` refuses is gathered to be rotated.

        It is gathered for every call of this preconditioner, so in every step. All methods get whole matrices as on one
        device, except `denoise`, which gets each rank's part.
        """
        return False

    def is_part(self, name: str) -> bool:
        """Return True if the entry `name` of a sharded matrix's state has to be added up over ranks.

        Checkpoints have the sum.
        """
        return False

    def refresh_parts(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's part of the sums over ranks that a refresh needs.

        Args:
            states: the states of sharded matrices.
            grads: this rank's parts of the gradients; zeros if `refreshes_from_gradients` returns False.

        Returns:
            A float32 tensor for each, of the same shape on all ranks.

        Raises:
            NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define refresh_parts")

    def refresh_from(self, states: Sequence[State], sums: Sequence[Tensor]) -> list[Refreshed]:
        """Make new bases from the sums over ranks. One rank calls it; the others get the states that it writes.

        Args:
            states: the states, which are written in place.
            sums: the sums over ranks of the results of `refresh_parts`.

        Returns:
            For each matrix if its basis is new, and the order of its columns.

        Raises:
            NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define refresh_from")

    def carries_from(
        self, old: Sequence[State], new: Sequence[State], refreshed: Sequence[Refreshed]
    ) -> list[Carry | None]:
        """Return what `refresh` would have returned: a `Carry` for each matrix, None if its basis is not new.

        Args:
            old: the states before the refresh.
            new: the states after it.
            refreshed: the results of `refresh_from`.

        Raises:
            NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define carries_from")

    def with_limits_of(self, saved: Preconditioner) -> Preconditioner:
        """Return this preconditioner with those options of a checkpoint's that decide which matrices are rotated.

        The result says if the checkpoint's bases fit. Options that it keeps have to be the checkpoint's; the others may
        differ, and a run goes on as it was saved.

        Args:
            saved: the checkpoint's preconditioner, which is of the same class.
        """
        return self

    def on_load(self, replaced: Preconditioner) -> str | None:
        """Return a warning for a checkpoint that replaces `replaced` by this preconditioner; None if none is due.

        The text is a sentence without its subject ("has ..."), and ends with an assignment to
        `opt.preconditioner_groups[{number}]`.
        """
        return None

    def report(self, states: Sequence[State]) -> list[dict[str, Tensor]]:
        """Return the numbers that `statistics()` shows of each parameter, by name: 0-d tensors on its device."""
        return [{} for _ in states]


def preconditioner_from(data: Any) -> Preconditioner | None:
    """Return a preconditioner as it is, or make one of a kind's name, a dictionary with a `kind`, or JSON of that.

    None stays None.
    """
    return None if data is None else Preconditioner.from_data(data)
