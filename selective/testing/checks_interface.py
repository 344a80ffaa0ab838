"""Rows 1, 2, 3, 5 and 17: a wrapper as schedulers, trainers and hooks see it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from selective.testing.harness import (
    NotApplicable,
    base_of,
    build,
    build_over,
    require,
    set_learning_rate,
    train,
    values,
)
from selective.testing.probes import HasModes, ProbeAdam
from selective.testing.report import conformance_checks
from selective.testing.subject import Subject

_HOOKS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
_METHODS = ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group",
            *(f"register_{hook}_hook" for hook in _HOOKS))  # fmt: skip


@conformance_checks.register(
    1, "learning-rate schedulers refuse it with a TypeError, and GradScaler and trainers miss attributes."
)
def is_an_optimizer(subject: Subject) -> None:
    """A `torch.optim.Optimizer` with every attribute that `Optimizer.__init__` makes."""
    _, wrapper = build(subject)
    require(isinstance(wrapper, Optimizer), f"{type(wrapper).__name__} is not a torch.optim.Optimizer.")
    for hook in _HOOKS:
        name = f"_optimizer_{hook}_hooks"
        require(isinstance(getattr(wrapper, name, None), dict), f"it has no dictionary {name}.")
    require(isinstance(getattr(wrapper, "defaults", None), dict), "`defaults` is not a dictionary.")
    require(hasattr(wrapper.state, "items"), f"`state` is a {type(wrapper.state).__name__}, not a mapping.")
    patched = getattr(type(wrapper).step, "hooked", False)
    require(patched, "`step` is not patched by torch (`Optimizer.__init__` did not run, or it was replaced).")


@conformance_checks.register(1, "a call that works with every optimizer of torch is a TypeError here.")
def has_the_signatures_of_torch(subject: Subject) -> None:
    """Names and kinds of arguments are torch's; extra ones have defaults."""
    _, wrapper = build(subject)
    for method in _METHODS:
        require(hasattr(wrapper, method), f"it has no method {method}.")
        parameters = list(inspect.signature(getattr(wrapper, method)).parameters.values())
        expected = list(inspect.signature(getattr(Optimizer, method)).parameters.values())[1:]
        pairs = zip(parameters, expected, strict=False)  # the lengths are compared next
        same = len(parameters) >= len(expected) and all(a.name == b.name and a.kind == b.kind for a, b in pairs)
        optional = all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                       for p in parameters[len(expected) :])  # fmt: skip
        shown = ", ".join(str(p) for p in parameters)
        require(same and optional, f"{method}({shown}), where torch has ({', '.join(str(p) for p in expected)}).")
    default = inspect.signature(wrapper.step).parameters["closure"].default
    require(default is None, "step() needs a closure.")


def _sequential(o: Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 4)]
    return lr_scheduler.SequentialLR(o, parts, milestones=[3])


def _schedules(cycle: bool) -> dict[str, Callable[[Optimizer], Any]]:
    return {
        "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8, cycle_momentum=cycle),
        "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
        "SequentialLR": _sequential,
    }


@conformance_checks.register(2, "a schedule that does not reach the base trains at the wrong learning rate, silently.")
def schedulers_reach_the_base(subject: Subject) -> None:
    """StepLR, OneCycleLR, ReduceLROnPlateau and SequentialLR move the base's groups as they move the base alone."""
    defaults = build(subject.alone())[1].defaults
    for name, attach in _schedules("betas" in defaults or "momentum" in defaults).items():
        seen = []
        for stepped in (subject, subject.alone()):
            model, optimizer = build(stepped)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # torch warns where it cannot see `step` being called
                schedule = attach(optimizer)
                rates = []
                for step in range(6):
                    train(model, optimizer, [step])
                    schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
                    group = (stepped.get_base(optimizer) if stepped.get_base else optimizer).param_groups[0]
                    rates.append({k: str(group[k]) for k in ("lr", "betas", "momentum") if k in group})
                    require(str(optimizer.param_groups[0]["lr"]) == rates[-1]["lr"],
                            f"{name}: the wrapper shows lr {optimizer.param_groups[0]['lr']}, the base uses "
                            f"{rates[-1]['lr']}.")  # fmt: skip
            seen.append(rates)
        require(seen[0] == seen[1], f"{name}: the base saw {seen[0][-1]} after 6 steps, alone it sees {seen[1][-1]}.")


