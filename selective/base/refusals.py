"""The reasons why a base cannot be wrapped: each is a sentence with what was found and what to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def refused_unseen(base: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Return the reason to refuse `base` that shows without a step; None if there is none."""
    name = type(base).__name__
    for attribute, value in vars(base).items():
        if isinstance(value, Optimizer):
            inner = type(value).__name__
            return (
                f"{name} is itself a wrapper (around {inner}, its attribute '{attribute}'), whose step cannot be seen "
                f"into; wrap {inner} directly."
            )
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return _several_evaluations(name, "its step() requires a closure")
    if getattr(base, "is_second_order", False):  # timm's loops ask for it
        return _second_derivatives(name, "it says is_second_order")
    if group.get("gradient_release"):
        return (
            f"{name} has gradient_release=True: it steps inside backward, where nothing can come between; construct it "
            "with gradient_release=False."
        )
    return None


def untriable(base: Optimizer, reason: str) -> str:
    """Return the reason to refuse a base that cannot be cloned; `reason` is the message of `CannotClone`."""
    return f"{type(base).__name__} cannot be tried out: {reason}; use a base that keeps its state in `state`."


def unsteppable(base: Optimizer, error: BaseException) -> str:
    """Return the reason to refuse a base whose clone raised `error` in its step."""
    name, text = type(base).__name__, f"{type(error).__name__}: {error}".splitlines()[0]
    if "closure" in text.lower() or "backward" in text.lower():
        return _several_evaluations(name, f"without a closure: {text}")
    if "does not require grad" in text or "'hess'" in text:
        return _second_derivatives(name, text)
    if "sparse" in text.lower():
        return (
            f"{name} does not step on dense gradients ({text}), and selection needs dense ones; use a dense base, for "
            "instance torch.optim.Adam with nn.Embedding(sparse=False)."
        )
    return (
        f"{name} could not be stepped on tensors that stand in for its parameters ({text}), so what its update does is "
        "not known; if it needs a set-up before its first step (train(), hooks, an option), do that first."
    )


def motionless(base: Optimizer) -> str:
    """Return the reason to refuse a base whose clone did not move its parameters on gradients that are not zero."""
    name = type(base).__name__
    return (
        f"{name} did not move the tensors that stand in for its parameters, so what its update does is not known: it "
        "steps a list of parameters of its own instead of its param_groups, or its learning rate is 0 under a name "
        "that is not 'lr'; use a base that steps what its param_groups hold, at a learning rate above 0."
    )


def _several_evaluations(name: str, cause: str) -> str:
    return (
        f"{name} evaluates the loss several times in a step ({cause}), so there is no one gradient to select by; use a "
        "base that steps from p.grad alone."
    )


def _second_derivatives(name: str, cause: str) -> str:
    return (
        f"{name} takes second derivatives of the loss in its step, through gradients made with create_graph=True "
        f"({cause}), and gradients that are handed to it here have no graph. Use a base that steps from the values of "
        "p.grad alone, for instance AdamW with preconditioner=Soap() for curvature."
    )


def refused_seen(base: Optimizer, group: Mapping[str, Any], embeds: tuple[str, ...]) -> str | None:
    """Return the reason to refuse `base` that shows in its state or its group after a step; None if there is none.

    `embeds` are the names of state entries that follow the iterates.
    """
    name = type(base).__name__
    if embeds:
        entries = " and ".join(f"'{k}'" for k in embeds)
        return (
            f"{name} keeps iterates in its state ({entries}), and parameters that a mask moves would part from them; "
            "use a base whose state comes from gradients alone."
        )
    if {"d", "d0"} <= set(group):  # Prodigy and D-Adaptation keep this pair in the group
        return (
            f"{name} estimates the distance to the solution ('d' and 'd0' in its group) from the steps it believes to "
            "have taken, and masked steps are others; use AdamW with a learning rate."
        )
    return None
