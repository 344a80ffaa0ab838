"""Wrappers that are each broken in one way. `BROKEN` names, for each, the checks that have to notice."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from honest import HalfAgainst, Identity
from torch import Tensor
from torch.optim import Optimizer

BROKEN: dict[type, tuple[str, ...]] = {}


def fails(*checks: str) -> Callable[[type], type]:
    """Register a broken wrapper with the checks that have to name it."""

    def add(cls: type) -> type:
        BROKEN[cls] = checks
        return cls

    return add


def trainable(wrapper: Optimizer) -> list[Tensor]:
    return [p for group in wrapper.param_groups for p in group["params"] if p.grad is not None]


# Rows 1 to 3: being an optimizer, schedules, groups


@fails("is_an_optimizer", "huggingface_trainer_trains_with_it")
class NotAnOptimizer:
    """Forwards by hand."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.state, self.defaults = base, base.state, base.defaults
        self.param_groups = base.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def state_dict(self) -> Any:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.base.load_state_dict(state_dict)


@fails("is_an_optimizer")
class NoInit(Identity):
    """Never calls `Optimizer.__init__`, so that it has no hooks and torch did not patch `step`."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.defaults, self._constructing = base, base.defaults, False

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@fails("has_the_signatures_of_torch")
class NeedsALoss(Identity):
    def step(self, loss: Any = None) -> Any:  # type: ignore[override]
        return super().step(loss)


@fails("schedulers_reach_the_base", "learning_rate_zero_stops", "param_groups_are_those_of_the_base")
class CopiesGroups(Identity):
    """Shows groups of its own; what the base uses stays as it was."""

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        if "_own" not in self.__dict__:
            self._own = [dict(group) for group in self.base.param_groups]
        return self._own

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        if not self._constructing:
            self._own = groups


@fails("param_groups_are_those_of_the_base")
class KeepsAStaleReference(Identity):
    """Stores the base's list once; `base.load_state_dict` makes another."""

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.__dict__.setdefault("_stored", self.base.param_groups)

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        if not self._constructing:
            self._stored = self.base.param_groups = groups


@fails("add_param_group_reaches_the_base")
class IgnoresAddedGroups(Identity):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        pass


@fails("learning_rate_zero_stops")
class NoiseWithoutRate(Identity):
    """Adds a constant that no learning rate scales."""

    def inner_step(self) -> None:
        self.step_base()
        for p in trainable(self):
            p.data.add_(1e-4)


# Row 4: closures


@fails("closure_runs_once_first_with_gradients")
class ClosureTwice(Identity):
    def unpatched_step(self, closure: Any) -> Any:
        if closure is not None:
            closure()
        return super().unpatched_step(closure)


@fails("closure_runs_once_first_with_gradients")
class ClosureWithoutGradients(Identity):
    @torch.no_grad()
    def unpatched_step(self, closure: Any) -> Any:
        loss = closure() if closure is not None else None
        super().unpatched_step(None)
        return loss


@fails("closure_runs_once_first_with_gradients")
class ClosureLast(Identity):
    """Steps on the gradients that are there, then asks for the loss."""

    def unpatched_step(self, closure: Any) -> Any:
        super().unpatched_step(None)
        return closure() if closure is not None else None


@fails("closure_equals_manual_step")
class GradientsBeforeClosure(HalfAgainst):
    """Looks at the gradients of the step before, because the closure has not run yet."""

    def unpatched_step(self, closure: Any) -> Any:
        old = {p: p.grad.clone() for p in trainable(self)}
        self._grads = old if closure is not None else {}
        return super().unpatched_step(closure)

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        return super().mask(p, update, self._grads.get(p, grad).float())


@fails("closure_equals_manual_step", "lightning_trains_with_it")
class ClosureSkipsSelection(HalfAgainst):
    """With a closure it turns into its base, as a wrapper does that hands the closure on."""

    def unpatched_step(self, closure: Any) -> Any:
        return super().unpatched_step(None) if closure is None else self.base.step(closure)


@fails("closure_equals_manual_step")
class DropsTheLoss(Identity):
    def unpatched_step(self, closure: Any) -> Any:
        super().unpatched_step(closure)


# Row 5: hooks


@fails("step_hooks_fire_once_around_the_step")
class GlobalHooksTwice(Identity):
    """Calls the base's step as torch patched it."""

    def step_base(self) -> None:
        self.base.step()