@conformance_checks.register(2, "parameters move where a warm-up starts and a schedule ends, at a learning rate of 0.")
def learning_rate_zero_stops(subject: Subject) -> None:
    """With learning rate 0 in the wrapper's groups nothing moves; set back, it does."""
    model, wrapper = build(subject)
    train(model, wrapper, [0])
    rate, before = float(wrapper.param_groups[0]["lr"]), values(model)
    set_learning_rate(wrapper, 0.0)
    train(model, wrapper, [1, 2])
    moved = [name for name, value in values(model).items() if not torch.equal(value, before[name])]
    require(not moved, f"with learning rate 0 in `param_groups`, {', '.join(moved)} moved.")
    set_learning_rate(wrapper, rate)
    train(model, wrapper, range(3, 9))
    still = [name for name, value in values(model).items() if torch.equal(value, before[name]) and name != "frozen"]
    require(not still, f"with the learning rate back at {rate}, {', '.join(still)} did not move in 6 steps.")


@conformance_checks.register(3, "a learning rate or decay that is set in a group has no effect on the training.")
def param_groups_are_those_of_the_base(subject: Subject) -> None:
    """`param_groups` is the base's own list: after construction, after a load, and when it is set."""
    model, wrapper = build(subject)
    base = base_of(subject, wrapper)
    require(wrapper.param_groups is base.param_groups, "`param_groups` is not the base's own list.")
    train(model, wrapper, [0])
    wrapper.load_state_dict(wrapper.state_dict())
    same = wrapper.param_groups is base_of(subject, wrapper).param_groups
    require(same, "after load_state_dict, `param_groups` is no longer the base's list (the base replaces its own).")
    wrapper.param_groups = [dict(group) for group in wrapper.param_groups]
    set_learning_rate(wrapper, 0.125)
    rate = float(base_of(subject, wrapper).param_groups[0]["lr"])
    require(rate == 0.125, f"after setting `param_groups`, an lr of 0.125 there is {rate} in the base.")


@conformance_checks.register(3, "a layer that is unfrozen later would never train.")
def add_param_group_reaches_the_base(subject: Subject) -> None:
    """A group added later is in the base, keeps its own learning rate, and moves."""
    model, _ = build(subject, late=False)
    params = [p for p in model.parameters() if p is not model.square]
    wrapper = subject.build(params)
    train(model, wrapper, [0])
    before, count = model.square.detach().clone(), len(wrapper.param_groups) + 1
    rate = wrapper.param_groups[0]["lr"] * 2
    wrapper.add_param_group({"params": [model.square], "lr": rate, **subject.group_keys})
    require(len(wrapper.param_groups) == count, f"`param_groups` has {len(wrapper.param_groups)} groups, not {count}.")
    added = [group for group in wrapper.param_groups if any(p is model.square for p in group["params"])]
    require(len(added) == 1, f"the new parameter is in {len(added)} groups.")
    require(float(added[0]["lr"]) == float(rate), "the new group does not have the lr it was given.")
    train(model, wrapper, [1, 2])
    require(not torch.equal(model.square, before), "a parameter of the added group did not move in two steps.")
    if subject.get_base is not None:
        groups = base_of(subject, wrapper).param_groups
        there = len(groups) == 2 and any(p is model.square for p in groups[1]["params"])
        require(there, "the added group is not in the base.")


