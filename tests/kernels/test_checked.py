"""The check of every step against the reference: right kernels pass, and one wrong element is found."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import python
from gpu_support import DTYPES, copied, made
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import KINDS, RULES, SELECTIONS, STRENGTHS, needs_momentum

from selective.kernels import (
    Control,
    Decay,
    Draw,
    GivenRule,
    Item,
    KernelDifference,
    Selection,
    SGDRule,
    Shard,
    Strength,
    begin_sharded,
    checked_steps,
    cpu,
    selective_step,
    use_backend,
)
from selective.kernels.checked import compare, is_on, switch

FOLDER = tempfile.gettempdir()
ADAM, AGREEMENT, FIXED = RULES["adamw"], Selection("agreement"), Strength("fixed", 1.5, 0.5)


def take(item: Item, rule: Any = ADAM, selection: Any = AGREEMENT, strength: Any = FIXED, **how: Any) -> Any:
    how = {"draw": Draw(7, 3), "statistics": True, **how}
    return selective_step([item], rule=rule, selection=selection, strength=strength, **how)


def wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[Item, Any], object]) -> None:
    """Let the CPU's kernels do their step, and then spoil its result."""
    real = cpu.selective_step

    def spoiled(items: Sequence[Item], spec: Any) -> Any:
        sums = real(items, spec)
        change(items[0], sums)
        return sums

    monkeypatch.setattr(cpu, "selective_step", spoiled)


