"""Row 9: `torch.distributed.checkpoint.state_dict`, which reads an optimizer in ways of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from selective.testing.harness import (
    NotApplicable,
    base_of,
    build,
    difference,
    entries,
    own_entries,
    require,
    require_same_entries,
    require_same_path,
    require_same_values,
    set_learning_rate,
    through_a_file,
    train,
    trajectory,
    values,
)
from selective.testing.report import conformance_checks
from selective.testing.subject import Subject

_MOMENTS = "large runs are saved this way; a moment that does not come back is a silent cold start."


def _round_trip(subject: Subject, steps: int, flatten: bool, cleared: bool) -> None:
    """Train `steps` steps, get the state, set it into a fresh wrapper, and train both further."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, wrapper = build(subject, late=False)
    train(model, wrapper, range(steps))
    if cleared:
        wrapper.zero_grad()
    before, state = values(model), entries(wrapper)
    context = f"{'flattened, ' if flatten else ''}{steps} steps{', gradients cleared' if cleared else ''}"
    saved = through_a_file(get_optimizer_state_dict(model, wrapper, options=options))
    require_same_values(values(model), before, f"reading the checkpoint ({context}) moved the model")
    if steps > 0:
        require_same_entries(entries(wrapper), state, f"reading the checkpoint ({context}) moved the state")
    fresh, loaded = build(subject, late=False)
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, loaded, saved, options=options)
    require_same_values(values(fresh), before, f"loading the checkpoint ({context}) moved the model")
    trained = {i: e for i, e in entries(wrapper).items() if _parameters(wrapper)[i].requires_grad}  # as torch does
    require_same_entries(entries(loaded), trained, f"loaded through DCP ({context})")
    after = range(steps, steps + 4)
    require_same_path(trajectory(fresh, loaded, after), trajectory(model, wrapper, after), f"after DCP ({context})")


@conformance_checks.register(9, _MOMENTS)
def distributed_checkpoint_round_trip(subject: Subject) -> None:
    """get and set, stepped, with and without gradients: all comes back, reading moves nothing, training goes on."""
    _round_trip(subject, 3, flatten=False, cleared=False)
    _round_trip(subject, 3, flatten=False, cleared=True)


@conformance_checks.register(9, _MOMENTS)
def flattened_checkpoint_round_trip(subject: Subject) -> None:
    """The same in the flattened form, which looks up the names of live state entries."""
    _round_trip(subject, 3, flatten=True, cleared=False)
    _round_trip(subject, 3, flatten=True, cleared=True)


@conformance_checks.register(
    9, "loading a checkpoint into a fresh trainer, which asks for this first, moves parameters or fails."
)
def unstepped_distributed_checkpoint(subject: Subject) -> None:
    """get and set on a wrapper that has never stepped: no parameter moves, and both go on alike."""
    _round_trip(subject, 0, flatten=False, cleared=False)


@conformance_checks.register(
    9, "loading a checkpoint into a fresh trainer, which asks for this first, moves parameters or fails."
)
def unstepped_flattened_checkpoint(subject: Subject) -> None:
    """The same in the flattened form."""
    _round_trip(subject, 0, flatten=True, cleared=False)


@conformance_checks.register(9, "after loading through DCP, averages and counters start from a step that never was.")
def initialisation_step_moves_nothing_of_the_wrapper(subject: Subject) -> None:
    """torch's initialisation step (learning rate 0, zero gradients) leaves parameters and the wrapper's own state."""
    model, wrapper = build(subject, late=False)
    train(model, wrapper, range(3))
    rate, before, wrapper_state = float(wrapper.param_groups[0]["lr"]), values(model), own_entries(subject, wrapper)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    set_learning_rate(wrapper, 0.0)
    wrapper.step()
    set_learning_rate(wrapper, rate)
    require_same_values(values(model), before, "a step with learning rate 0 and zero gradients moved the model")
    after = own_entries(subject, wrapper)
    require_same_entries(after, wrapper_state, "a step with learning rate 0 and zero gradients")
    _first_entries_are_initial(subject)


def _first_entries_are_initial(subject: Subject) -> None:
    """Read through DCP before the first step, the wrapper's own entries are those that `init_state()` makes."""
    model, wrapper = build(subject, late=False)
    if not hasattr(wrapper, "init_state"):
        return
    wrapper.init_state()  # type: ignore[attr-defined]
    expected = own_entries(subject, wrapper)
    model, wrapper = build(subject, late=False)
    get_optimizer_state_dict(model, wrapper)
    require_same_entries(own_entries(subject, wrapper), expected, "read through DCP before the first step")


@conformance_checks.register(9, "saving through DCP in mid-training steps the optimizer, or leaves moments out.")
def state_shows_what_the_base_has(subject: Subject) -> None:
    """Once the base has state, the wrapper's `state` is true and shows the keys of `state_dict()["state"]`."""
    model, wrapper = build(subject)
    train(model, wrapper, range(2))
    base = base_of(subject, wrapper)
    if not any(len(entry) for entry in base.state.values()):
        raise NotApplicable("the base keeps no state")
    require(bool(wrapper.state), "`state` is empty although the base has stepped.")
    saved = wrapper.state_dict().get("state")
    if saved is None:
        raise NotApplicable("its state_dict is not of torch's form (row 7)")
    for index, p in enumerate(_parameters(wrapper)):
        live: dict[str, Any] = dict(wrapper.state[p]) if p in wrapper.state else {}
        expected = saved.get(index, {})
        require(set(live) == set(expected), f"`state` of parameter {index} shows {sorted(map(str, live))}, "
                f"state_dict has {sorted(map(str, expected))}.")  # fmt: skip
        for key, value in expected.items():
            text = difference(live[key], value) if isinstance(value, Tensor) else None
            require(text is None, f"`state` entry {key!r} of parameter {index} {text}, by state_dict.")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