@conformance_checks.register(
    5, "profilers, loggers and FSDP, which hook into steps, count wrongly or look at half of a step."
)
def step_hooks_fire_once_around_the_step(subject: Subject) -> None:
    """The wrapper's own step hooks and torch's global ones fire once, before and after all parameters moved."""
    model, wrapper = build(subject)
    seen: dict[str, list[tuple[Any, torch.Tensor]]] = {}

    def note(kind: str) -> Callable[..., None]:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            seen.setdefault(kind, []).append((optimizer, model.square.detach().clone()))

        return hook

    handles = [
        wrapper.register_step_pre_hook(note("pre-hook")),
        wrapper.register_step_post_hook(note("post-hook")),
        register_optimizer_step_pre_hook(note("global pre-hook")),
        register_optimizer_step_post_hook(note("global post-hook")),
    ]
    try:
        for step in range(2):
            seen.clear()
            before = model.square.detach().clone()
            train(model, wrapper, [step])
            for kind in ("pre-hook", "post-hook", "global pre-hook", "global post-hook"):
                calls = seen.get(kind, [])
                require(len(calls) == 1, f"the {kind} fired {len(calls)} times in step {step + 1}.")
                handed = type(calls[0][0]).__name__
                require(calls[0][0] is wrapper, f"the {kind} was handed a {handed}, not the wrapper.")
                expected = before if "pre" in kind else model.square
                require(torch.equal(calls[0][1], expected), f"the {kind} did not see the parameters "
                        f"{'before' if 'pre' in kind else 'after'} the whole step.")  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()


@conformance_checks.register(
    5, "what a checkpoint library changes in these hooks never gets into the file, or out of it."
)
def state_dict_hooks_fire_once(subject: Subject) -> None:
    """Hooks on the wrapper's state_dict and load_state_dict fire once each, and what they return is used."""
    model, wrapper = build(subject)
    train(model, wrapper, [0])
    fired: list[str] = []

    def marked(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        fired.append("state_dict post")
        return {**state, "marked": True}

    def unmarked(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        fired.append("load pre")
        return {key: value for key, value in state.items() if key != "marked"}

    wrapper.register_state_dict_pre_hook(lambda _: fired.append("state_dict pre"))
    wrapper.register_state_dict_post_hook(marked)
    wrapper.register_load_state_dict_pre_hook(unmarked)
    wrapper.register_load_state_dict_post_hook(lambda _: fired.append("load post"))
    state = wrapper.state_dict()
    require("marked" in state, "what a state_dict post-hook returned was dropped.")
    wrapper.load_state_dict(state)
    expected = ["state_dict pre", "state_dict post", "load pre", "load post"]
    require(fired == expected, f"the hooks fired as {fired}, expected {expected}.")


@conformance_checks.register(
    17, "over a base with modes, as schedule-free ones have, training or evaluation is on the wrong weights."
)
def modes_reach_the_base(subject: Subject) -> None:
    """`train()` and `eval()` of the base can be called on the wrapper, where the base has them."""
    _, wrapper = build_over(subject, HasModes)
    base = base_of(subject, wrapper)
    for mode in ("eval", "train"):
        require(callable(getattr(wrapper, mode, None)), f"the base has {mode}(), the wrapper has not.")
        getattr(wrapper, mode)()
        require(getattr(base, "mode", None) == mode, f"{mode}() on the wrapper did not call the base's.")
    _, plain = build_over(subject, ProbeAdam)
    for mode in ("eval", "train"):
        method = getattr(plain, mode, None)
        if callable(method):
            method()  # must not raise if the base has no modes: trainers call it on any optimizer that has it


@conformance_checks.register(17, "it hands GradScaler the base's fused-AMP flag: gradients are then never unscaled.")
def attributes_of_the_base_do_not_leak(subject: Subject) -> None:
    """No blanket `__getattr__`: an attribute that only the base has is not on the wrapper."""
    _, wrapper = build(subject)
    base = base_of(subject, wrapper)
    if base is wrapper:
        raise NotApplicable("the subject wraps nothing")
    base.only_the_base_has_this = nn.Identity()  # type: ignore[attr-defined]
    leaks = hasattr(wrapper, "only_the_base_has_this")
    require(not leaks, "an attribute set on the base alone is readable on the wrapper (a blanket __getattr__).")
