"""The wrapper's entries of all parameters, beside the base's: Note [our state entries]."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.same_class import class_names
from selective.kernels import spec
from selective.kernels.lasting import lasting
from selective.parameter import Parameter, is_lazy
from selective.plan.group_plan import GroupPlan
from selective.plan.groups import Groups
from selective.plan.options import Options
from selective.policies import Dense, Policy
from selective.policies.view import StepView, Tensors
from selective.sharding.gathering import cut_like
from selective.state.entries import (
    BASIS_STEPS,
    DECAY,
    MOMENTUM,
    NORM,
    POLICY,
    POLICY_STATE,
    PRECONDITIONER,
    RESIDUE,
    SEED,
    STEP,
    encode_model,
)
from selective.state.parameter_state import OwnEntries
from selective.state.rotation_state import fresh_basis, rotate_moments_into
from selective.step_count import StepCount


class StateStore:
    """The wrapper's entries of all parameters. `table` maps a parameter to its `OwnEntries`.

    The table is copied whenever an entry is replaced, so that whoever holds one notices that by identity.
    """

    def __init__(
        self, base: Optimizer, options: Options, count: StepCount, table: dict[Tensor, OwnEntries] | None = None
    ) -> None:
        self.base, self.options, self.count = base, options, count
        self.table = {} if table is None else table
        self._seen: tuple[list[int], list[int]] = [], []  # the base's parameters and their states, by `id`
        self._seen_token: object = None

    @property
    def with_basis(self) -> Container[Tensor]:
        """The parameters that have a stored basis, which can't become another one in training."""
        return _WithBasis(self.table)

    def get_or_make(self, plan: GroupPlan, parameter: Parameter) -> OwnEntries:
        """The entries of a parameter, made on first use. The tensors are the stored ones."""
        own = self.table.get(parameter.tensor)
        if own is None:
            with lasting():
                own = self.fresh(plan, parameter)
            rotate_moments_into(self.base, plan, parameter, own)  # if it raises, the next step tries again
            self.table[parameter.tensor] = own
        return own

    def policy_state(self, plan: GroupPlan, parameter: Parameter) -> dict[str, Tensor]:
        """The policy's state of a parameter, made on first use. The tensors are the stored ones."""
        own = self.get_or_make(plan, parameter)
        return {key[len(POLICY_STATE) :]: value for key, value in own.items() if key.startswith(POLICY_STATE)}

    def make(self, plans: Iterable[GroupPlan], wanted: Callable[[Parameter], bool]) -> None:
        """Make the entries of the wanted parameters, unless their step is the base's alone."""
        for plan in plans:
            for parameter in plan.params.parameters:
                if wanted(parameter) and self.keeps(plan, parameter):
                    self.get_or_make(plan, parameter)

    def make_present(self, plans: Iterable[GroupPlan], present: Iterable[list[Parameter]]) -> None:
        """Make the entries of the parameters that have a gradient, by group, before anything moves.

        A policy's `init_state` may raise. `present` is compared by identity, as in `KeptItems.with_gradients`.
        """
        for plan, parameters in zip(plans, present, strict=True):
            if plan.params.with_entries is not parameters:
                for parameter in parameters:
                    if self.keeps(plan, parameter):
                        self.get_or_make(plan, parameter)
                plan.params.with_entries = parameters

    def join_base(self, plans: Iterable[GroupPlan]) -> None:
        """Make the entries of parameters of which the base holds state already.

        torch.distributed.checkpoint reads the names of entries off live state. Base optimizers that make theirs in the
        constructor (Adagrad), or that have trained before they were wrapped, have it from the start.
        """
        self.make(plans, self._has_base_state)

    def keeps(self, plan: GroupPlan, parameter: Parameter) -> bool:
        """True if entries are stored of it: not if its step is the base's alone, or if it has no shape yet."""
        return plan.masks_or_rotates(parameter) and not is_lazy(parameter.tensor)

    def fresh(self, plan: GroupPlan, parameter: Parameter) -> OwnEntries:
        """Return all stored entries of a parameter before its first step."""
        entries = {**self.fresh_entries(plan, parameter, plan.policy), **fresh_basis(plan, parameter)}
        own = OwnEntries(entries, [parameter.tensor.shape])
        own.mark_checked()
        return own

    def fresh_entries(self, plan: GroupPlan, parameter: Parameter, policy: Policy) -> dict[str, Tensor]:
        """Return the stored entries of a parameter under `policy` before its first step, except its basis."""
        p = parameter.tensor
        view = StepView(
            Tensors(p), reads=frozenset({"param"}), who=type(policy).__name__, name=parameter.name,
            draw=spec.Draw(self.count.seed, self.count.steps), address=parameter.address,
        )  # fmt: skip
        entries = {POLICY_STATE + key: cut_like(value, p) for key, value in policy.init_state(view).items()}
        if self.options.keeps_momentum and not isinstance(policy, Dense):
            entries[MOMENTUM] = torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
        if plan.capture_of(parameter).keeps_residue(p):
            entries[RESIDUE] = torch.zeros_like(p)
        return entries

    def renew(self, plan: GroupPlan) -> None:
        """Make the state of a new policy of this group. Momentum, residue and basis stay."""
        self.mark_replaced()
        for parameter in plan.params.parameters:
            before = self.table.pop(parameter.tensor, None)
            if self.keeps(plan, parameter) and (before or self._has_base_state(parameter)):
                with lasting():
                    own = self.fresh(plan, parameter)
                if before:
                    stays = {k: v for k, v in before.items() if k in own and not k.startswith(POLICY_STATE)}
                    own.update(stays)
                else:
                    rotate_moments_into(self.base, plan, parameter, own)
                self.table[parameter.tensor] = own

    def saved(self, plan: GroupPlan, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a parameter's entries in a checkpoint: the stored ones, and the computed ones."""
        step, seed = (torch.tensor(number, device="cpu") for number in (self.count.steps, self.count.seed))
        entries = {STEP: step, SEED: seed, POLICY: encode_model(plan.policy, class_names(self.base)), **own}
        if plan.decay is not None:
            entries[DECAY] = encode_model(plan.decay)
        if plan.norm is not None:
            entries[NORM] = encode_model(plan.norm)
        preconditioner = plan.preconditioning.preconditioner
        if preconditioner is not None and BASIS_STEPS in own:
            entries[PRECONDITIONER] = encode_model(preconditioner)
        return entries

    def token_of_base(self) -> object | None:
        """Return an object that is another one as soon as the base has another state dictionary for a parameter.

        Nothing is kept alive by it: who trusts it holds the parameters and the dictionaries, so that no other object
        can have their `id`. None if the base keeps its state in a mapping of its own.
        """
        states = self.base.state
        if type(states) not in (dict, defaultdict):
            return None
        seen = [*map(id, states)], [*map(id, states.values())]
        if seen != self._seen or self._seen_token is None:
            self._seen, self._seen_token = seen, object()
        return self._seen_token

    def mark_replaced(self) -> None:
        """Copy the table, by whose identity others notice that entries were replaced."""
        self.table = dict(self.table)

    def forget(self, parameter: Parameter) -> None:
        """Forget the entries of a parameter whose step is the base's alone by now."""
        self.mark_replaced()
        del self.table[parameter.tensor]

    def forget_all_but(self, there: Collection[Tensor]) -> None:
        """Forget parameters that are in no group, and of which the base has no state either."""
        self.table = {p: own for p, own in self.table.items() if p in there or p in self.base.state}

    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts the present table back. A load makes another table, with other entries."""
        table = self.table

        def undo() -> None:
            self.table = table

        return undo

    def _has_base_state(self, parameter: Parameter) -> bool:
        return bool(self.base.state.get(parameter.tensor))


class _WithBasis(Container[Tensor]):
    def __init__(self, table: Mapping[Tensor, OwnEntries]) -> None:
        self._table = table

    def __contains__(self, param: object) -> bool:
        return isinstance(param, Tensor) and BASIS_STEPS in self._table.get(param, ())


def follow_changes(groups: Groups, store: StateStore) -> None:
    """Update the plans; then forget removed parameters, and remake the state of groups whose policy class changed."""
    changes = groups.update(store.with_basis)
    if changes.remaining is not None:
        store.forget_all_but(changes.remaining)
    for plan in changes.switched:
        plan.forget_items()
        store.renew(plan)