@fails("step_hooks_fire_once_around_the_step", "is_an_optimizer")
class NoStepHooks(Identity):
    """Keeps torch from patching its `step`."""

    def _patch_step_function(self) -> None:
        pass

    def step(self, closure: Any = None) -> Any:
        return Identity.step.__wrapped__(self, closure)  # type: ignore[attr-defined]


@fails("step_hooks_fire_once_around_the_step")
class StepHooksTwice(Identity):
    def inner_step(self) -> None:
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (), {})
        self.step_base()


@fails("step_hooks_fire_once_around_the_step")
class HooksHandedToTheBase(Identity):
    """They fire with the base's part of the step, before the wrapper has changed the parameters."""

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.base.register_step_post_hook(hook)


@fails("state_dict_hooks_fire_once")
class NoLoadHooks(Identity):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = {k: state_dict[k] for k in ("state", "param_groups")}
        self.base.load_state_dict(state_dict)
        self.restore_dtypes(state_dict)


@fails("state_dict_hooks_fire_once")
class StateDictOfTheBase(Identity):
    """Hands `state_dict` on, so that the wrapper's own hooks are forgotten."""

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()


# Rows 6 to 8, 10 and 11: copies, checkpoints, the base's state


@fails("copies_step_as_the_original")
class SharesStateWithCopies(Identity):
    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.base)


@fails("copies_step_as_the_original")
class CopiesWithoutTheBase(Identity):
    """torch's own `__getstate__`, which knows of no base."""

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_constructing=False, base=torch.optim.SGD(state["param_groups"], lr=0.1))
        self._patch_step_function()


@fails("copies_step_as_the_original", "attributes_of_the_base_do_not_leak", "grad_scaler_changes_nothing")
class BlanketGetattr(Identity):
    """Whatever it lacks it takes from the base: recursion where the base is not there yet, and the fused-AMP flag."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __reduce__(self) -> Any:
        return object.__reduce_ex__(self, 2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _ = self.anything_before_the_base_is_there
        super().__setstate__(state)


@fails("state_dict_has_the_shape_of_torch")
class NestedStateDict(Identity):
    def state_dict(self) -> dict[str, Any]:
        return {"base": super().state_dict(), "policy": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["base"])


@fails("state_dict_has_the_shape_of_torch")
class DictionariesInState(Identity):
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "state": {i: {**e, "policy": {"kind": "half"}} for i, e in state["state"].items()}}


@fails("resumes_bit_for_bit")
class CountsOutsideTheState(HalfAgainst):
    """Its strength follows a counter that no checkpoint holds."""

    count = 0

    def inner_step(self) -> None:
        self.count += 1
        self.rest = 1 / self.count
        super().inner_step()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "count": self.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.count = state["count"]


@fails("resumes_bit_for_bit")
class LosesStateOnLoad(Identity):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})


@fails("resumes_bit_for_bit")
class SavesClasses(Identity):
    """A checkpoint that only arbitrary code can read."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "param_groups": [{**group, "policy": type(self)} for group in state["param_groups"]]}


@fails("state_dtypes_survive_a_load")
class RoundsOnLoad(Identity):
    """Leaves it to torch, which casts to the parameter's dtype."""

    def restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        pass


@fails("own_state_survives_a_load_in_bfloat16")
class RoundsItsOwnOnLoad(Identity):
    """Keeps a float32 average beside the base's entries, and gets it back as bfloat16."""

    def inner_step(self) -> None:
        self.step_base()
        for p in trainable(self):
            self.base.state[p].setdefault("average", torch.tensor(0.1, dtype=torch.float32))

    def restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        pass


