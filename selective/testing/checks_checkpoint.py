"""Rows 6, 7, 8, 10 and 11: copies, checkpoints, and leaving the base's state to the base."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selective.testing.harness import (
    CopiedParts,
    base_of,
    build,
    build_over,
    difference,
    entries,
    entries_in,
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
from selective.testing.probes import ExactStates, WatchesState
from selective.testing.report import conformance_checks
from selective.testing.subject import Subject

_COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@conformance_checks.register(
    6, "a sweep, a worker or a snapshot of the best model fails to copy it, or goes on differently."
)
def copies_step_as_the_original(subject: Subject) -> None:
    """A deepcopy or pickle of (model, wrapper), fresh or trained, goes on as the original, and apart from it."""
    reference = trajectory(*build(subject), range(7))
    for how, duplicate in _COPIES.items():
        for age in (0, 3):
            model, wrapper = build(subject)
            train(model, wrapper, range(age))
            twin_model, twin = duplicate((model, wrapper))
            context = f"{how} after {age} steps"
            require(type(twin) is type(wrapper), f"{context}: the copy is a {type(twin).__name__}.")
            start = values(twin_model)
            require_same_path(trajectory(model, wrapper, range(age, 7)), reference[age:], f"{context}, the original")
            require_same_values(values(twin_model), start, f"{context}: stepping the original moved the copy's")
            require_same_path(trajectory(twin_model, twin, range(age, 7)), reference[age:], f"{context}, the copy")
            if subject.get_base is not None:
                same = twin.param_groups is base_of(subject, twin).param_groups
                require(same, f"{context}: the copy's `param_groups` are not its base's.")


@conformance_checks.register(7, "tools that read checkpoints of optimizers (DCP, FSDP, converters) fail on its file.")
def state_dict_has_the_shape_of_torch(subject: Subject) -> None:
    """`{"state", "param_groups"}`; per parameter a flat dictionary of tensors and numbers; indices in the groups."""
    model, wrapper = build(subject)
    train(model, wrapper, range(2))
    state = wrapper.state_dict()
    require(set(state) == {"state", "param_groups"}, f"its keys are {sorted(state)}, not param_groups and state.")
    indices = [i for group in state["param_groups"] for i in group["params"]]
    count = len(list(model.parameters()))
    require(indices == list(range(count)), f"the groups hold the indices {indices}, not 0 to {count - 1}.")
    theirs = base_of(subject, wrapper).state_dict()["state"] if subject.get_base is not None else {}
    for index, entry in state["state"].items():
        require(index in indices, f"`state` has the key {index!r}, which is no parameter's index.")
        for key, value in entry.items():
            plain = value is None or isinstance(value, (Tensor, int, float))
            its_own = key in theirs.get(index, {})
            require(plain or its_own, f"state entry {key!r} is a {type(value).__name__}, not a tensor or number.")


@conformance_checks.register(7, "a resumed run that differs cannot be compared with one that was not interrupted.")
def resumes_bit_for_bit(subject: Subject) -> None:
    """Saved after 3 steps, loaded with `weights_only=True` into a fresh instance, it goes on as if never stopped.

    One parameter gets its first gradient after the resume.
    """
    model, wrapper = build(subject)
    train(model, wrapper, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": wrapper.state_dict()})
    expected = trajectory(model, wrapper, range(3, 9))
    fresh, resumed = build(subject, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    require_same_entries(entries(resumed), entries_in(saved["optimizer"]), "right after the load")
    require_same_path(trajectory(fresh, resumed, range(3, 9)), expected, "resumed from step 3")
    require_same_entries(entries(resumed), entries(wrapper), "9 steps, resumed at 3")


@conformance_checks.register(8, "rounded moments and counters change the run without a word.", mendable=True)
def state_dtypes_survive_a_load(subject: Subject) -> None:
    """For bfloat16 parameters, float32 moments, 64-bit counters and flags come back with dtype and bits."""
    model, wrapper = build_over(subject, ExactStates, dtype=torch.bfloat16)
    train(model, wrapper, range(2))
    saved = through_a_file(wrapper.state_dict())
    _, fresh = build_over(subject, ExactStates, dtype=torch.bfloat16)
    fresh.load_state_dict(saved)
    require_same_entries(entries(fresh), entries_in(saved), "bfloat16 parameters over a base with float32 state")


@conformance_checks.register(8, "rounded state changes the run without a word.", mendable=True)
def own_state_survives_a_load_in_bfloat16(subject: Subject) -> None:
    """For bfloat16 parameters over the subject's base, every state entry comes back with dtype and bits."""
    model, wrapper = build(subject, dtype=torch.bfloat16)
    train(model, wrapper, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": wrapper.state_dict()})
    expected = trajectory(model, wrapper, range(3, 6))
    fresh, resumed = build(subject, dtype=torch.bfloat16)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    require_same_entries(entries(resumed), entries_in(saved["optimizer"]), "bfloat16 parameters")
    require_same_path(trajectory(fresh, resumed, range(3, 6)), expected, "bfloat16 parameters, resumed from step 3")


@conformance_checks.register(
    10, "who adopts the wrapper in mid-run loses the moments, or cannot load the checkpoint at all."
)
def checkpoint_of_the_base_loads(subject: Subject) -> None:
    """A checkpoint of the base alone loads: its moments and hyper-parameters are the base's, and training goes on."""
    model, plain = build(subject.alone())
    set_learning_rate(plain, 0.0625)
    train(model, plain, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": plain.state_dict()})
    fresh, wrapper = build(subject)
    fresh.load_state_dict(saved["model"])
    wrapper.load_state_dict(saved["optimizer"])
    base = base_of(subject, wrapper)
    require_same_entries(entries(base), saved["optimizer"]["state"], "a base checkpoint loaded into the wrapper")
    rate = float(wrapper.param_groups[0]["lr"])
    require(rate == 0.0625, f"the checkpoint's learning rate is 0.0625, after the load it is {rate}.")
    before = values(fresh)
    train(fresh, wrapper, range(3, 9))
    still = [name for name, value in values(fresh).items() if torch.equal(value, before[name]) and name != "frozen"]
    require(not still, f"after loading a base checkpoint, {', '.join(still)} did not move in 6 steps.")


@conformance_checks.register(
    10, "who leaves the wrapper in mid-run loses moments, or gets settings that the base does not know."
)
def base_part_loads_into_the_base(subject: Subject) -> None:
    """The state of the wrapper's base, and the base's part of the wrapper's, load into the base alone."""
    model, wrapper = build(subject)
    train(model, wrapper, range(3))
    saved = through_a_file({"model": model.state_dict(), "base": base_of(subject, wrapper).state_dict()})
    whole = wrapper.state_dict()
    if "state" in whole:
        require_same_entries(whole["state"], saved["base"]["state"], "the wrapper's state against its base's")
    plain_model, plain = build(subject.alone())
    train(plain_model, plain, range(3))  # because some base optimizers write the step into their groups
    extra = set(saved["base"]["param_groups"][0]) - set(plain.state_dict()["param_groups"][0])
    require(not extra, f"the base's groups hold {sorted(extra)}, which the base does not know.")
    plain_model.load_state_dict(saved["model"])
    plain.load_state_dict(saved["base"])
    require_same_entries(entries(plain), saved["base"]["state"], "the base's part loaded into the base")
    train(plain_model, plain, range(3, 5))
    if "state" in whole:
        plain.load_state_dict(wrapper.state_dict())  # extra entries are tolerated by torch; a wrong shape is not


@conformance_checks.register(
    11, "bases ask `len(state) == 0`: with anything in there, they raise a KeyError or never make moments."
)
def base_state_is_left_to_the_base(subject: Subject) -> None:
    """After construction and after a step, the base's state is what it is without the wrapper: keys, shapes, counts."""
    wrapped_model, wrapper = build(subject)
    plain_model, plain = build(subject.alone())
    require_same_values(values(wrapped_model), values(plain_model), "construction moved a parameter")
    for age in (0, 1, 2):
        if age > 0:
            train(wrapped_model, wrapper, [age - 1])
            train(plain_model, plain, [age - 1])
        wrapped, expected = entries(base_of(subject, wrapper)), entries(plain)
        for index in range(len(list(plain_model.parameters()))):
            ours, theirs = wrapped.get(index, {}), expected.get(index, {})
            require(set(ours) == set(theirs), f"after {age} steps the base's state of parameter {index} holds "
                    f"{sorted(map(str, ours))}, without the wrapper {sorted(map(str, theirs))}.")  # fmt: skip
            for key, value in theirs.items():
                counter = not isinstance(value, Tensor) or value.ndim == 0
                text = difference(ours[key], value) if counter and age == 1 else _layout(ours[key], value)
                require(text is None, f"after {age} steps the base's state entry {key!r} of parameter {index} {text}.")


def _layout(found: Any, expected: Any) -> str | None:
    """The difference in type, shape or dtype, in words; None if there is none."""
    if type(found) is not type(expected):
        return f"is a {type(found).__name__}, alone a {type(expected).__name__}"
    if isinstance(expected, CopiedParts):
        return None if found.kind is expected.kind else f"is a {found.kind.__name__}, alone a {expected.kind.__name__}"
    if isinstance(expected, Tensor) and (found.shape != expected.shape or found.dtype != expected.dtype):
        return f"is {found.dtype} {tuple(found.shape)}, alone {expected.dtype} {tuple(expected.shape)}"
    return None


@conformance_checks.register(
    11, "a base that finds a stranger's entry breaks, and its checkpoint does not load elsewhere."
)
def nothing_foreign_in_the_base_state(subject: Subject) -> None:
    """A base that watches its state never finds an entry that it did not make; not after a resume either."""
    model, wrapper = build_over(subject, WatchesState)
    train(model, wrapper, range(3))
    buffer = io.BytesIO()
    torch.save(wrapper.state_dict(), buffer)
    buffer.seek(0)
    fresh, resumed = build_over(subject, WatchesState)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(fresh, resumed, range(3, 8))
    for optimizer, when in ((wrapper, "in training"), (resumed, "after a resume")):
        base = base_of(subject, optimizer)
        foreign = getattr(base, "foreign", set()) | {
            k for e in entries(base).values() for k in e if k not in ("step", "exp_avg", "exp_avg_sq")
        }
        require(not foreign, f"{when}, the base's state holds {sorted(foreign)}.")
