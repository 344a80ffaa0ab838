"""SelectiveUpdate: the step, and being an optimizer. What is saved is in checkpoint.py, who decides in policies/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.hyperparameters import scalar
from selective.base.step_base import base_hooks, run_step_on
from selective.bind import Bindable
from selective.capture.choose import CaptureName
from selective.explain.groups import explain
from selective.plan.policy_groups import KEYS, PolicyGroup, PreconditionerGroup
from selective.plan.refusals import check_arguments
from selective.plan.rotation_plan import warn_of_two_rotations
from selective.policies import Policy, policy_from
from selective.preconditioner import MatrixView, Preconditioner, check_matrix_view, preconditioner_from
from selective.rotation.basis import MaskSpace
from selective.sharding.dtensor import shard_of
from selective.statistics import Report
from selective.step.gradients import OnNonfinite, any_nonzero_gradient, check_gradients, nonfinite_gradient
from selective.step.run import Running, Scope
from selective.step_count import check_recordable, is_recording


class SelectiveUpdate(Bindable, Running, Optimizer):
    """Makes any momentum optimizer selective: each coordinate of its update is multiplied by a policy's mask.

        opt = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=3e-4), policy=MGUP())

    It is a `torch.optim.Optimizer` over the base's own parameter groups and state: schedulers, checkpoints, gradient
    scalers and clipping work as they do with the base.

    Args:
        base: the optimizer to wrap. Don't step it yourself any more.
        policy: a `Policy`, a kind's name ("MGUP") or a dict with a `kind`; None is `Dense()`. A `policy` in one of the
            base's parameter groups overrides it for that group (None there: dense) and is moved to `policy_groups`.
        preconditioner: rotates the gradients of matrices before the base sees them: a `Preconditioner`, a kind's name
            or a dict with a `kind`. A `preconditioner` in a parameter group overrides it (None there: none).
        matrix_view: which parameters are matrices, and how: "matrices" (2-D ones only), "conv" (also [out, in, ...] as
            [out, in * ...]), "experts" (also [..., m, n] as a batch) or "rows:3" (as 3 matrices one below the other,
            such as joined queries, keys and values; 2 and 4, too). A `matrix_view` in a group overrides it.
        mask_space: what the policy sees of rotated parameters: "rotated" tensors, or the "original" space's.
        capture: how the base's update is obtained: "fused", "scratch" or "delta"; "auto" takes the first that is right
            for this base. `explain()` says which, and why.
        momentum_beta: keep a first moment of our own, m <- beta m + (1 - beta) g in float32, for bases without one.
        on_nonfinite: NaN or infinite gradients: "ignore" as torch does; "skip" the whole step; "raise" with the
            parameter's name. The last two synchronise with a GPU. Nothing has moved when they act.
        seed: of random policies. They draw by address (seed, step, parameter, element): the same after a resume and on
            every rank; torch's generators are not touched.
        statistics: collect what `statistics()` reports in every step. It stays on the device.
        stochastic_rounding: round bfloat16 and float16 parameters stochastically, by address, instead of to nearest.
        scope: of sharded parameters (`DTensor`): "global" selects what one device would, with a few small collectives a
            step; "local" takes each rank's shard for a tensor of its own, with none.

    A base that rotates or orthogonalises gradients itself (SOAP, Muon) warns under a preconditioner.

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`.
        ValueError: the base can't be wrapped, or the policy needs a momentum that it does not have; with the reason.
    """

    def __init__(
        self,
        base: Optimizer,
        policy: Policy | dict[str, Any] | str | None = None,
        *,
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
    ) -> None:
        check_arguments(SelectiveUpdate, base, capture, momentum_beta, on_nonfinite, seed, mask_space, scope)
        self.base = base
        self._live: dict[str, Any] = {}  # Note [stand-ins]
        self._default = policy_from(policy)
        view = check_matrix_view(matrix_view, "")
        self._default_preconditioning = PreconditionerGroup(preconditioner_from(preconditioner), view)
        self._mask_space: MaskSpace = mask_space
        self._wanted: CaptureName = capture
        self._momentum_beta = momentum_beta
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._seed, self._steps = seed, 0
        self._statistics = statistics
        self._stochastic_rounding = stochastic_rounding
        self._scope: Scope = scope
        self._report, self._own = None, {}
        self.policy_groups: list[PolicyGroup] = []
        self._choices = {}
        self._start_planning()
        self._constructing = True  # torch's constructor would build groups of its own; ours are the base's
        Optimizer.__init__(self, base.param_groups, base.defaults)
        self._constructing = False
        named = [(group, {key: group[key] for key in KEYS if key in group}) for group in base.param_groups]
        try:
            self._plan()
            self._make_own_state(self._has_base_state)
            if self._places:
                warn_of_two_rotations(base)
        except BaseException:
            for group, own in named:  # the base is as it was given: wrapping it again finds what its groups said
                group.update(own)
            raise

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own list: what a scheduler or a user changes in it, the base sees."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._constructing:
            self.base.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; a `policy` in it overrides the wrapper's for this group."""
        if self._constructing:
            return
        self._plan()  # groups that were added on the base come before this one
        group = dict(param_group)
        taken = self._taken(group)
        self.base.add_param_group(group)
        self.policy_groups.append(taken)
        try:
            self._plan()
        except Exception:
            self.base.param_groups.pop()
            self.policy_groups.pop()
            raise
        self._make_own_state(self._has_base_state)

    @property
    def policy(self) -> Policy:
        """The policy of groups that name none. To change one, set `opt.policy_groups[i].policy` or its entries."""
        return self._default

    @property
    def preconditioner_groups(self) -> tuple[PreconditionerGroup, ...]:
        """The preconditioner of each group with its hyper-parameters by name, as `policy_groups` has policies."""
        return tuple(group.preconditioning for group in self.policy_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own `zero_grad`."""
        self.base.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        # Only what schedule-like bases have and training loops call. Forwarding everything would hand a GradScaler the
        # base's private flag that it unscales gradients itself.
        if name in ("train", "eval") and hasattr(self.__dict__.get("base"), name):
            return getattr(self.__dict__["base"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returns.

        1. Run the closure, if any, with gradients enabled, once.
        2. Look at the gradients; all our own checks run here, before anything has moved.
        3. With a preconditioner: refresh the bases P, Q that are due, carry the moments into them.
        4. ... and rotate: g <- P^T g Q, of the parameters that it takes.
        5. The base's rule: moments move, always densely; out comes u.
        6. Select, then strengthen: mask = policy(g, u, m).
        7. Apply p <- factor p - P (mask ⊙ u) Q^T; decoupled decay reaches every coordinate and is never masked.
        8. Let the preconditioner observe the gradients, count the step, hand out its statistics.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # 1
        self._plan()
        present = [plan.params.with_gradient() for plan in self._plans]
        check_gradients(self._plans, present)  # 2
        recording = self._is_recorded()
        if not recording and self._is_initialisation():
            with base_hooks(self.base):
                run_step_on(self.base, self.param_groups)
            self._make_own_state(lambda parameter: parameter.tensor.grad is not None)
            return loss
        if self._on_nonfinite != "ignore":
            where = nonfinite_gradient(present)
            if where is not None and self._on_nonfinite == "raise":
                raise FloatingPointError(
                    f"SelectiveUpdate: the gradient of parameter {where!r} is not finite in step {self._steps}; "
                    f"nothing has moved. Clip or skip (on_nonfinite='skip')"
                )
            if where is not None:
                return loss
        if not recording:
            self._settle()
            self._fit_states()
        report = Report() if self._statistics else None
        clocked = self._clocked()
        self._steps = self._clocks.start(clocked, self._seed, self._steps, recording)
        self._run(self._jobs(present, report, recording))  # 3 to 8
        self._clocks.tick(clocked, recording)
        self._steps += not recording
        self._report = report
        return loss

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """What the last step selected, for each parameter by name; see `selective.statistics.Report.read`.

        0-d float32 tensors on the parameter's device; reading them on the host is what synchronises. Of groups whose
        policy is `Dense()` there is only what a preconditioner reports, of rotated parameters; before the first step
        there is nothing.
        """
        if not self._statistics:
            raise RuntimeError("SelectiveUpdate: nothing was collected; construct it with statistics=True")
        return {} if self._report is None else self._report.read()

    def explain(self) -> str:
        """For each parameter group: its policy, how the update is captured and why, decay, momentum, extra memory."""
        self._plan()
        return explain(
            self.base, self._plans, self._momentum_beta, self._mask_space, self._scope, self._statistics,
            self._stochastic_rounding,
        )  # fmt: skip

    def _is_recorded(self) -> bool:
        """Whether this step goes into a CUDA graph; an error where its replays would not be steps."""
        if not any(plan.params.cuda_devices for plan in self._plans) or not is_recording():
            return False
        check_recordable(self.base, self.param_groups, self._on_nonfinite, bool(self._places), self._asks_others())
        return True

    def _asks_others(self) -> bool:
        """Whether any parameter that is masked has parts on other ranks, whom a step has to ask."""
        masked = (p for plan in self._plans if not plan.is_dense for p in plan.params.tensors)
        return self._scope == "global" and any(shard_of(p) is not None for p in masked)

    def _is_initialisation(self) -> bool:
        """Whether this is torch.distributed.checkpoint's way to make state: learning rate 0 and zero gradients."""
        rates = [group.get("lr") for group in self.param_groups]
        if any(r is None or (isinstance(r, Tensor) and r.device.type != "cpu") or scalar(r) != 0.0 for r in rates):
            return False
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(tensors) and not any_nonzero_gradient(tensors)