@fails("checkpoint_of_the_base_loads")
class WantsItsOwnCheckpoint(Identity):
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "param_groups": [{**group, "wrapped": True} for group in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not all(group.pop("wrapped", False) for group in state_dict["param_groups"]):
            raise KeyError("wrapped")
        super().load_state_dict(state_dict)


@fails("base_part_loads_into_the_base")
class OptionsInGroups(Identity):
    """Leaves a colliding name in the groups that it shares with the base."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        for group in base.param_groups:
            group["alpha"] = 2.0


@fails("base_part_loads_into_the_base")
class ShowsOtherMoments(Identity):
    """Its checkpoint holds bias-corrected moments, which the base would take for its own."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        scaled = {i: {k: v * 1.5 if k == "exp_avg" else v for k, v in e.items()} for i, e in state["state"].items()}
        return {**state, "state": scaled}


@fails("base_state_is_left_to_the_base")
class StepsOnInit(Identity):
    """Has the base make its moments by a step on zeros, as schedule-free wrappers do; the count is then one ahead."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        self.step_base()
        base.zero_grad()


@fails("base_state_is_left_to_the_base", "nothing_foreign_in_the_base_state")
class StateBeforeTheBase(Identity):
    """Puts its own entry where the base asks whether there is any: AdamW then finds no `exp_avg`."""

    def inner_step(self) -> None:
        for p in trainable(self):
            self.base.state[p].setdefault("selective", torch.zeros(()))
        self.step_base()


@fails("nothing_foreign_in_the_base_state")
class StateAfterTheBase(Identity):
    def inner_step(self) -> None:
        self.step_base()
        for p in trainable(self):
            self.base.state[p]["selective"] = torch.zeros(())


# Row 9: torch.distributed.checkpoint


@fails("state_shows_what_the_base_has", "distributed_checkpoint_round_trip", "flattened_checkpoint_round_trip")
class ShowsNoState(Identity):
    """`state_dict()` is whole, `state` is empty: read after `zero_grad`, the base is stepped once more; flattened,
    every moment is lost."""

    @property
    def state(self) -> Any:  # type: ignore[override]
        return defaultdict(dict)

    @state.setter
    def state(self, value: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()


@fails("flattened_checkpoint_round_trip", "state_shows_what_the_base_has")
class HidesItsMoments(Identity):
    """Truthy, but the names in `state` are not those of `state_dict`: the flattened form asks for the names."""

    @property
    def state(self) -> Any:  # type: ignore[override]
        return {p: {"step": entry["step"]} for p, entry in self.base.state.items() if "step" in entry}

    @state.setter
    def state(self, value: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()


@fails("unstepped_distributed_checkpoint", "unstepped_flattened_checkpoint")
class NoZeroRate(Identity):
    """Moves parameters in the initialisation step, in which the learning rate is 0."""

    def inner_step(self) -> None:
        with torch.no_grad():
            for p in trainable(self):
                p.mul_(0.999)
        self.step_base()


@fails("initialisation_step_moves_nothing_of_the_wrapper")
class CountsEveryStep(Identity):
    """Shows an average beside the base's state that moves in every step."""

    average = 1.0

    def inner_step(self) -> None:
        self.step_base()
        self.average = 0.9 * self.average + 0.05

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "state": {i: {**e, "average": self.average} for i, e in state["state"].items()}}


# Rows 12 to 15, 17, 31


@fails("grad_scaler_changes_nothing")
class ClaimsToUnscale(Identity):
    """Says that it unscales gradients itself, and does not."""

    _step_supports_amp_scaling = True


@fails("gradients_may_be_missing", "first_gradient_may_come_late")
class NeedsEveryGradient(HalfAgainst):
    def inner_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(1.0)
        super().inner_step()


@fails("gradients_may_be_missing", "first_gradient_may_come_late")
class DecaysEverything(Identity):
    """Decays what got no gradient, frozen parameters included."""

    def inner_step(self) -> None:
        self.step_base()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - 1e-3 * float(group["lr"]))


@fails("base_may_write_on_gradients")
class GradientsAfterTheBase(HalfAgainst):
    def inner_step(self) -> None:
        taken = trainable(self)
        before = [p.detach().clone() for p in taken]
        self.step_base()
        for p, old in zip(taken, before, strict=True):
            update = old - p.detach()
            kept = 1 - self.mask(p, update, p.grad)
            p.data.add_(kept * update)


@fails("unstepped_state_round_trip", "accelerate_prepares_it")
class LoadMeansResumed(Identity):
    """Takes any load for a resume and skips its first, dense step."""

    loaded = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.loaded = True

    def inner_step(self) -> None:
        self.step_base()
        if self.loaded:
            for p in trainable(self):
                p.data.add_(1e-3)


