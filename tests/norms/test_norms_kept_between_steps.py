"""Norm control keeps what it knows of its parameters between steps. Steps are those of a run that keeps nothing."""

from __future__ import annotations

import weakref
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW

from selective import Cautious, NormControl, SelectiveUpdate
from selective.plan.norm_plan import NormPlan

NEVER = property(lambda plan: None, lambda plan, made: None)  # in the place of `NormPlan.kept`
SHAPES = ((6, 4), (4, 6), (6, 4), (3,), (6, 4), (4, 6))


class Run:
    """A few parameters and their optimizer, to which things happen between steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params: list[Any] = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        self.opt = SelectiveUpdate(AdamW(self.params, lr=0.02), policy=Cautious(), norm=NormControl())
        self.steps = 0
        self.outside: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory that parameters have left, and what it held

    def step(self, without: set[int]) -> None:
        self.steps += 1
        for index, p in enumerate(self.params):
            generator = torch.Generator().manual_seed(100 * self.steps + index)
            grad = torch.randn(SHAPES[index], generator=generator)
            p.grad = None if index in without else grad.reshape(p.shape).to(p.dtype)
        self.opt.step()

    def move(self, index: int) -> None:
        """To other memory, as `model.to()` and some strategies of sharding do."""
        p = self.params[index]
        self.outside.append((p.data, p.detach().clone()))
        p.data = p.data.clone()

    def swap(self, index: int) -> None:
        """The memory of two parameters that are alike for each other's."""
        p = self.params[index]
        q = next((q for q in self.params if q is not p and (q.shape, q.dtype) == (p.shape, p.dtype)), p)
        p.data, q.data = q.data, p.data

    def write(self, index: int) -> None:
        """Other values in the same memory."""
        with torch.no_grad():
            self.params[index].mul_(1.5)

    def leave(self, index: int) -> None:
        """Out of the rule, or under another one."""
        self.opt.norm_groups[0].norm = None if index % 2 else NormControl(scale=2)

    def hook(self, index: int) -> None:
        """A hook of the base that moves a parameter to other memory, after the step has looked at all of them."""
        handle = self.opt.base.register_step_pre_hook(lambda *_: self.move(index))
        self.step(set())
        handle.remove()

    def turn(self, index: int) -> None:
        """Another shape: the transpose."""
        p = self.params[index]
        p.grad, p.data = None, p.data.t().contiguous() if p.dim() > 1 else p.data
        self.opt.state[p].clear()

    def narrow(self, index: int) -> None:
        """Another dtype."""
        self.params[index].grad = None
        self.params[index].data = self.params[index].data.bfloat16()

    def rate(self, index: int) -> None:
        self.opt.param_groups[0]["lr"] = 0.01 * (1 + index)


EVENTS = ("move", "swap", "write", "leave", "hook", "turn", "narrow", "rate")
events = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.integers(0, 5), st.sets(st.integers(0, 5), max_size=2)),
    min_size=2,
    max_size=6,
)


def happens(monkeypatch: pytest.MonkeyPatch, story: list[tuple[str, int, set[int]]], keeps: bool) -> Run:
    with monkeypatch.context() as patch:
        if not keeps:
            patch.setattr(NormPlan, "kept", NEVER)
        run = Run()
        run.step(set())
        for event, index, without in story:
            getattr(run, event)(index)
            run.step(without)
            run.step(without)
    return run


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True))


def test_steps_are_those_of_a_run_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever happens between them; memory that a parameter has left is not written to."""

    @settings(max_examples=25)
    @given(events)
    def check(story: list[tuple[str, int, set[int]]]) -> None:
        kept, without = (happens(monkeypatch, story, keeps) for keeps in (True, False))
        assert same(kept, without)
        assert all(torch.equal(memory, held) for memory, held in kept.outside)

    check()


def test_it_is_kept_and_one_that_stayed_wrongly_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.step(set())
    norms = next(iter(run.opt.groups.plans)).norms
    assert norms is not None
    whole = norms.kept
    run.step(set())
    assert norms.kept is whole is not None
    run.step({0})
    less = norms.kept
    run.step(set())
    assert norms.kept is not None and less is not None and less is not whole
    norms.kept = (*norms.kept[:2], less[2])  # the fault that the first test looks for
    run.step(set())
    other = happens(monkeypatch, [], keeps=False)
    for without in (set(), {0}, set(), set()):
        other.step(without)
    assert not same(run, other)


def test_memory_that_a_parameter_has_left_is_free_at_once() -> None:
    run, array = Run(), numpy.ones((6, 4), dtype=numpy.float32)
    memory = weakref.ref(array)
    run.params[0].data = torch.from_numpy(array)
    del array
    run.step(set())
    assert memory() is not None
    run.params[0].data = run.params[0].data.clone()
    assert memory() is None