COMBINED = st.builds(
    lambda rule, selection, strength, control, decay, stochastic: (
        rule,
        selection,
        strength,
        control,
        decay,
        stochastic,
    ),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(sorted(SELECTIONS)),
    st.sampled_from(sorted(STRENGTHS)),
    st.sampled_from([None, Control(), Control(norm=False)]),
    st.sampled_from([None, Decay("cautious"), Decay("cautious", of="masked")]),
    st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(COMBINED, st.sampled_from(sorted(DTYPES)), st.sampled_from([(), (1,), (0,), (11, 71)]), st.integers(0, 9))
def test_right_kernels_pass(combined: Any, dtypes: str, shape: Any, seed: int) -> None:
    """Two steps of the CPU's kernels; in the second, half of the rows have no gradient."""
    name, selection, strength, control, decay, stochastic = combined
    rule = RULES[name]
    how: dict[str, Any] = {
        "selection": replace(SELECTIONS[selection], control=control),
        "strength": STRENGTHS[strength],
    }
    if isinstance(rule, SGDRule) and rule.momentum == 0 and needs_momentum(how["selection"], how["strength"]):
        return
    if not (isinstance(rule, GivenRule) and rule.offset):
        how["decay"] = decay
    item = made(rule, shape, DTYPES[dtypes], seed=seed)
    with checked_steps(FOLDER):
        take(item, rule, draw=Draw(7, 3, stochastic), **how)
        if item.grad.dim() and not isinstance(rule, GivenRule):
            item.grad[::2] = 0
            take(item, rule, draw=Draw(7, 4, stochastic), **how)


@pytest.mark.parametrize("kind", ["agreement", pytest.param("top_k", marks=pytest.mark.slow)])
def test_right_triton_kernels_pass(kind: str, device: str) -> None:
    item = copied(made(ADAM, (2, 300), seed=1), device)
    with checked_steps(FOLDER), use_backend("gpu"):
        take(item, ADAM, *KINDS[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("strength", ["fixed", "mean", "norm_update", "alignment"])
@pytest.mark.parametrize("selection", ["update", "previous", "top_update", "top_sampled", "element"])
@pytest.mark.parametrize("rule", ["adamw", "sgd_nesterov", "lion", "scratch"])
def test_right_kernels_of_a_gpu_pass(rule: str, selection: str, strength: str) -> None:
    """With real sizes: of a million scores, some are within rounding of the K-th, and some updates cancel."""
    for dtypes in ("f32", "bf16", "bf16+f32"):
        item = copied(made(RULES[rule], (1500, 1111), DTYPES[dtypes], seed=1), "cuda")
        for control in (None, Control()):
            chosen = replace(SELECTIONS[selection], control=control)
            with checked_steps(FOLDER):
                take(item, RULES[rule], chosen, STRENGTHS[strength])


def rounded_otherwise(items: Sequence[Item], spec: Any) -> Any:
    """A right kernel of another kind: it computes in float64 and rounds at the end."""
    from selective.kernels import reference

    for item in items:
        wide = replace(item, param=item.param.double(), state={k: v.double() for k, v in item.state.items()})
        wide.policy_state = {key: value.clone() for key, value in item.policy_state.items()}
        reference.selective_step([wide], replace(spec, statistics=False))
        item.param.copy_(wide.param)
        item.policy_state.update(wide.policy_state)
        for key, value in item.state.items():
            value.copy_(wide.state[key])
    return None


@pytest.mark.parametrize(
    "rule, selection, strength",
    [
        ("adamw", "update", "fixed"),
        ("adamw", "top_momentum", "norm_update"),
        ("adamw", "top_update", "mean"),
        ("sgd_nesterov", "momentum", "norm_update"),
        ("sgd_nesterov", "top_sampled", "alignment"),
        ("lion", "update", "still"),
        ("lion", "top_update", "norm_update"),
        ("lion", "momentum", "mean"),
    ],
)
def test_another_rounding_passes(rule: str, selection: str, strength: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of few digits cancel against momenta of few digits, so that decisions do fall to the other side."""
    monkeypatch.setattr(cpu, "selective_step", rounded_otherwise)
    generator = torch.Generator().manual_seed(3)
    for control in (None, Control()):
        item = made(RULES[rule], (70_000,), seed=1)
        item.grad.copy_(torch.randint(-9, 10, item.grad.shape, generator=generator) / 8)
        for momentum in (item.state[key] for key in item.state.keys() & {"exp_avg", "momentum_buffer"}):
            momentum.copy_(item.grad.flip(0) / -9)
        with checked_steps(FOLDER):
            take(
                item,
                RULES[rule],
                replace(SELECTIONS[selection], control=control),
                STRENGTHS[strength],
                statistics=False,
            )


def test_those_decisions_are_really_on_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the above: without borders, another rounding is a difference."""
    monkeypatch.setattr("selective.kernels.checked.borders.product_may_turn", lambda x, *_: torch.zeros_like(x) > 0)
    with pytest.raises(KernelDifference, match="'param' is not what the reference computes"):
        test_another_rounding_passes("adamw", "update", "fixed", monkeypatch)


def _far_from_the_border(item: Item, _: Any) -> None:
    """Step the coordinate with the largest momentum and gradient as if the other choice had been made."""
    place = int((item.state["exp_avg"] * item.grad).abs().argmax())
    item.param.view(-1)[place] += 0.01


SPOILED: dict[str, tuple[str, Callable[[Item, Any], object]]] = {
    "one element of the parameter": ("param", lambda item, _: item.param.view(-1)[77].mul_(1 + 1e-5)),
    "one of its choices": ("param", _far_from_the_border),
    "one element of a moment": ("exp_avg", lambda item, _: item.state["exp_avg"].view(-1)[77].mul_(1 + 1e-4)),
    "one element is no number": ("exp_avg_sq", lambda item, _: item.state["exp_avg_sq"].view(-1)[77].fill_(torch.nan)),
    "the step count": ("step", lambda item, _: item.state["step"].add_(1)),
    "the average": ("average", lambda item, _: item.policy_state["average"].mul_(1.001)),
    "the number of the selected": ("selected", lambda _, sums: sums[0].selected.add_(1)),
    "a norm": ("masked_sq", lambda _, sums: sums[0].masked_sq.mul_(1.001)),
}


@pytest.mark.parametrize("entry, change", SPOILED.values(), ids=SPOILED)
def test_one_wrong_element_is_found(
    entry: str, change: Callable[[Item, Any], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strength = Strength("alignment", rest=0.2) if entry == "average" else FIXED
    item, clean = made(ADAM, (11, 71), seed=1), made(ADAM, (11, 71), seed=1)
    with checked_steps(str(tmp_path / "new")):
        take(clean, strength=strength)  # the twin: it passes
    wrong(monkeypatch, change)
    before = copied(item)
    with checked_steps(str(tmp_path / "new")), pytest.raises(KernelDifference) as caught:
        take(item, strength=strength)
    error = caught.value
    assert (error.place.entry, error.place.differing, error.step, error.address) == (entry, 1, 3, 5)
    if error.place.numel > 1:
        differing = (error.after[entry] != error.expected[entry]).nonzero().tolist()
        assert list(error.place.index) in differing
    assert "step 3, parameter number 5 (torch.float32, (11, 71), cpu): " in str(error) and error.path in str(error)
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(again) == str(error)
    kept = torch.load(error.path)
    assert torch.equal(kept["before"]["param"], before.param) and torch.equal(kept["before"]["grad"], before.grad)
    assert kept["after"]["param"].equal(item.param) and kept["place"] == str(error.place)
    take(made(ADAM, (11, 71)), strength=strength)  # outside of the block nothing is compared


def test_off_it_costs_a_look_at_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(item: Item) -> Item:
        raise AssertionError("nothing is copied")

    monkeypatch.setattr(compare, "_copy", copy)
    assert not is_on()
    take(made(ADAM, (9,)))
    with checked_steps(), pytest.raises(AssertionError, match="nothing is copied"):
        take(made(ADAM, (9,)))


def test_the_values_of_the_environment_variable() -> None:
    assert [switch._folder_of(value) for value in ("", "0", "1", "/tmp/here")] == [None, None, ".", "/tmp/here"]


@pytest.mark.slow
def test_the_environment_switches_it_on(tmp_path: Path) -> None:
    code = "import os; os.environ['SELECTIVE_CHECK'] = 'some/folder'; "
    code += "from selective.kernels.checked import is_on, switch; print(is_on(), switch.folder())"
    assert python(code, tmp_path) == "True some/folder"


def test_ranks_that_ask_each_other_are_refused_before_anything_moves() -> None:
    item = made(ADAM, (6, 4))
    item.shard = Shard((12, 4), (((0, 6),), ((0, 4),)), None)
    before = copied(item)
    with checked_steps(), pytest.raises(ValueError, match=r"ranks ask each other.*scope='local'"):
        begin_sharded([item], rule=ADAM, selection=Selection("top_k"), strength=FIXED, draw=Draw(0, 0))
    assert torch.equal(item.param, before.param)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's, of a capture that an error has ended
def test_a_recorded_step_is_refused() -> None:
    item = copied(made(ADAM, (64,)), "cuda")
    item.state["step"] = item.state["step"].cuda()
    with checked_steps(FOLDER):
        take(item)
        with pytest.raises(RuntimeError, match="recorded in a CUDA graph can't be checked"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                take(item)
