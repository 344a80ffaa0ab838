"""Rows 4, 13, 14, 15 and 31: closures, missing gradients, and the loops that people write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selective.testing.harness import (
    Bits,
    NotApplicable,
    base_of,
    build,
    build_over,
    entries,
    require,
    require_same_entries,
    require_same_path,
    require_same_values,
    step_alike,
    train,
    trajectory,
    values,
)
from selective.testing.model import LATE
from selective.testing.probes import ClearsGradients, ProbeAdam, WritesOnGradients
from selective.testing.report import conformance_checks
from selective.testing.subject import Subject


@conformance_checks.register(
    4, "under Lightning, which steps with a closure, another algorithm runs than in a plain loop."
)
def closure_equals_manual_step(subject: Subject) -> None:
    """`step(closure)` moves everything as backward followed by `step()` does, bit for bit, and returns the loss."""
    model, wrapper = build(subject)
    expected = trajectory(model, wrapper, range(7))
    model, wrapper = build(subject)
    path = []
    for step in range(7):
        losses: list[Tensor] = []

        def closure(step: int = step, losses: list[Tensor] = losses) -> Tensor:
            wrapper.zero_grad()
            losses.append(model.loss(step))
            losses[-1].backward()
            return losses[-1]

        returned = wrapper.step(closure)  # type: ignore[arg-type]  # torch says float, and takes tensors
        require(len(losses) > 0, "the closure was not called.")
        same = returned is not None and torch.equal(torch.as_tensor(returned).detach(), losses[0].detach())
        require(same, f"step(closure) returned {returned!r}, the closure {losses[0]!r}.")
        path.append(values(model))
    require_same_path(path, expected, "step(closure) against backward() and step()")


@conformance_checks.register(4, "a second evaluation doubles the cost, and one without gradients trains on nothing.")
def closure_runs_once_first_with_gradients(subject: Subject) -> None:
    """The closure runs once a step, before anything has moved, with gradients enabled even under `no_grad`."""
    model, wrapper = build(subject)
    for step in range(3):
        before, calls = values(model), []

        def closure(step: int = step, calls: list[tuple[bool, Bits]] = calls) -> Tensor:
            calls.append((torch.is_grad_enabled(), values(model)))
            wrapper.zero_grad()
            with torch.enable_grad():
                loss = model.loss(step)
                loss.backward()
            return loss

        with torch.no_grad():
            wrapper.step(closure)  # type: ignore[arg-type]
        require(len(calls) == 1, f"the closure ran {len(calls)} times in step {step + 1}.")
        require(calls[0][0], "the closure ran with gradients disabled.")
        require_same_values(calls[0][1], before, "when the closure ran, parameters had moved already")


@conformance_checks.register(
    13, "models with unused experts, frozen layers or adapters crash, or their idle weights drift."
)
def gradients_may_be_missing(subject: Subject) -> None:
    """Any parameter may have no gradient in any step: it stays where it is, and so does the base's state of it."""
    model, wrapper = build(subject, late=False)
    params = list(model.named_parameters())
    for step in range(6):
        wrapper.zero_grad()
        model.loss(step).backward()
        left_out = [(i, name, p) for i, (name, p) in enumerate(params) if (i + step) % 3 == 0]
        for _, _, p in left_out:
            p.grad = None
        before, state = values(model), _state_of_base(subject, wrapper)
        wrapper.step()
        for i, name, p in left_out:
            require(torch.equal(p, before[name]), f"{name!r} had no gradient in step {step + 1} and moved.")
            if i in state:
                require_same_entries(
                    {i: _state_of_base(subject, wrapper).get(i, {})}, {i: state[i]}, f"no gradient in step {step + 1}"
                )
    before = values(model)
    wrapper.zero_grad(set_to_none=True)
    wrapper.step()
    require_same_values(values(model), before, "a step in which no parameter had a gradient")


def _state_of_base(subject: Subject, wrapper: torch.optim.Optimizer) -> dict:
    return entries(subject.get_base(wrapper)) if subject.get_base is not None else {}


@conformance_checks.register(13, "layers that are unfrozen later never train, or move before they are.")
def first_gradient_may_come_late(subject: Subject) -> None:
    """A parameter gets its first gradient in step 5: unmoved before, moving from then on; a frozen one never moves."""
    model, wrapper = build(subject)
    start = values(model)
    path = trajectory(model, wrapper, range(LATE + 4))
    for step, point in enumerate(path):
        if step < LATE:
            require(torch.equal(point["late"], start["late"]), f"'late' moved in step {step}, before any gradient.")
        require(torch.equal(point["frozen"], start["frozen"]), f"the frozen parameter moved in step {step}.")
    require(not torch.equal(path[-1]["late"], start["late"]), "'late' had gradients in 4 steps and never moved.")


