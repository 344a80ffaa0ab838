"""Rotation: the calls of one group's preconditioner in one step, without the gradients that it must not see.

Note [gradients that are not finite]: one NaN would spoil a matrix's basis for good. So `refresh` and `observe` get
zeros in place of a gradient with NaN or infinity. A refresh from it is undone: basis and moments stay as they were. The
parameter's `skipped` counts such gradients. All of this happens on the device, and the host does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from selective import foreach
from selective.preconditioner import Carry, Eigenbasis, Preconditioner, State, as_matrix
from selective.preconditioner.linalg import batches, refreshed_at_once
from selective.preconditioner.matrices import from_matrices, in_own_dtype
from selective.rotation.basis import Basis, Carried, CarriedTogether, MaskSpace, Matrices, PreconditionerError
from selective.rotation.contract import (
    Named,
    check_projected,
    check_refreshed,
    check_report,
    check_states,
    is_foreign,
    is_memory_of,
)
from selective.rotation.noise import clear_noise_
from selective.rotation.refresh_gathered import gather_matrices, part_of, refresh_gathered
from selective.rotation.refresh_sharded import refresh_shards
from selective.rotation.refresh_together import due_runs, in_parts, refresh_together
from selective.rotation.stacks import STACKED, Stacks, size_of

# Elements of matrices whose bases are refreshed together, if the refresh does not read their gradients.
BASES = 2**28
# Elements of matrices that are rotated together, 512 MiB in float32. With fewer elements, the host would need longer
# for the launches than the device for its work.
ROTATED = 2**27


class Rotation:
    """One group's preconditioner in one step. An index of a parameter is its place in `bases`."""

    def __init__(
        self,
        preconditioner: Preconditioner,
        bases: list[Basis],
        count: int,
        mask_space: MaskSpace,
        stacks: Stacks | None = None,
        full_steps: bool = False,
    ) -> None:
        self.preconditioner, self.bases, self.count, self.mask_space = preconditioner, bases, count, mask_space
        self.stacks = stacks  # in which the entries of all of these bases lie
        self.full_steps = full_steps  # True if the base takes full steps on noise: Note [signs of noise]
        self.is_foreign = is_foreign(preconditioner)
        self._finite: dict[int, Tensor] = {}
        self._refreshed: set[int] = set()  # in this step

    @cached_property
    def steps(self) -> list[int]:
        """The number of steps that each parameter has taken, as of the first look at it."""
        return [int(basis.steps) for basis in self.bases] if self.stacks is None else self.stacks.steps_taken()

    def carries_in(self) -> Literal["float32", "tf32"]:
        """Return the precision in which moments are carried."""
        return self._ask("carries_in")

    def moving(self) -> list[int]:
        """Return the parameters that step now. The preconditioner may hold others still."""
        still = {steps for steps in set(self.steps) if self._ask("stands_still", steps)}
        return [i for i, steps in enumerate(self.steps) if steps not in still] if still else [*range(len(self.bases))]

    @property
    def has_refreshed(self) -> bool:
        """True if a basis was refreshed in this step."""
        return bool(self._refreshed)

    def buckets(self, indices: Sequence[int], limit: int | None = None) -> Iterator[list[int]]:
        """Iterate over buckets: parameters of equal shape, shard and device, at most `limit` elements together.

        The default limit is `ROTATED`. Sharded matrices are divided as those in stacks are (`size_of`), so that all
        ranks have the same buckets, can gather at once, and add up sums in one order.
        """
        by_kind: dict[tuple[object, ...], list[int]] = {}
        for index in indices:
            basis = self.bases[index]
            by_kind.setdefault((basis.whole, basis.shape, id(basis.shard), basis.device), []).append(index)
        for same_kind in by_kind.values():
            first = self.bases[same_kind[0]]
            numel, most = math.prod(first.whole), ROTATED if limit is None else limit
            if first.shard is not None:
                numel, most = size_of(first.whole, first.state.values()), STACKED
            parts = batches(len(same_kind), numel, most)
            yield from (same_kind[part] for part in parts)

    def bucket_elements(self, *, narrow: bool) -> int:
        """Return the number of elements to rotate together; more if results stay in a `narrow` dtype."""
        return ROTATED * 4 // self._ask("itemsize") if narrow else ROTATED

    def refresh_due(self, matrices: Matrices, *, in_stacks: bool = False) -> Iterator[Carried | CarriedTogether]:
        """Refresh the bases that are due, and yield what has to be carried, bucket by bucket.

        Stacked bases are refreshed together. With `in_stacks`, what observes the gradients looks at
        all of them after the step, and counts those that are not finite.
        """
        everything = list(range(len(self.bases)))
        due_now = self._due()
        if in_stacks and not due_now:
            return
        observes, reads = self._ask("observes"), self._ask("refreshes_from_gradients")
        alone = due_now if self.stacks is None else set[int]()
        for indices in self.buckets(everything):
            due = [i for i in indices if i in alone]
            to_check = indices if observes and not in_stacks else [i for i in indices if i in due_now]
            if to_check:
                grads = dict(zip(to_check, matrices(to_check), strict=True))
                self._check_finite(to_check, list(grads.values()), count=not (observes and in_stacks))
            if due and reads and self.bases[due[0]].shard is None:
                yield from self._refresh(due, self._clean(due, [grads[i] for i in due]))
        if self.stacks is not None and self.bases[0].shard is None:  # either all are sharded, or none is
            yield from self._refresh_together(self.stacks, due_now, matrices)
        if not reads:
            unsharded = [i for i in everything if self.bases[i].shard is None]
            for due in self.buckets([i for i in unsharded if i in alone], BASES):
                basis = self.bases[due[0]]
                unread = torch.zeros((), dtype=torch.float32, device=basis.device).expand(basis.shape)
                yield from self._refresh(due, [unread] * len(due))
        yield from self._refresh_shards(sorted(due_now), matrices)

    def _refresh_together(self, stacks: Stacks, due: set[int], matrices: Matrices) -> Iterator[CarriedTogether]:
        """Refresh stacked bases that are due."""
        assert isinstance(self.preconditioner, Eigenbasis)
        limit = refreshed_at_once(self.bases[0].device)
        for part in in_parts(self.preconditioner, due_runs(self.preconditioner, stacks.buckets, due), limit):
            with self.named("refresh"):
                carried = list(refresh_together(self.preconditioner, part, self._finite, matrices))
            self._refreshed.update(i for bucket in part for i in bucket.indices)
            yield from carried

    def _refresh_shards(self, due_now: list[int], matrices: Matrices) -> Iterator[Carried]:
        """Refresh the bases of sharded matrices that are due, together with the other ranks."""
        due = [i for i in due_now if self.bases[i].shard is not None]
        if not due:
            return
        self._refreshed.update(due)
        apart = {i: self.bases[i] for i in due if not self.bases[i].gathers}
        gathered = {i: self.bases[i] for i in due if self.bases[i].gathers}
        with self.named("refresh"):
            finite = {i: self._finite.get(i) for i in apart}
            carries = refresh_shards(self.preconditioner, apart, finite, matrices)
        yield from self._carried(carries)
        missing = {i: ~self._finite[i] for i in gathered}
        carries_by_bucket = refresh_gathered(
            self.preconditioner, gathered, missing, lambda bucket: self._gathered(bucket, matrices(bucket))
        )
        while True:  # the moments of a bucket are carried before the next bucket may fail
            with self.named("refresh"):
                bucket_carries = next(carries_by_bucket, None)
            if bucket_carries is None:
                return
            yield from self._carried(bucket_carries)

    def _carried(self, carries: dict[int, Carry | None]) -> Iterator[Carried]:
        for index, maps in carries.items():
            if maps is not None:
                yield Carried(index, maps)

    def _due(self) -> set[int]:
        """Return the parameters whose bases are refreshed in this step."""
        due, preconditioner, what = set[int](), self.preconditioner, "is_due"
        is_due, is_overdue, count = preconditioner.is_due, preconditioner.is_overdue, self.count
        try:
            for index, (basis, steps) in enumerate(zip(self.bases, self.steps, strict=True)):
                what = "is_due"
                if is_due(steps, basis.place, count):
                    due.add(index)
                    continue
                what = "is_overdue"
                if is_overdue(basis.state, steps):
                    due.add(index)
        except Exception as error:  # broad: a user's preconditioner may raise anything
            raise self.failure(what, error) from error
        return due

    def _check_finite(self, indices: list[int], grads: list[Tensor], *, count: bool = True) -> None:
        """Record which gradients are finite, and count the others."""
        grads = [grad if grad.numel() else grad.new_zeros(1) for grad in grads]  # a shard may be empty
        largest = foreach.many_of._foreach_norm(grads, float("inf"))
        finite = torch.stack(list(largest)).isfinite()
        self._finite.update(zip(indices, finite.unbind(), strict=True))
        if not count:
            return
        missing = list((~finite).to(torch.int64).unbind())
        foreach.many_of._foreach_add_([self.bases[i].skipped for i in indices], missing)

    def _clean(self, indices: list[int], grads: list[Tensor]) -> list[Tensor]:
        """Return the gradients, with zeros in place of those that are not finite."""
        finite = torch.stack([self._finite[i] for i in indices])
        stacked = torch.stack(grads)
        return list(stacked.masked_fill_(~finite[:, None, None, None], 0.0).unbind())

    def _refresh(self, due: list[int], grads: list[Tensor]) -> Iterator[Carried]:
        states = self._states(due)
        before = [self._copy_of(state) for state in states]
        try:
            with self.named("refresh"):
                carries = self.preconditioner.refresh(states, grads)
                check_refreshed(carries, [self.bases[i].shape for i in due])
                check_states([self.bases[i].state for i in due], states)
        except BaseException:
            self._write(due, before)
            raise
        self._refreshed.update(due)
        on_host = self._finite_on_host(due, states)
        for index, maps, state, old in zip(due, carries, states, before, strict=True):
            valid = None if index in on_host else self._finite[index]
            if valid is not None:
                for key, value in old.items():
                    torch.where(valid, state[key], value, out=state[key])
            elif not on_host[index]:
                self._write([index], [old])
                continue
            if maps is not None:
                yield Carried(index, maps, valid)

    def _copy_of(self, state: State) -> State:
        """Return copies of the entries that a refresh may write."""
        names = [name for name in state if self.preconditioner.refresh_writes(name)]
        return dict(zip(names, foreach.copies([state[name] for name in names]), strict=True))

    def _finite_on_host(self, due: list[int], states: list[State]) -> dict[int, bool]:
        """Return by index True if a gradient is finite, which waits for the device.

        {} if no state has an entry on the host: then nobody has to wait.
        """
        if all(value.device == self.bases[due[0]].device for state in states for value in state.values()):
            return {}
        finite = torch.stack([self._finite[i] for i in due]).tolist()
        return dict(zip(due, finite, strict=True))

    def _write(self, indices: list[int], values: list[State]) -> None:
        for index, state in zip(indices, values, strict=True):
            for key, value in state.items():
                self.bases[index].state[key].copy_(value)

    def observe(self, matrices: Matrices) -> None:
        """Take step 8: let the preconditioner observe the gradients, which are not rotated."""
        if type(self.preconditioner).observe is Preconditioner.observe:
            return
        reads = self._ask("observes")
        for indices in self.buckets(list(range(len(self.bases)))):
            states, grads = self._states(indices), matrices(indices)
            if self.bases[indices[0]].gathers and reads:
                grads = [x.masked_fill(~x.isfinite().all(), 0.0) for x in self._gathered(indices, grads)]
            elif reads:
                grads = self._clean(indices, grads)
            with self.named("observe"):
                self.preconditioner.observe(states, grads)
                check_states([self.bases[i].state for i in indices], states)

    def report(self) -> list[dict[str, Tensor]]:
        """Return the preconditioner's report on each basis, with the number of gradients that were not finite."""
        reports: list[dict[str, Tensor]] = [{}] * len(self.bases)
        for indices in self.buckets(list(range(len(self.bases)))):
            with self.named("report"):
                bucket_reports = self.preconditioner.report(self._states(indices))
                check_report(bucket_reports, len(indices))
            for i, report in zip(indices, bucket_reports, strict=True):
                with_skipped = {**report, "basis_skipped": self.bases[i].skipped}
                reports[i] = {name: value.to(torch.float32) for name, value in with_skipped.items()}
        return reports

    def count_steps(self) -> None:
        if self.stacks is not None:
            self.stacks.steps.add_(1)
        elif self.bases:
            foreach.many_of._foreach_add_([basis.steps for basis in self.bases], 1)

    def project_in(self, indices: list[int], xs: Sequence[Tensor]) -> list[Tensor]:
        """Return each x of one bucket in the rotated space: float32, of the shape of x, which is the parameter's."""
        return foreach.in_dtype(self._project("project_in", indices, xs), torch.float32)

    def gradients_in(self, indices: list[int], grads: Sequence[Tensor], *, narrow: bool = False) -> list[Tensor]:
        """Return gradients of one bucket in the rotated space, without elements that are rounding noise.

        float32, or with `narrow` in the dtype that the preconditioner returns.
        """
        rotated = self._project("project_in", indices, grads, clears=self.full_steps)
        fresh = [k for k, i in enumerate(indices) if i in self._refreshed]
        if fresh:
            for k, denoised in zip(fresh, self._denoised(indices, fresh, rotated), strict=True):
                rotated[k] = denoised
        return rotated if narrow else foreach.in_dtype(rotated, torch.float32)

    def _denoised(self, indices: list[int], fresh: list[int], rotated: Sequence[Tensor]) -> list[Tensor]:
        shape = self.bases[indices[0]].shape
        with self.named("denoise"):
            states = self._states([indices[k] for k in fresh])
            denoised = self.preconditioner.denoise(states, [in_own_dtype(rotated[k], shape) for k in fresh])
            denoised = check_projected(denoised, shape, len(fresh))
        return [from_matrices(y, rotated[k].shape) for k, y in zip(fresh, denoised, strict=True)]

    def project_out(self, indices: list[int], xs: Sequence[Tensor], *, narrow: bool = False) -> list[Tensor]:
        """Return each x of one bucket in the parameter's own space; with `narrow`, x and the result may be narrow."""
        moved = self._project("project_out", indices, xs, narrow=narrow)
        return moved if narrow else foreach.in_dtype(moved, torch.float32)

    def _project(
        self, what: str, indices: list[int], xs: Sequence[Tensor], *, narrow: bool = False, clears: bool = False
    ) -> list[Tensor]:
        shape = self.bases[indices[0]].shape
        matrices = [in_own_dtype(x.detach(), shape) if narrow else as_matrix(x, shape) for x in xs]
        first = self.bases[indices[0]]
        if first.gathers:
            matrices = self._gathered(indices, matrices)
        with self.named(what):
            projected = getattr(self.preconditioner, what)(self._states(indices), matrices)
            projected = check_projected(projected, first.whole if first.gathers else shape, len(xs))
        if self.is_foreign:
            projected = [y.clone() if is_memory_of(y, x) else y for x, y in zip(matrices, projected, strict=True)]
        if clears:
            for y in projected:
                clear_noise_(y)
        if first.gathers and first.shard is not None:
            projected = [part_of(y, first.shard) for y in projected]
        return [from_matrices(y, x.shape) for x, y in zip(xs, projected, strict=True)]

    def _gathered(self, indices: list[int], parts: Sequence[Tensor]) -> list[Tensor]:
        """Gather whole matrices in float32, by one all-reduce for each bucket."""
        gathered: dict[int, Tensor] = {}
        place = {index: k for k, index in enumerate(indices)}
        for bucket in self.buckets(indices):
            shard, whole = self.bases[bucket[0]].shard, self.bases[bucket[0]].whole
            assert shard is not None
            gathered.update(zip(bucket, gather_matrices([parts[place[i]] for i in bucket], shard, whole), strict=True))
        return [gathered[i] for i in indices]

    def _states(self, indices: list[int]) -> list[State]:
        return [dict(self.bases[i].state) for i in indices]

    def _ask(self, what: str, *arguments: Any) -> Any:
        """Return the preconditioner's answer. Unlike `named`, it is cheap enough for every parameter in every step."""
        try:
            return getattr(self.preconditioner, what)(*arguments)
        except Exception as error:  # broad: a user's preconditioner may raise anything
            raise self.failure(what, error) from error

    def named(self, what: str) -> AbstractContextManager[None]:
        """Name the method `what` in errors of the preconditioner, and keep autocast away from its products."""
        return Named(self.bases[0].device, partial(self.failure, what))

    def failure(self, what: str, error: Exception) -> PreconditionerError:
        """Return the error that names the method of the preconditioner which raised `error`."""
        return PreconditionerError(f"{type(self.preconditioner).__name__}.{what} failed: {error}")
