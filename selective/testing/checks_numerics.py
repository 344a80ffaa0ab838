"""Rows 12, 24, 25, 29, 30 and 32: loss scaling, low precision, caps, generators, configs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective.testing.harness import (
    Bits,
    NotApplicable,
    build,
    build_over,
    entries,
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
from selective.testing.model import ConformanceModel
from selective.testing.probes import CodedMoment, ProbeAdam
from selective.testing.report import conformance_checks
from selective.testing.subject import Subject

_OVERFLOW = 3  # the step whose loss is infinite


def _scaled(make: Callable[[], tuple[ConformanceModel, Optimizer]], steps: int) -> list[Bits]:
    """Train with a GradScaler, and check that the step that overflows leaves parameters and state alone."""
    model, wrapper = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1_000)
    path = []
    for step in range(steps):
        wrapper.zero_grad()
        loss = model.loss(step) * (float("inf") if step == _OVERFLOW else 1.0)
        scaler.scale(loss).backward()
        before, state = values(model), entries(wrapper)
        scaler.step(wrapper)
        scaler.update()
        if step == _OVERFLOW:
            require_same_values(values(model), before, "a step that GradScaler has to skip")
            require_same_entries(entries(wrapper), state, "a step that GradScaler has to skip")
            require(scaler.get_scale() == 128.0, f"an overflow left the scale at {scaler.get_scale()}, not 128.")
        else:
            path.append(values(model))
    return path


@conformance_checks.register(12, "moments a thousand times too large, then NaN parameters.")
def grad_scaler_changes_nothing(subject: Subject) -> None:
    """Scaled by a power of two and unscaled, the path is bit for bit the unscaled one; an overflow moves nothing."""
    makers: dict[str, Callable[[], tuple[ConformanceModel, Optimizer]]] = {"its base": lambda: build(subject)}
    if subject.wrap is not None:
        makers["torch's fused AdamW"] = lambda: build_over(subject, lambda ps: torch.optim.AdamW(ps, fused=True))
    for name, make in makers.items():
        expected = trajectory(*make(), [step for step in range(8) if step != _OVERFLOW])
        require_same_path(_scaled(make, 8), expected, f"with a GradScaler, over {name}")


def _decay_free(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    return optimizer


def _step_with(optimizer: Optimizer, p: nn.Parameter, grad: Tensor) -> Tensor:
    """Take one step with a given gradient. Returns the change of the parameter, in float32."""
    before = p.detach().clone()
    p.grad = grad.to(p.dtype)
    optimizer.step()
    return (p.detach().float() - before.float()).flatten()


_STEPS = 50


def _distance(make: Callable[[Any], Optimizer], dtype: torch.dtype, rate: float) -> float:
    """The mean distance of elements of many magnitudes from their start, after `_STEPS` noisy steps."""
    generator = torch.Generator().manual_seed(3)
    sign = torch.randint(0, 2, (16, 24), generator=generator) * 2.0 - 1.0
    magnitude = 2.0 ** torch.linspace(-3, 3, 16 * 24).reshape(16, 24)
    p = nn.Parameter((magnitude * sign).to(dtype))
    start = p.detach().float().clone()
    optimizer = _decay_free(make([p]))
    set_learning_rate(optimizer, rate)
    way = torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1.0
    for _ in range(_STEPS):
        _step_with(optimizer, p, way * (1 + 0.5 * torch.randn(p.shape, generator=generator)))
    return (p.detach().float() - start).abs().mean().item()


@conformance_checks.register(24, "a difference of bfloat16 parameters is mostly rounding: training crawls or stops.")
def bfloat16_updates_do_not_vanish(subject: Subject) -> None:
    """Over 50 small steps on bfloat16 parameters, the wrapper gets as far as its base does at the same mean step.

    The wrapper's mean step, relative to the base's, is measured in float32; the base is then given the learning rate
    that makes its mean step as large. Steps are between 1/8 and 8 units in the last place of the parameters. The
    wrapper has to cover at least 0.7 of the base's distance: a policy that holds some coordinates back makes larger
    steps on others, which rounding favours. Rounding an update in four parts loses more than 0.4 of the distance.
    """
    probe = _distance(subject.base, torch.float32, 1e-3)
    if not probe > 0:
        raise NotApplicable("the base does not move on a single matrix")
    rate = 1e-3 * (_STEPS * 2**-8) / probe  # a mean step of one unit in the last place of numbers around 1
    share = _distance(subject.build, torch.float32, rate) / _distance(subject.base, torch.float32, rate)
    expected = _distance(subject.base, torch.bfloat16, rate * share)
    distance = _distance(subject.build, torch.bfloat16, rate)
    text = f"in 50 steps bfloat16 parameters moved by {distance:.3g} on average, the base at the same mean step by"
    require(distance >= 0.7 * expected, f"{text} {expected:.3g}.")


def _directions(make: Callable[[Any], Optimizer]) -> Tensor:
    """The change of a matrix of 4,096 elements over steps 4 to 8, with gradients that have a persistent part."""
    generator = torch.Generator().manual_seed(5)
    p = nn.Parameter(torch.randn(64, 64, generator=generator))
    drift = torch.randn(64, 64, generator=generator)
    torch.manual_seed(0)
    optimizer = _decay_free(make([p]))
    moved = [_step_with(optimizer, p, drift + torch.randn(64, 64, generator=generator)) for _ in range(8)]
    return torch.stack(moved[3:])


@conformance_checks.register(
    25, "over a base with 8-bit state, codes are taken for moments, and the step is partly random.", mendable=True
)
def inexact_moments_are_understood(subject: Subject) -> None:
    """Over a base with 8-bit moments, the wrapper steps as over the exact base (cosine >= 0.9), or names the moment in
    a ValueError.

    Quantisation by itself moves a masked step's cosine to 0.97 or more; selecting by raw codes brings it to 0.8.
    """
    wrap = subject.wrap
    if wrap is None:
        raise NotApplicable("needs `Subject.wrap`, to wrap a base with coded moments")
    pairs: list[tuple[str, Callable[[Any], Optimizer], Callable[[Any], Optimizer]]] = [
        ("a base whose moment is 8-bit codes", CodedMoment, ProbeAdam)
    ]
    if subject.exact_base is not None:
        pairs.append(("its 8-bit base", subject.base, subject.exact_base))
    for name, coded, exact in pairs:
        expected = _directions(lambda ps, exact=exact: wrap(exact(ps)))
        try:
            directions = _directions(lambda ps, coded=coded: wrap(coded(ps)))
        except ValueError as refusal:
            require("moment" in str(refusal), f"over {name} it raised {refusal!r}, which does not speak of moments.")
            continue
        cosine = nn.functional.cosine_similarity(directions.flatten(), expected.flatten(), dim=0).item()
        require(cosine >= 0.9, f"over {name}, steps have a cosine of {cosine:.2f} to those over the exact base.")


def _aligned_steps(subject: Subject, aligned: int) -> tuple[Tensor, Tensor]:
    """The wrapper's and the base's second step, whose gradient opposes the momentum except in `aligned` coordinates."""
    shape = (10_000, 100) if subject.model == "mixed" else (256, 128)  # long: products of its shorter side are small
    generator = torch.Generator().manual_seed(7)
    first = torch.randint(0, 2, shape, generator=generator).float().mul_(2).sub_(1)
    second = first * -0.01
    second.view(-1)[12345 : 12345 + aligned] *= -1
    steps = []
    for make in (subject.build, subject.base):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = _decay_free(make([p]))
        _step_with(optimizer, p, first)
        steps.append(_step_with(optimizer, p, second))
    return steps[0], steps[1]


@conformance_checks.register(29, "one coordinate scaled by a million ends a run.")
def compensation_stays_within_its_cap(subject: Subject) -> None:
    """One aligned coordinate in a million: no element steps further than `Subject.cap` times the base's largest."""
    ours, theirs = (step.abs().max().item() for step in _aligned_steps(subject, 1))
    limit = subject.cap * theirs * (1 + 1e-5)  # float32 rounding of a product and of the difference
    times = f"{ours / theirs:.3g} times the base's"
    require(ours <= limit, f"the largest step is {ours:.3g}, {times}; the cap is {subject.cap}.")