@conformance_checks.register(14, "over a base that writes on gradients, it works with what is left of them.")
def base_may_write_on_gradients(subject: Subject) -> None:
    """Over a base that overwrites or clears `p.grad`, the path is that over the same base that does not."""
    expected = trajectory(*build_over(subject, ProbeAdam), range(7))
    for probe in (WritesOnGradients, ClearsGradients):
        try:
            model, wrapper = build_over(subject, probe)
        except (TypeError, ValueError, NotImplementedError) as refusal:
            raise NotApplicable(f"refuses such a base when it is wrapped: {refusal}") from refusal
        require_same_path(trajectory(model, wrapper, range(7)), expected, f"over a base that {probe.__name__}")


@conformance_checks.register(15, "a run under accelerate, whose `prepare` does this, is another run than without.")
def unstepped_state_round_trip(subject: Subject) -> None:
    """`load_state_dict(state_dict())` before the first step changes nothing."""
    expected = trajectory(*build(subject), range(7))
    model, wrapper = build(subject)
    wrapper.load_state_dict(wrapper.state_dict())
    require_same_path(trajectory(model, wrapper, range(7)), expected, "after an unstepped state_dict round trip")


@conformance_checks.register(
    15, "under FSDP2 or accelerate, which put other tensors into the groups, the model is not trained."
)
def parameters_may_be_swapped(subject: Subject) -> None:
    """Parameters in the groups replaced by others of the same values: the others are trained, along the same path."""
    expected = trajectory(*build(subject), range(7))
    old, wrapper = build(subject)
    new, _ = build(subject)
    start = values(old)
    other = dict(zip(old.parameters(), new.parameters(), strict=True))
    for group in wrapper.param_groups:
        group["params"] = [other[p] for p in group["params"]]
    require_same_path(trajectory(new, wrapper, range(7)), expected, "after the parameters were swapped")
    require_same_values(values(old), start, "the parameters that were swapped out")


@conformance_checks.register(31, "clipping that the wrapper does not see lets a loss spike through.")
def clipping_is_seen(subject: Subject) -> None:
    """`clip_grad_norm_` and `clip_grad_value_` before the step act as the same gradients assigned anew would."""
    clipped, wrapper = build(subject)
    assigned, other = build(subject)
    for step in range(6):
        wrapper.zero_grad()
        clipped.loss(step).backward()
        nn.utils.clip_grad_value_(clipped.parameters(), 1e-3)
        nn.utils.clip_grad_norm_(clipped.parameters(), 1e-2)
        for p, q in zip(clipped.parameters(), assigned.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        step_alike(wrapper, other)
        require_same_values(values(clipped), values(assigned), f"gradients clipped in place, step {step + 1}")


@conformance_checks.register(31, "with gradient accumulation, most of every batch is thrown away.")
def accumulation_is_seen(subject: Subject) -> None:
    """Two backward passes before a step act as their summed gradients assigned at once."""
    summed, wrapper = build(subject)
    assigned, other = build(subject)
    for step in range(0, 10, 2):
        wrapper.zero_grad()
        summed.loss(step).backward()
        summed.loss(step + 1).backward()
        for p, q in zip(summed.parameters(), assigned.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        step_alike(wrapper, other)
        require_same_values(values(summed), values(assigned), f"accumulated gradients, step {step // 2 + 1}")


@conformance_checks.register(31, "in GANs and actor-critic loops, one of two optimizers disturbs the other.")
def several_optimizers_do_not_meet(subject: Subject) -> None:
    """Two wrappers stepped in turn move as each does alone."""
    alone = [trajectory(*build(subject, seed=seed), range(6)) for seed in (0, 1)]
    pairs = [build(subject, seed=seed) for seed in (0, 1)]
    together: list[list[Bits]] = [[], []]
    for step in range(6):
        for i, (model, wrapper) in enumerate(pairs):
            train(model, wrapper, [step])
            together[i].append(values(model))
    for i in (0, 1):
        require_same_path(together[i], alone[i], f"optimizer {i + 1} of two in one loop")
    if subject.get_base is not None:
        first, second = (base_of(subject, wrapper) for _, wrapper in pairs)
        require(first is not second, "two wrappers share one base.")
