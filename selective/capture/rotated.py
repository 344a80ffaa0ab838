"""RotatedJob: the base's rule and the policy work in the rotated space, the parameter itself is not rotated.

    refresh, carry -> P^T g Q -> the base's rule -> mask -> P (mask u) Q^T -> p <- factor p - that, rounded once

rotated_fused.py and rotated_stepped.py obtain the update; their common part is here. The base's state is in the rotated
space, under its own keys and in the parameter's shape. Coupled decay and `maximize` enter the gradient before it is
rotated. Decoupled decay is a factor on the parameter itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from selective import foreach
from selective.base.fused_rules import fused_rule
from selective.capture.generic import Captured, GenericJob, by_value
from selective.kernels import apply_mask, selective_step, spec
from selective.policies import Dense
from selective.policies.kernel_terms import everything_as_it_is
from selective.preconditioner import as_matrix
from selective.rotation.basis import Carried, CarriedTogether
from selective.rotation.carry import MomentCarrier, as_it_is
from selective.rotation.carry_together import carry_together
from selective.rotation.contract import is_foreign
from selective.rotation.moments import moments_of
from selective.rotation.refresh_gathered import through_gather
from selective.rotation.rotation import Rotation
from selective.sharding.dtensor import local_like, local_of, shard_of


class RotatedJob(GenericJob):
    """The job of one group's rotated parameters that have a gradient."""

    def __init__(self, *args: Any, rotation: Rotation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotation = rotation
        self.own_code = self.specs is None or is_foreign(rotation.preconditioner)
        self.in_original = rotation.mask_space == "original"
        self.decays_by_unmasked = False
        if self.decay is not None and not self.in_original:
            self.kernel_decay = None  # a parameter decays when it is written, by `apply_masked`
            self.decays_by_unmasked = self.decay.of == "update" and not isinstance(self.policy, Dense)
        self.gradients: list[Tensor] = []  # not rotated, after `maximize` and coupled decay
        self.moving: list[int] = []  # those that step now: the preconditioner may hold others still
        self.momenta: dict[int, Tensor | None] = {}  # of the parameters that are being masked, in the space of the mask
        self.waiting: dict[int, Tensor] = {}  # -mask u in the rotated space, until it is applied
        self.unmasked: dict[int, tuple[Tensor, bool]] = {}  # u (True: -u) there, where the decay reads it
        self.count = len(self.parameters)
        self.grads, self.previous = [None] * self.count, [None] * self.count

    def before_base(self) -> None:
        """Take step 3, refresh and carry, and get the gradients of step 4."""
        if self.own_code:
            self.saved = foreach.copies(self.tensors())
        self.gradients = self._effective_gradients()
        self.moving = self.rotation.moving()
        for carried in self.rotation.refresh_due(self._matrices, in_stacks=self.steps_in_stacks()):
            if isinstance(carried, CarriedTogether):
                params = [self.parameters[i].tensor for i in carried.indices]
                shape = self.rotation.bases[carried.indices[0]].shape
                carry_together(self._carrier, params, shape, carried.maps, carried.valid)
            else:
                self._carry(carried)

    def steps_in_stacks(self) -> bool:
        """True if all parameters are stepped together, in the stacks of their bases."""
        return False

    def raw_grads(self) -> list[Tensor]:
        """Return this rank's parts of the gradients. All tensors of a job but the parameters themselves are parts."""
        stacks = self.rotation.stacks
        if stacks is not None and not stacks.on_ranks:
            return super().raw_grads()
        return [local_like(p.grad, p) for p in self.tensors() if p.grad is not None]

    def _effective_gradients(self) -> list[Tensor]:
        raw = self.raw_grads()
        if not self.is_coupled:
            return foreach.negated(raw) if self.sign < 0 else raw
        decayed = foreach.sums(raw, [local_of(p) for p in self.tensors()], self.coupled, wide=True)
        if self.sign < 0:
            foreach.neg_(decayed)
        return decayed

    def base_dtype(self, index: int) -> torch.dtype:
        """Return the dtype of the gradient with which the base would step: Note [gradients of another dtype].

        With coupled decay, torch's `grad.add(param, alpha=weight_decay)` promotes the gradient.
        """
        p = self.parameters[index].tensor
        assert p.grad is not None
        return torch.promote_types(p.grad.dtype, p.dtype) if self.is_coupled else p.grad.dtype

    def _matrices(self, indices: Sequence[int]) -> list[Tensor]:
        return [as_matrix(self.gradients[i], self.rotation.bases[i].shape) for i in indices]

    def _carry(self, carried: Carried) -> None:
        """Carry the moments of one parameter into the new space."""
        parameter, basis = self.parameters[carried.index], self.rotation.bases[carried.index]
        around = as_it_is
        if basis.gathers and basis.shard is not None:
            around = partial(through_gather, basis.shard, basis.whole)
        own_momenta = [] if self.context.own_momentum is None else [self.context.own_momentum(parameter)]
        self._carrier.carry(parameter.tensor, basis.shape, carried, own_momenta, around)

    @cached_property
    def _carrier(self) -> MomentCarrier:
        base, rule = self.context.base, fused_rule(self.context.base)
        moments = moments_of(base, self.group, self.facts)
        bound = None if rule is None else rule.bound(self.group)
        return MomentCarrier(base, moments, bound, rule is not None, self.rotation.carries_in())

    def rotated_gradients(self, indices: list[int]) -> list[Tensor]:
        """Take step 4: return the rotated gradients of one bucket, float32, each shaped like its parameter."""
        return self.rotation.gradients_in(indices, [self.gradients[i] for i in indices])

    def close(self) -> None:
        """Take step 8: let the preconditioner observe, and count the step."""
        self.rotation.observe(self._matrices)
        self.rotation.count_steps()

    # --- steps 6 and 7 ---

    def take(
        self,
        indices: list[int],
        rotated: Sequence[Tensor],
        momenta: Sequence[Tensor | None],
        previous: Sequence[Tensor | None],
    ) -> None:
        """Set the gradients and momenta that the policy will read, in the space of the mask."""
        grads = list(rotated)
        if self.in_original:
            momenta, previous = self._out(indices, momenta), self._out(indices, previous)
            grads = [self.gradients[i] for i in indices]
        for i, g, m, before in zip(indices, grads, momenta, previous, strict=True):
            self.grads[i], self.momenta[i], self.previous[i] = g, m, before  # type: ignore[index]

    def _out(self, indices: list[int], xs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if any(x is None for x in xs):
            return xs
        return self.rotation.project_out(indices, [x for x in xs if x is not None])

    def momenta_now(self, indices: Sequence[int]) -> Sequence[Tensor | None]:
        return [self.momenta.pop(i) for i in indices]

    def momenta_of_base(self, indices: Sequence[int]) -> Sequence[Tensor | None]:
        """Return the first moments in the rotated space, after this step's gradient has entered them."""
        return super().momenta_now(indices)

    def mask_and_apply(self, indices: list[int], updates: Sequence[Tensor], *, negated: bool) -> None:
        """Mask these updates of the rotated space (or their negatives), and apply them to the parameters."""
        if self.in_original:
            updates = self.rotation.project_out(indices, updates)
            starts = self._starts(indices)
            self._call(indices, updates, starts, [self.factors[i] for i in indices], negated)
            self._keep_residue(indices, starts)
            return
        masked = self.zeros(indices)
        self.waiting.update(zip(indices, masked, strict=True))
        if self.decays_by_unmasked:
            self.unmasked.update({i: (u, negated) for i, u in zip(indices, updates, strict=True)})
        self._call(indices, updates, masked, [1.0] * len(indices), negated)

    def stepped(self, indices: Sequence[int]) -> None:
        """Apply the updates that are masked by now: at once, or after the exchange with other ranks."""
        waiting = [i for i in indices if i in self.waiting]
        if waiting:
            self.apply_masked(waiting, [self.waiting.pop(i) for i in waiting])

    def _call(
        self,
        indices: list[int],
        updates: Sequence[Tensor],
        targets: list[Tensor],
        factors: Sequence[spec.Scalar],
        negated: bool,
    ) -> None:
        """Let the kernels compute target <- factor target - mask u."""
        beta = self._lookahead()
        for factor, places in by_value(factors):
            captured = [Captured(updates[k], targets[k], targets[k]) for k in places]
            self.apply([indices[k] for k in places], captured, spec.GivenRule(factor, 0.0, negated, beta, self.rate))
        for i in indices:  # frees their memory
            self.grads[i] = self.previous[i] = None  # type: ignore[index]

    def zeros(self, indices: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return zeros shaped like these parameters; a kernel turns them into -mask u."""
        tensors = [local_of(self.parameters[i].tensor) for i in indices]
        if all(p.is_contiguous() for p in tensors) and len({p.shape for p in tensors}) == 1:
            shape = (len(indices), *tensors[0].shape)
            return list(torch.zeros(shape, dtype=dtype, device=tensors[0].device).unbind())
        return [torch.zeros_like(p, dtype=dtype) for p in tensors]

    def apply_masked(self, indices: list[int], masked: Sequence[Tensor]) -> None:
        """Take step 7: project `masked`, which is -mask u, out of the rotated space, and add it to factor p.

        The sum is rounded once.
        """
        moved = self.rotation.project_out(indices, masked, narrow=True)
        compared = self._unmasked_out(indices) if self.decays_by_unmasked else moved
        starts = self._starts(indices)
        rate = 1.0 if self.decay is None else self.rate
        for factor, places in by_value([self.factors[i] for i in indices]):
            items = [
                spec.Item(
                    starts[k],
                    compared[k],  # in the place of the gradient, which only the decay reads
                    {"update": moved[k], "start": starts[k]},
                    self._address(indices[k]),
                    shard=self.shard(indices[k]),
                )
                for k in places
            ]
            self._write(items, spec.GivenRule(factor, 0.0, negated=True, rate=rate))
        self._keep_residue(indices, starts)

    def _unmasked_out(self, indices: list[int]) -> list[Tensor]:
        """Return the unmasked updates in the original space: a product more than a step without decay takes."""
        updates, negated = zip(*(self.unmasked.pop(i) for i in indices), strict=True)
        moved = self.rotation.project_out(indices, updates, narrow=True)
        return foreach.negated(moved) if negated[0] else moved

    def _write(self, items: list[spec.Item], rule: spec.GivenRule) -> None:
        """Write the masked updates to their parameters, with decay."""
        (selection, strength), draw = everything_as_it_is(), self.context.draw_on(items[0].param.device)
        decay = None if self.decay is None else self.decay.spec("gradient" if self.decays_by_unmasked else "update")
        if self.decay is not None and self.decay.at_random:
            for item in items:
                update = -item.state["update"].to(torch.promote_types(item.param.dtype, torch.float32))
                mask = torch.ones((), dtype=update.dtype, device=update.device)
                apply_mask(item, rule, update, mask, draw, self.decays_of(item, rule, update, mask, decay))
            return
        passing = self.kept_items.passing(self.calls, items, self.policy, self.context.recording)
        self.calls += 1
        selective_step(passing, rule=rule, selection=selection, strength=strength, draw=draw, decay=decay)

    def _address(self, index: int) -> int:
        return self.parameters[index].address

    def shard(self, index: int) -> spec.Shard | None:
        return None if self.context.local_scope else shard_of(self.parameters[index].tensor)

    def _starts(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the tensors to which updates are applied: the parameters, or float32 sums with their residue."""
        return [local_of(self.parameters[i].tensor) for i in indices]

    def _keep_residue(self, indices: list[int], exact: Sequence[Tensor]) -> None:
        """Round float32 results into their parameters, and keep the residue; here there are none."""
