"""Checks of a step's items against its `StepSpec`, which every implementation shares."""

from __future__ import annotations

from collections.abc import Sequence

from .reference.rules import has_momentum
from .spec import GivenRule, Item, Selection, StepSpec, Strength, check_kinds


def _momentum_wanted(selection: Selection, strength: Strength) -> str | None:
    """The part of a policy that reads a momentum, in words; None if none does."""
    if selection.reads & {"momentum", "previous_momentum"}:
        if selection.kind == "agreement":
            return f"agreement of the {selection.product}"
        return f"top-K by the {selection.score} score" if selection.kind == "top_k" else "the selection's function"
    if "momentum" in strength.reads:
        return "the alignment strength" if strength.kind == "alignment" else "preserving the norm of the momentum"
    return None


def check_items(items: Sequence[Item], spec: StepSpec) -> None:
    """Refuse items that this spec can't step, before anything moves.

    Raises:
        ValueError: a gradient has another shape, there is no momentum where one is read, or a kind is unknown.
        TypeError: a parameter or a gradient is not real floating point.
    """
    check_kinds("selective.kernels", spec)
    if spec.decay is not None and isinstance(spec.rule, GivenRule) and spec.rule.offset != 0:
        raise ValueError("selective decay reads the parameter before the step, and this start is the one after it")
    wanted = _momentum_wanted(spec.selection, spec.strength)
    by_strength = "momentum" in spec.strength.reads
    for item in items:
        if item.grad.shape != item.param.shape:
            raise ValueError(
                f"the gradient of parameter {item.address} has shape {tuple(item.grad.shape)}, "
                f"the parameter {tuple(item.param.shape)}: every element needs its own gradient"
            )
        if not item.param.is_floating_point() or not item.grad.is_floating_point():
            raise TypeError(f"parameter {item.address} is {item.param.dtype}, its gradient {item.grad.dtype}: "
                            "only real floating point tensors can be stepped")  # fmt: skip
        if wanted is None:
            continue
        if spec.keeps_previous and not by_strength and item.state.get("previous_momentum") is not None:
            continue  # a capture that kept only what is read
        if not has_momentum(item, spec.rule):
            raise ValueError(
                f"{wanted} needs a momentum, and {type(spec.rule).__name__} has none for parameter {item.address}: "
                "use a base with momentum, or a policy that reads the update"
            )
        if spec.keeps_previous and isinstance(spec.rule, GivenRule) and item.state.get("previous_momentum") is None:
            raise ValueError(f"{wanted} needs state['previous_momentum'] of parameter {item.address}; it was not kept")
