"""SelectiveUpdate: the face of the library, and being an optimizer. Its parts do the work; each can be built alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.bind import bind as bind_class
from selective.capture.choose import CaptureName
from selective.checkpoint.frame import checked_frame
from selective.checkpoint.load import load
from selective.checkpoint.pickles import contents, parts
from selective.checkpoint.save import save
from selective.checkpoint.set_state import set_as_torch
from selective.explain.groups import explain
from selective.for_model.for_model import for_model as optimizer_for_model
from selective.messages.assignments import SET_POLICY, at_construction, in_the_groups
from selective.messages.construction import NOT_GIVEN, names_unknown_arguments, nothing_to_do
from selective.norms import Norm, norm_from
from selective.plan.advice import warn_of_no_decay, warn_of_rotations
from selective.plan.groups import Groups
from selective.plan.norm_plan import warn_of_norms
from selective.plan.options import Graph, OnNonfinite, Options, Scope
from selective.plan.policy_groups import KEYS, DecayGroup, NormGroup, PolicyGroup, PreconditionerGroup
from selective.plan.refusals import check_arguments
from selective.plan.rotation_plan import warn_of_two_rotations
from selective.policies import Decay, Policy, decay_from, policy_from
from selective.policies.view import StepView
from selective.preconditioner import MatrixView, Preconditioner, check_matrix_view, preconditioner_from
from selective.rotation.basis import MaskSpace
from selective.state.init_state import make_all_state
from selective.state.merged_view import MergedState
from selective.state.store import StateStore, follow_changes
from selective.state.writing import OptimizerStateBackend
from selective.step.begin import begin_step, run_closure, take_steps
from selective.step.gradients import is_initialisation
from selective.step.outside_of_graphs import prepare, step_outside_of_graphs
from selective.step.run import StepRunner
from selective.step_count import StepCount


class SelectiveUpdate(Optimizer):
    """Makes any momentum optimizer selective: each coordinate of its update is multiplied by a policy's mask.

        opt = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=3e-4), policy=MGUP())

    It is a `torch.optim.Optimizer` over the base's own parameter groups and state: schedulers, checkpoints, gradient
    scalers and clipping work as they do with the base.

    Args:
        base: the optimizer to wrap. Don't step it yourself any more.
        policy: a `Policy`, a kind's name ("MGUP"), a dict with a `kind`, or a function of a `StepView` that returns a
            mask; None is `Dense()`. A `policy` in one of the base's parameter groups overrides it for that group (None
            there: dense) and is moved to `policy_groups`.
        decay: which coordinates decoupled weight decay reaches: `CautiousDecay(...)`, a kind's name or a dict with a
            `kind`; None: all. A `decay` in a parameter group overrides it (None there: all).
        norm: a rule about the norms of matrices: `NormControl(...)` keeps them, a kind's name or a dict with a
            `kind`; None: the base moves them. A `norm` in a parameter group overrides it (None there: none).
        preconditioner: rotates the gradients of matrices before the base sees them: a `Preconditioner`, a kind's name
            or a dict with a `kind`. A `preconditioner` in a parameter group overrides it (None there: none).
        matrix_view: which parameters are matrices, and how: "matrices" (2-D ones only), "conv" (also [out, in, ...] as
            [out, in * ...]), "experts" (also [..., m, n] as a batch) or "rows:3" (as 3 matrices one below the other,
            such as joined queries, keys and values; 2 and 4, too), or "columns:3" (side by side, as in GPT-2). A
            `matrix_view` in a group overrides it.
        mask_space: what the policy sees of rotated parameters: "rotated" tensors, or the "original" space's.
        capture: how the base's update is obtained: "fused", "scratch" or "delta"; "auto" takes the first that is right
            for this base. `explain()` says which, and why.
        momentum_beta: keep a first moment of our own, m <- beta m + (1 - beta) g in float32, for a base without one.
        on_nonfinite: NaN or infinite gradients: "ignore" as torch does; "skip" the step (`skipped_steps` counts them);
            "raise" with the parameter's name. The last two synchronise with a GPU. Nothing has moved when they act.
        seed: of random policies. They draw by address (seed, step, parameter, element): the same after a resume and on
            every rank; torch's generators are not touched.
        statistics: collect what `statistics()` reports in every step. It stays on the device.
        stochastic_rounding: round bfloat16 and float16 parameters stochastically, by address, instead of to nearest.
        scope: of sharded parameters (`DTensor`): "global" selects what one device would, with a few small collectives a
            step; "local" takes each rank's shard for a tensor of its own, with none.
        graph: on a GPU, "auto" records the launches of a step in a CUDA graph where they repeat, and replays it: the
            same results with less of the host's time. False, or `SELECTIVE_GRAPH=0` in the environment: never.

    A base that rotates or orthogonalises gradients itself (SOAP, Muon) warns under a preconditioner.

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`.
        ValueError: the base can't be wrapped, or the policy needs a momentum that it does not have; with the reason.
    """

    preconditioner = in_the_groups("preconditioner_groups[i].preconditioner")
    matrix_view = in_the_groups("preconditioner_groups[i].matrix_view")
    decay = in_the_groups("decay_groups[i].decay")
    norm = in_the_groups("norm_groups[i].norm")
    mask_space, capture, momentum_beta, on_nonfinite = (at_construction() for _ in range(4))
    seed, stochastic_rounding, scope, graph = (at_construction() for _ in range(4))

    @names_unknown_arguments
    def __init__(
        self,
        base: Optimizer,
        policy: Policy | Callable[[StepView], Any] | dict[str, Any] | str | None = NOT_GIVEN,
        *,
        decay: Decay | dict[str, Any] | str | None = None,
        norm: Norm | dict[str, Any] | str | None = None,
        preconditioner: Preconditioner | dict[str, Any] | str | None = None,
        matrix_view: MatrixView = "matrices",
        mask_space: MaskSpace = "rotated",
        capture: CaptureName = "auto",
        momentum_beta: float | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        seed: int = 0,
        statistics: bool = True,
        stochastic_rounding: bool = False,
        scope: Scope = "global",
        graph: Graph = "auto",
    ) -> None:
        check_arguments(SelectiveUpdate, base, capture, momentum_beta, on_nonfinite, seed, mask_space, scope, graph)
        options = Options(
            capture=capture, momentum_beta=momentum_beta, on_nonfinite=on_nonfinite, statistics=statistics,
            rounding=stochastic_rounding, scope=scope, mask_space=mask_space, graph=graph,
        )  # fmt: skip
        named = policy_from(None if policy is NOT_GIVEN else policy)
        view = check_matrix_view(matrix_view, "")
        preconditioning = PreconditionerGroup(preconditioner_from(preconditioner), view)
        default = PolicyGroup(named, preconditioning, DecayGroup(decay_from(decay)), NormGroup(norm_from(norm)))
        count = StepCount(seed)
        self._put_together(base, options, Groups(base, options, default), StateStore(base, options, count), count)
        self._constructing = True  # torch's constructor would build groups of its own; ours are the base's
        Optimizer.__init__(self, base.param_groups, base.defaults)
        self._constructing = False
        said = [(group, {key: group[key] for key in KEYS if key in group}) for group in base.param_groups]
        try:
            follow_changes(self.groups, self.store)
            self.store.join_base(self.groups.plans)
            if self.groups.places:
                warn_of_two_rotations(base)
            warn_of_rotations(self.groups.plans)
            warn_of_norms(self.groups.plans)
            warn_of_no_decay(base, self.groups.plans)
            given = (
                policy is not NOT_GIVEN
                or any(each is not None for each in (decay, norm, preconditioner))
                or any(own for _, own in said)
            )
            if not given and on_nonfinite == "ignore":
                warnings.warn(nothing_to_do(base), stacklevel=3)
        except BaseException:
            for group, own in said:  # the base is as it was given: wrapping it again finds what its groups said
                group.update(own)
            raise

    def _put_together(
        self, base: Optimizer, options: Options, groups: Groups, store: StateStore, count: StepCount
    ) -> None:
        """Assign the parts. Objects that stand in for this one share them, so whatever changes is inside of a part."""
        self.base, self.options, self.groups, self.store, self.count = base, options, groups, store, count
        self.runner = StepRunner(options, count, store)
        prepare()

    bind = classmethod(bind_class)
    for_model = classmethod(optimizer_for_model)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own list: what a scheduler or a user changes in it, the base sees."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._constructing:
            self.base.param_groups = groups

    @property
    def state(self) -> MergedState:
        """The base's state and ours, by parameter: a live view with the keys of `state_dict()["state"]`."""
        self.count.read()
        return MergedState(self._state_backend())

    @state.setter
    def state(self, value: Any) -> None:
        if not self._constructing:
            self._state_backend().write_states(value, instead=True)

    def _state_backend(self) -> OptimizerStateBackend:
        return OptimizerStateBackend(self.base, self.groups, self.store, self.count)

    @property
    def policy_groups(self) -> list[PolicyGroup]:
        """The policy of each parameter group, with its hyper-parameters by name."""
        return self.groups.policies

    @policy_groups.setter
    def policy_groups(self, groups: list[PolicyGroup]) -> None:
        self.groups.policies = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; a `policy` in it overrides the wrapper's for this group."""
        if self._constructing:
            return
        follow_changes(self.groups, self.store)  # groups that were added on the base come before this one
        group = dict(param_group)
        taken = self.groups.take_in(group)
        self.base.add_param_group(group)
        self.policy_groups.append(taken)
        try:
            follow_changes(self.groups, self.store)
        except Exception:
            self.base.param_groups.pop()
            self.policy_groups.pop()
            raise
        self.store.join_base(self.groups.plans)
        warn_of_rotations(self.groups.plans[-1:])
        warn_of_norms(self.groups.plans[-1:])

    @property
    def policy(self) -> Policy:
        """The policy of groups that name none. To change one, set `opt.policy_groups[i].policy` or its entries."""
        return self.groups.default.policy

    @policy.setter
    def policy(self, policy: Any) -> NoReturn:
        raise AttributeError(SET_POLICY)

    @property
    def preconditioner_groups(self) -> tuple[PreconditionerGroup, ...]:
        """The preconditioner of each group with its hyper-parameters by name, as `policy_groups` has policies."""
        return tuple(group.preconditioning for group in self.policy_groups)

    @property
    def decay_groups(self) -> tuple[DecayGroup, ...]:
        """The selective decay of each group with its hyper-parameters by name, as `policy_groups` has policies."""
        return tuple(group.decaying for group in self.policy_groups)

    @property
    def norm_groups(self) -> tuple[NormGroup, ...]:
        """The rule about norms of each group with its hyper-parameters by name, as `policy_groups` has policies."""
        return tuple(group.norming for group in self.policy_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own `zero_grad`."""
        self.base.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        # Only what schedule-free optimizers have and training loops call. Forwarding everything would hand a GradScaler
        # the base's private flag that it unscales gradients itself.
        if name in ("train", "eval") and hasattr(self.__dict__.get("base"), name):
            return getattr(self.__dict__["base"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returns.

        1. Run the closure, if any, with gradients enabled, once. Then follow what was changed in groups, policies and
           state, or refuse it.
        2. Check the gradients, and then the state against its parameters. Nothing has moved until here.
        3. With a preconditioner: refresh the bases P, Q that are due, carry the moments into them.
        4. ... and rotate: g <- P^T g Q, of the parameters that it takes.
        5. The base's rule: moments move, always densely; out comes u.
        6. Select, then strengthen: mask = policy(g, u, m).
        7. Apply p <- factor p - P (mask ⊙ u) Q^T; decoupled decay reaches every coordinate and is never masked. With a
           norm that is kept: turn p by a relative rate instead, and without decay.
        8. Let the preconditioner observe the gradients, count the step, hand out its statistics.
        """
        if torch.compiler.is_dynamo_compiling():
            return step_outside_of_graphs(self._step, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = run_closure(closure)  # 1
        begun = begin_step(self.runner, self.groups)  # 1, 2
        if not begun.recording and is_initialisation(self.param_groups):
            begun.initialise()
        elif begun.has_nonfinite():
            begun.skip()
        else:
            take_steps([begun])  # the rest of 2, and 3 to 8
        return loss

    @property
    def skipped_steps(self) -> int:
        """The number of steps that `on_nonfinite="skip"` left out. A resumed run starts at 0 again."""
        return self.count.skipped

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """The selection of the last step, for each parameter by name; see `selective.statistics.StepStatistics.read`.

        0-d float32 tensors on the parameter's device; reading them on the host is what synchronises. Of groups whose
        policy is `Dense()` there is only what a preconditioner reports, of rotated parameters; before the first step
        there is nothing.
        """
        if not self.options.statistics:
            raise RuntimeError("SelectiveUpdate: nothing was collected; construct it with statistics=True")
        return {} if self.runner.report is None else self.runner.report.read()

    def explain(self) -> str:
        """For each kind of parameter group: policy, capture and why, decay, momentum, memory, advice on the rate."""
        follow_changes(self.groups, self.store)
        return explain(self.base, self.groups.plans, self.options, self.store)

    def init_state(self) -> None:
        """Make all state now, as the first step would, without moving a parameter.

        For a base with a fused rule, dense groups and other captures included, this is exactly their state before the
        first step. Other base optimizers make it in a step with zero gradients and learning rate 0, as
        torch.distributed.checkpoint does it; those that count steps have counted one then.
        """
        follow_changes(self.groups, self.store)
        make_all_state(self.groups.plans, self.store)

    def state_dict(self) -> dict[str, Any]:
        """torch's form, `{"state", "param_groups"}`: the base's own, with our entries under `selective/`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = save(self.base, self.groups, self.store, self.count)
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, saved)
            saved = saved if result is None else result
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the plain base: all of it, or nothing at all.

        What can be known beforehand is checked before anything is loaded; where the base refuses it later, all is put
        back. The tensors of the base's state are shared with the checkpoint, as torch does it.

        dtypes are kept exactly. The checkpoint's hyper-parameters win, of policy and preconditioner as of the base; a
        policy or a preconditioner of another kind, or another basis, is a ValueError.
        """
        checkpoint = checked_frame(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, checkpoint)
            checkpoint = checkpoint if result is None else checked_frame(result)
        for warning in load(checkpoint, self.base, self.groups, self.store, self.count):
            warnings.warn(warning, stacklevel=2)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return contents(self.base, self.options, self.groups, self.store, self.count)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle: all of it. Of `{"state", "param_groups", "defaults"}`: as torch's optimizers do it."""
        if "base" not in state:
            set_as_torch(state, self.base, self.groups, self.store, self.count)
            self.defaults = self.base.defaults
            return
        self._put_together(*parts(state))
        self.defaults, self._constructing = self.base.defaults, False
        Optimizer.__setstate__(self, {})

    def __repr__(self) -> str:
        policies = ", ".join(repr(group.policy) for group in self.policy_groups)
        found = [group.preconditioning.preconditioner for group in self.policy_groups]
        rotated = f", preconditioner={', '.join(map(repr, found))}" if any(p is not None for p in found) else ""
        found = [group.decay for group in self.decay_groups]
        decays = f", decay={', '.join(map(repr, found))}" if any(d is not None for d in found) else ""
        found = [group.norm for group in self.norm_groups]
        norms = f", norm={', '.join(map(repr, found))}" if any(n is not None for n in found) else ""
        return f"{type(self).__name__}({self.base!r}, policy={policies}{decays}{norms}{rotated})"