@conformance_checks.register(29, "one unlucky step makes parameters NaN, and they stay NaN.")
def nothing_aligned_stays_finite(subject: Subject) -> None:
    """No coordinate aligned: steps are finite and within the cap."""
    ours, theirs = _aligned_steps(subject, 0)
    require(bool(torch.isfinite(ours).all()), f"{int((~torch.isfinite(ours)).sum())} coordinates are not finite.")
    largest, limit = ours.abs().max().item(), subject.cap * theirs.abs().max().item() * (1 + 1e-5)
    require(largest <= limit, f"the largest step is {largest:.3g}, the cap allows {limit:.3g}.")


def _generators() -> dict[str, Any]:
    """The state of every global generator of the process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


@conformance_checks.register(
    30, "dropout masks and data order change with the optimizer, and comparisons are not paired."
)
def global_generators_do_not_move(subject: Subject) -> None:
    """Constructing, stepping, saving and loading leave torch's, numpy's and Python's generators as they were."""
    model = ConformanceModel(subject.model)
    before = _generators()

    def unmoved(after: str) -> None:
        for name, state in _generators().items():
            same = torch.equal(state, before[name]) if isinstance(state, Tensor) else state == before[name]
            require(same, f"{after} moved the global generator of {name}.")

    wrapper = subject.build(list(model.parameters()))
    unmoved("construction")
    train(model, wrapper, range(7))
    unmoved("a step")
    wrapper.load_state_dict(through_a_file(wrapper.state_dict()))
    unmoved("saving and loading")
    train(model, wrapper, range(7, 9))
    unmoved("a step after a load")


