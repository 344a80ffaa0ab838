"""ChainedOptimizer: the face of a chain, and being an optimizer. The other modules of this folder do the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.chained.checkpoint import load, save
from selective.chained.members import Members, described, named_members
from selective.chained.reports import explain, statistics
from selective.chained.state import ChainedState
from selective.chained.step import step_members
from selective.checkpoint.frame import checked_frame
from selective.checkpoint.pickles import Version, same_version
from selective.messages.assignments import in_the_groups, in_the_members
from selective.messages.said_by import CHAIN, said_by
from selective.optimizer import SelectiveUpdate
from selective.plan.policy_groups import PolicyGroup, PreconditionerGroup
from selective.state.init_state import make_base_state
from selective.step.begin import run_closure
from selective.step.outside_of_graphs import step_outside_of_graphs


class ChainedOptimizer(Optimizer):
    """Several optimizers as one, each over its own part of a model's parameters.

        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        opt = ChainedOptimizer(
            {
                "matrices": SelectiveUpdate(torch.optim.Muon(matrices, lr=0.02), policy=MGUP()),
                "rest": torch.optim.AdamW(rest, lr=3e-4),
            }
        )

    It is a `torch.optim.Optimizer`. `param_groups` has the members' own groups, one member after the other, so that
    schedulers, clipping, gradient scalers and training stacks reach all of them. A step is taken by all members or by
    none. `state_dict()` is one dictionary of torch's form, with the parameters counted on over all members.

    Members that are wrapped in `SelectiveUpdate` step together: they share launches on a GPU where their rules and
    masks are of the same kinds, and the collectives of sharded parameters. Their random policies draw apart, also with
    the same seed, because a parameter's number is counted over the whole chain. If such a member has
    `on_nonfinite="skip"` and a gradient is not finite, its own or another member's, nobody steps.

    `defaults` has the options that all members have. So `OneCycleLR` and `CyclicLR` cycle the momentum if all members
    have `betas`, or all have `momentum`. For Muon beside AdamW they raise a ValueError that says to pass
    `cycle_momentum=False`.

    Args:
        members: a list of optimizers, or a dictionary that names them. In a list, their names are "0", "1", and so on.
            Each is a `SelectiveUpdate` or any `torch.optim.Optimizer`. Don't step them yourself any more. A scheduler
            or a hook may be attached to one of them.

    Raises:
        TypeError: a member is no optimizer, or is a `ChainedOptimizer`.
        ValueError: there is no member, a parameter is in two of them, or a member's step requires a closure.

    The name is Megatron-LM's. There it also scales and clips gradients; here that is left to the training loop.
    """

    chains_optimizers = True

    policy = in_the_groups("policy_groups[i].policy")
    preconditioner = in_the_groups("preconditioner_groups[i].preconditioner")
    on_nonfinite, seed = in_the_members(), in_the_members()

    def __init__(self, members: Sequence[Optimizer] | Mapping[str, Optimizer]) -> None:
        self._members = named_members(members)
        self._members.check_apart()
        self._members.number()
        self._constructing = True  # torch's constructor would build groups of its own; ours are the members'
        Optimizer.__init__(self, self._members.groups(), self._members.shared_defaults())
        self._constructing = False

    @property
    def members(self) -> tuple[Optimizer, ...]:
        """The optimizers, in order."""
        return self._members.optimizers

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in order."""
        return self._members.names

    def member(self, which: int | str) -> Optimizer:
        """Return the member with this name or index. Raises ValueError if there is none."""
        return self._members.find(which)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The members' own groups, one member after the other. The list can't be changed, its dictionaries can."""
        return self._members.groups()

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._constructing:
            self._members.set_groups(groups)

    @property
    def state(self) -> Any:
        """The state of all members by parameter, live; that of the only member if there is one."""
        return self.members[0].state if len(self.members) == 1 else ChainedState(self._members)

    @state.setter
    def state(self, value: Any) -> None:
        if self._constructing:
            return
        if len(self.members) == 1:
            self.members[0].state = value
        else:
            ChainedState(self._members).replace(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the member that the key "member" names: `{"params": [...], "member": "rest"}`.

        The value is a member's name or index. Only a chain of one member needs none. The key is not kept in the group.

        Raises:
            ValueError: the key is missing, no member has that name, or another member has one of the parameters.
        """
        if self._constructing:
            return
        group = dict(param_group)
        if "member" not in group and len(self.members) > 1:
            raise ValueError(
                f"ChainedOptimizer: add_param_group needs to know which member takes the group: add the key 'member' "
                f"with its name or index. The members are {self._members.listed()}"
            )
        self._members.add_group(self._members.find(group.pop("member", 0)), group)

    @property
    def policy_groups(self) -> tuple[PolicyGroup | None, ...]:
        """The policy of each parameter group, in the order of `param_groups`; None for groups of bare members."""
        groups: list[PolicyGroup | None] = []
        for optimizer in self.members:
            groups += (
                optimizer.policy_groups
                if isinstance(optimizer, SelectiveUpdate)
                else [None] * len(optimizer.param_groups)
            )
        return tuple(groups)

    @property
    def preconditioner_groups(self) -> tuple[PreconditionerGroup | None, ...]:
        """The preconditioner of each parameter group, in the same order; None for groups of bare members."""
        return tuple(None if group is None else group.preconditioning for group in self.policy_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The members' own `zero_grad`."""
        for optimizer in self.members:
            optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        # Only what schedule-free optimizers have and training loops call, as SelectiveUpdate hands it on.
        members = self.__dict__.get("_members")
        if name in ("train", "eval") and members is not None:
            having = [optimizer for optimizer in members.optimizers if hasattr(optimizer, name)]
            if having:
                return partial(_call_each, having, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all members. Returns what the closure returns, which runs once, before anything moves.

        If a bare member's step raises, the members before it have stepped.
        """
        if torch.compiler.is_dynamo_compiling():
            return step_outside_of_graphs(self._step, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = run_closure(closure)
        step_members(self._members)
        return loss

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were left out because a member has `on_nonfinite="skip"`; after a resume from 0."""
        return max((one.skipped_steps for one in self.members if isinstance(one, SelectiveUpdate)), default=0)

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """The statistics of all wrapped members; see `SelectiveUpdate.statistics`.

        They stand under the parameters' names. If two members use the same name, the member's name comes before it:
        "rest/0.weight".
        """
        return statistics(self._members)

    def explain(self) -> str:
        """For each member, under its name: what `SelectiveUpdate.explain` says, or that it is stepped as it is."""
        return explain(self._members)

    def init_state(self) -> None:
        """Make all state now, as the first step would, without moving a parameter; see `SelectiveUpdate.init_state`.

        Bare members make theirs, too. Those that neither Adam, AdamW, SGD nor Lion are may have counted one step.
        """
        self._members.number()
        for optimizer in self.members:
            if isinstance(optimizer, SelectiveUpdate):
                with self._members.naming(optimizer):
                    optimizer.init_state()
            else:
                for group in optimizer.param_groups:
                    make_base_state(optimizer, group, group["params"])

    def state_dict(self) -> dict[str, Any]:
        """torch's form, `{"state", "param_groups"}`, with the parameters counted on over all members."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._members.number()
        saved = save(self._members)
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, saved)
            saved = saved if result is None else result
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of a chain with the same members in the same order: all of it, or nothing at all.

        Checkpoints of the members alone are of another form: load those into the members.

        Raises:
            ValueError: a member can't take its part, for the reason that the message gives.
        """
        with said_by(CHAIN):
            checkpoint = checked_frame(state_dict)
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                result = hook(self, checkpoint)
                checkpoint = checkpoint if result is None else checked_frame(result)
            self._members.number()
            load(self._members, checkpoint)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"version": Version(), "members": list(self.members), "names": list(self.names)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle: all of it. Of `{"state", "param_groups", "defaults"}`: as torch's optimizers do it."""
        if "members" in state:
            if "version" not in state:
                same_version(None)
            self._members = Members(state["members"], state["names"])
            self._members.number()
            self.defaults, self._constructing = self._members.shared_defaults(), False
            Optimizer.__setstate__(self, {})
            return
        unknown = sorted(set(state) - {"state", "param_groups", "defaults"})
        if unknown:
            raise ValueError(
                f"ChainedOptimizer: __setstate__ got {', '.join(map(repr, unknown))}, and takes 'state', "
                f"'param_groups' and 'defaults', or what __getstate__ returns; nothing was set"
            )
        if "param_groups" in state:
            self.param_groups = state["param_groups"]
        if "state" in state:
            self.state = state["state"]
        self.defaults = dict(state.get("defaults", self.defaults))

    def __repr__(self) -> str:
        inside = "\n".join(f"{name}: {optimizer!r}" for name, optimizer in self._members)
        return f"{type(self).__name__} ({', '.join(described(optimizer) for optimizer in self.members)})\n{inside}"


def _call_each(optimizers: Sequence[Optimizer], name: str) -> None:
    for optimizer in optimizers:
        getattr(optimizer, name)()