@fails("parameters_may_be_swapped")
class KeepsParameters(HalfAgainst):
    """Remembers the parameters that it was built with."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.known = {id(p): p for group in base.param_groups for p in group["params"]}

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        return super().mask(self.known[id(p)], update, grad)


@fails("parameters_may_be_swapped")
class StepsTheOldOnes(HalfAgainst):
    """The same, silently: what it does not know it leaves to the base."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.known = {id(p) for group in base.param_groups for p in group["params"]}

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        return super().mask(p, update, grad) if id(p) in self.known else torch.ones_like(p)


@fails("modes_reach_the_base")
class NoModes(Identity):
    """Keeps a flag of its own."""

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False


@fails("clipping_is_seen", "accumulation_is_seen")
class GradientsFromBackward(HalfAgainst):
    """Takes gradients from a hook as they arrive, before clipping, the last micro-batch only."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.arrived: dict[Tensor, Tensor] = {}
        for group in base.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    p.register_hook(lambda grad, p=p: self.arrived.__setitem__(p, grad.clone()))

    def inner_step(self) -> None:
        for p in trainable(self):
            p.grad = self.arrived.get(p, p.grad).clone()
        self.arrived.clear()
        super().inner_step()


@fails("several_optimizers_do_not_meet")
class CountsForAll(HalfAgainst):
    """A counter on the class, where it belongs to each instance."""

    steps: ClassVar[dict[str, int]] = {}

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        type(self).steps["all"] = 0

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        type(self).steps["all"] += 1
        self.rest = 1 / type(self).steps["all"]
        return super().mask(p, update, grad)


# Rows 24, 25, 29, 30


@fails("bfloat16_updates_do_not_vanish")
class RoundsFourTimes(Identity):
    """Adds the update in four parts, each rounded to the parameter's dtype."""

    def inner_step(self) -> None:
        taken = trainable(self)
        saved = [p.detach().clone() for p in taken]
        self.step_base()
        for p, old in zip(taken, saved, strict=True):
            part = (p.detach() - old) / 4
            p.data.copy_(old)
            for _ in range(4):
                p.data.add_(part)


@fails("inexact_moments_are_understood")
class SelectsByCodes(HalfAgainst):
    """Reads `exp_avg` as it is stored."""

    rest = 0.0

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        moment = self.base.state[p].get("exp_avg", update)
        return torch.where(moment.float() * grad > 0, 1.0, self.rest)


@fails("compensation_stays_within_its_cap", "nothing_aligned_stays_finite")
class NoCap(HalfAgainst):
    """Keeps the mean multiplier at 1 whatever it takes: by numel / count, 0/0 included."""

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        selected = (update * grad > 0).float()
        return selected * (selected.numel() / selected.sum())


@fails("nothing_aligned_stays_finite")
class CappedButNotGuarded(NoCap):
    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        return super().mask(p, update, grad).clamp(max=2.0)


@fails("global_generators_do_not_move", "replicas_stay_identical")
class DrawsFromTheGlobalGenerator(HalfAgainst):
    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        return (torch.rand_like(p) < 0.5).float()


@fails("global_generators_do_not_move")
class SeedsFromPython(Identity):
    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.seed = random.getrandbits(32)


@fails("global_generators_are_not_read")
class DrawsAndPutsBack(HalfAgainst):
    """Leaves the generator as it was, and depends on it all the same."""

    def mask(self, p: Tensor, update: Tensor, grad: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return (torch.rand_like(p) < 0.5).float()


# Rows 20 and 23: what a step must not cost again and again


@fails("schedules_do_not_recompile")
class CompilesForEachRate(Identity):
    """A compiled function with the learning rate as a constant."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.scaled = torch.compile(lambda x, rate: x * rate, backend="eager", dynamic=False)

    def inner_step(self) -> None:
        self.step_base()
        self.scaled(torch.ones(2), float(self.param_groups[0]["lr"]))


@fails("memory_does_not_grow", "memory_is_as_claimed")
class KeepsEveryUpdate(Identity):
    """Collects what it did, for a plot that nobody draws."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.updates: list[Tensor] = []

    def inner_step(self) -> None:
        self.step_base()
        self.updates += [p.detach().clone() for p in trainable(self)]


@fails("memory_is_as_claimed")
class KeepsACopy(Identity):
    """One copy of the parameters, where it claims none."""

    def inner_step(self) -> None:
        self.copies = [p.detach().clone() for p in trainable(self)]
        self.step_base()