@conformance_checks.register(30, "replicas, whose global seeds differ, drift apart without an error.")
def global_generators_are_not_read(subject: Subject) -> None:
    """The path is the same whatever the global generators are seeded with."""
    paths, python = [], random.getstate()
    try:
        for seed in (11, 12):
            model = ConformanceModel(subject.model)
            torch.manual_seed(seed)
            random.seed(seed)
            paths.append(trajectory(model, subject.build(list(model.parameters())), range(7)))
    finally:
        random.setstate(python)
    require_same_path(paths[1], paths[0], "with another global seed")


def _refusal(subject: Subject, config: dict[str, Any], what: str) -> str:
    """The text of the error that refuses `config`."""
    assert subject.config is not None
    try:
        built = subject.config.build(config)
    except (ValueError, TypeError, KeyError) as error:
        return str(error)
    require(False, f"{what} was accepted, and built {built!r}.")
    return ""


@conformance_checks.register(
    32, "a typing error in a config is otherwise a run with other settings than were asked for.", mendable=True
)
def configs_are_validated(subject: Subject) -> None:
    """An unknown key, an unknown kind, a value out of range: errors that name the key, what is allowed, the bound."""
    claims = subject.config
    if claims is None:
        raise NotApplicable("the subject has no `config`")
    claims.build(dict(claims.good))
    key, value, bound = claims.out_of_range
    kind = str(claims.good[claims.tag])
    cases = [
        ("an unknown key", {"no_such_key": 1}, ["no_such_key"]),
        ("an unknown kind", {claims.tag: "no_such_kind"}, ["no_such_kind", kind]),
        (f"{key} = {value!r}", {key: value}, [key, bound]),
    ]
    for what, change, words in cases:
        text = _refusal(subject, {**claims.good, **change}, what)
        missing = [word for word in words if word not in text]
        require(not missing, f"{what}: the error does not name {', '.join(map(repr, missing))}; it says: {text}")
