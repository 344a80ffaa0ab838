"""The calls to a preconditioner: refreshing, rotating, observing, with whatever it must not see filtered out.

Note [gradients that are not finite]: one NaN spoils a matrix's basis for good. So a gradient with NaN or infinity in
it is taken for zeros by `refresh` and `observe`, and what a refresh made of it is undone: basis and moments stay. The
parameter's `skipped` counts it. All of it happens on the device; nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from selective import foreach
from selective.preconditioner import Carry, Preconditioner, State, as_matrix
from selective.preconditioner.linalg import batches
from selective.rotation.basis import Basis, Carried, MaskSpace, Matrices, PreconditionerError
from selective.rotation.contract import (
    check_projected,
    check_refreshed,
    check_report,
    check_states,
    exact_products,
    is_foreign,
    is_memory_of,
)
from selective.rotation.refresh_gathered import part_of, refresh_gathered, wholes
from selective.rotation.refresh_sharded import refresh_shards

# Elements of the matrices whose bases are refreshed together, where nothing but what was observed of them is needed.
BASES = 2**28
# ... and of those that are rotated together: 512 MiB in float32. Some launches for each part cost the host more time
# than the device needs for fewer elements.
ROTATED = 2**27


class Rotation:
    """One group's preconditioner in one step. Parameters are known by their place in `bases`."""

    def __init__(self, preconditioner: Preconditioner, bases: list[Basis], count: int, mask_space: MaskSpace) -> None:
        self.preconditioner, self.bases, self.count, self.mask_space = preconditioner, bases, count, mask_space
        self.steps = [int(basis.steps) for basis in bases]
        self.is_foreign = is_foreign(preconditioner)
        self._finite: dict[int, Tensor] = {}
        self._refreshed: set[int] = set()  # in this step

    def carries_in(self) -> Literal["float32", "tf32"]:
        return self._ask("carries_in")

    def stands_still(self, index: int) -> bool:
        return self._ask("stands_still", self.steps[index])

    def buckets(self, indices: Sequence[int], limit: int | None = None) -> Iterator[list[int]]:
        """Those of equal shape and device together, at most `limit` elements at a time (`ROTATED`, if not said).

        Of shards the wholes are looked at, and how they are cut: the same on all ranks, which ask each other together.
        """
        found: dict[tuple[object, ...], list[int]] = {}
        for index in indices:
            basis = self.bases[index]
            found.setdefault((basis.whole, basis.shape, id(basis.shard), basis.device), []).append(index)
        for same in found.values():
            batch, rows, columns = self.bases[same[0]].whole
            lots = batches(len(same), batch * rows * columns, ROTATED if limit is None else limit)
            yield from (same[lot] for lot in lots)

    def at_once(self, *, narrow: bool) -> int:
        """Elements that are rotated together, where they stay as `narrow` as they are returned."""
        return ROTATED * 4 // self._ask("itemsize") if narrow else ROTATED

    def renew(self, matrices: Matrices) -> Iterator[Carried]:
        """Refresh the bases that are due; what has to be carried along, batch by batch."""
        everything = list(range(len(self.bases)))
        observes, reads = self._ask("observes"), self._ask("refreshes_from_gradients")
        for indices in self.buckets(everything):
            due = [i for i in indices if self.is_due(i)]
            looked = indices if observes else due
            if looked:
                grads = dict(zip(looked, matrices(looked), strict=True))
                self._look_at(looked, list(grads.values()))
            if due and reads and self.bases[due[0]].shard is None:
                yield from self._refresh(due, self._clean(due, [grads[i] for i in due]))
        if not reads:
            whole = [i for i in everything if self.bases[i].shard is None]
            for due in self.buckets([i for i in whole if self.is_due(i)], BASES):
                basis = self.bases[due[0]]
                nothing = torch.zeros((), dtype=torch.float32, device=basis.device).expand(basis.shape)
                yield from self._refresh(due, [nothing] * len(due))
        yield from self._refresh_shards(matrices)

    def _refresh_shards(self, matrices: Matrices) -> Iterator[Carried]:
        """The same of matrices that are sharded, together with the other ranks."""
        due = [i for i, basis in enumerate(self.bases) if basis.shard is not None and self.is_due(i)]
        if not due:
            return
        self._refreshed.update(due)
        apart = {i: self.bases[i] for i in due if not self.bases[i].gathers}
        gathered = {i: self.bases[i] for i in due if self.bases[i].gathers}
        with self._named("refresh"):
            finite = {i: self._finite.get(i) for i in apart}
            made = refresh_shards(self.preconditioner, apart, finite, matrices)
        yield from self._carried(made)
        missing = {i: ~self._finite[i] for i in gathered}
        lots = refresh_gathered(
            self.preconditioner, gathered, missing, lambda some: self._gathered(some, matrices(some))
        )
        while True:  # moments follow each lot before the next one may fail
            with self._named("refresh"):
                lot = next(lots, None)
            if lot is None:
                return
            yield from self._carried(lot)

    def _carried(self, made: dict[int, Carry | None]) -> Iterator[Carried]:
        for index, maps in made.items():
            if maps is not None:
                yield Carried(index, maps)

    def is_due(self, index: int) -> bool:
        basis, steps = self.bases[index], self.steps[index]
        return self._ask("is_due", steps, basis.place, self.count) or self._ask("is_overdue", basis.state, steps)

    def _look_at(self, indices: list[int], grads: list[Tensor]) -> None:
        """Which gradients are finite; the others are counted."""
        grads = [grad if grad.numel() else grad.new_zeros(1) for grad in grads]  # a shard may be empty
        largest = foreach.many_of._foreach_norm(grads, float("inf"))
        finite = torch.stack(list(largest)).isfinite()
        self._finite.update(zip(indices, finite.unbind(), strict=True))
        missing = list((~finite).to(torch.int64).unbind())
        foreach.many_of._foreach_add_([self.bases[i].skipped for i in indices], missing)

    def _clean(self, indices: list[int], grads: list[Tensor]) -> list[Tensor]:
        """The gradients, zeros for those that are not finite."""
        finite = torch.stack([self._finite[i] for i in indices])
        stacked = torch.stack(grads)
        return list(stacked.masked_fill_(~finite[:, None, None, None], 0.0).unbind())

    def _refresh(self, due: list[int], grads: list[Tensor]) -> Iterator[Carried]:
        states = self._states(due)
        before = [self._copy_of(state) for state in states]
        try:
            with self._named("refresh"):
                made = self.preconditioner.refresh(states, grads)
                check_refreshed(made, [self.bases[i].shape for i in due])
                check_states([self.bases[i].state for i in due], states)
        except BaseException:
            self._write(due, before)
            raise
        self._refreshed.update(due)
        on_host = self._finite_on_host(due, states)
        for index, maps, state, old in zip(due, made, states, before, strict=True):
            valid = None if index in on_host else self._finite[index]
            if valid is not None:
                for key, kept in old.items():
                    torch.where(valid, state[key], kept, out=state[key])
            elif not on_host[index]:
                self._write([index], [old])
                continue
            if maps is not None:
                yield Carried(index, maps, valid)

    def _copy_of(self, state: State) -> State:
        """Of what a refresh may write."""
        names = [name for name in state if self.preconditioner.refresh_writes(name)]
        return dict(zip(names, foreach.copies([state[name] for name in names]), strict=True))

    def _finite_on_host(self, due: list[int], states: list[State]) -> dict[int, bool]:
        """Where a state has counters on the host: which gradients are finite, for one wait. Otherwise nothing."""
        if all(value.device == self.bases[due[0]].device for state in states for value in state.values()):
            return {}
        finite = torch.stack([self._finite[i] for i in due]).tolist()
        return dict(zip(due, finite, strict=True))

    def _write(self, indices: list[int], values: list[State]) -> None:
        for index, state in zip(indices, values, strict=True):
            for key, value in state.items():
                self.bases[index].state[key].copy_(value)

    def observe(self, matrices: Matrices) -> None:
        """Step 8, on gradients that are not rotated."""
        if type(self.preconditioner).observe is Preconditioner.observe:
            return
        reads = self._ask("observes")
        for indices in self.buckets(list(range(len(self.bases)))):
            states, grads = self._states(indices), matrices(indices)
            if self.bases[indices[0]].gathers and reads:
                grads = [x.masked_fill(~x.isfinite().all(), 0.0) for x in self._gathered(indices, grads)]
            elif reads:
                grads = self._clean(indices, grads)
            with self._named("observe"):
                self.preconditioner.observe(states, grads)
                check_states([self.bases[i].state for i in indices], states)

    def report(self) -> list[dict[str, Tensor]]:
        """What there is to know of each basis now: what the preconditioner says, and how many gradients it missed."""
        found: list[dict[str, Tensor]] = [{}] * len(self.bases)
        for indices in self.buckets(list(range(len(self.bases)))):
            with self._named("report"):
                said = self.preconditioner.report(self._states(indices))
                check_report(said, len(indices))
            for i, one in zip(indices, said, strict=True):
                said_of_it = {**one, "basis_skipped": self.bases[i].skipped}
                found[i] = {name: value.to(torch.float32) for name, value in said_of_it.items()}
        return found

    def count_steps(self) -> None:
        if self.bases:
            foreach.many_of._foreach_add_([basis.steps for basis in self.bases], 1)

    def project_in(self, indices: list[int], xs: Sequence[Tensor]) -> list[Tensor]:
        """Each x, shaped like its parameter, in the rotated space: float32 of the same shape. Alike ones only."""
        return foreach.in_dtype(self._project("project_in", indices, xs), torch.float32)

    def gradients_in(self, indices: list[int], grads: Sequence[Tensor], *, narrow: bool = False) -> list[Tensor]:
        """Gradients in the rotated space, without what is only rounding. `narrow`: in the dtype that they come in."""
        rotated = self._project("project_in", indices, grads)
        fresh = [k for k, i in enumerate(indices) if i in self._refreshed]
        if fresh:
            for k, made in zip(fresh, self._denoised(indices, fresh, rotated), strict=True):
                rotated[k] = made
        return rotated if narrow else foreach.in_dtype(rotated, torch.float32)

    def _denoised(self, indices: list[int], fresh: list[int], rotated: Sequence[Tensor]) -> list[Tensor]:
        shape = self.bases[indices[0]].shape
        with self._named("denoise"):
            states = self._states([indices[k] for k in fresh])
            made = self.preconditioner.denoise(states, [rotated[k].reshape(shape) for k in fresh])
            made = check_projected(made, shape, len(fresh))
        return [y.reshape(rotated[k].shape) for k, y in zip(fresh, made, strict=True)]

    def project_out(self, indices: list[int], xs: Sequence[Tensor], *, narrow: bool = False) -> list[Tensor]:
        """Each x back in the parameter's own space; `narrow` as in `gradients_in`, for x too."""
        moved = self._project("project_out", indices, xs, narrow=narrow)
        return moved if narrow else foreach.in_dtype(moved, torch.float32)

    def _project(self, what: str, indices: list[int], xs: Sequence[Tensor], *, narrow: bool = False) -> list[Tensor]:
        shape = self.bases[indices[0]].shape
        matrices = [x.detach().reshape(shape) if narrow else as_matrix(x, shape) for x in xs]
        first = self.bases[indices[0]]
        if first.gathers:
            matrices = self._gathered(indices, matrices)
        with self._named(what):
            made = getattr(self.preconditioner, what)(self._states(indices), matrices)
            made = check_projected(made, first.whole if first.gathers else shape, len(xs))
        if first.gathers and first.shard is not None:
            made = [part_of(y, first.shard) for y in made]
        if self.is_foreign:
            made = [y.clone() if is_memory_of(y, x) else y for x, y in zip(matrices, made, strict=True)]
        return [y.reshape(x.shape) for x, y in zip(xs, made, strict=True)]

    def _gathered(self, indices: list[int], parts: Sequence[Tensor]) -> list[Tensor]:
        """The wholes of these, float32, by one all-reduce for each of those that are cut alike."""
        found: dict[int, Tensor] = {}
        place = {index: k for k, index in enumerate(indices)}
        for same in self.buckets(indices):
            shard, whole = self.bases[same[0]].shard, self.bases[same[0]].whole
            assert shard is not None
            found.update(zip(same, wholes([parts[place[i]] for i in same], shard, whole), strict=True))
        return [found[i] for i in indices]

    def _states(self, indices: list[int]) -> list[State]:
        return [dict(self.bases[i].state) for i in indices]

    def _ask(self, what: str, *given: Any) -> Any:
        """What it says to a question; unlike `_named` cheap enough for every parameter in every step."""
        try:
            return getattr(self.preconditioner, what)(*given)
        except Exception as error:
            raise self._failure(what, error) from error

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            with exact_products(self.bases[0].device):
                yield
        except Exception as error:
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> PreconditionerError:
        return PreconditionerError(f"{type(self.preconditioner).__name__}.{what} failed: {error}")
