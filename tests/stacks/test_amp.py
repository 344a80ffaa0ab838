"""`torch.amp.GradScaler` on the CPU in a run that is stopped and resumed: its own state belongs to the checkpoint.

That a single overflow moves nothing is row 12 of the conformance suite. Here an overflow comes before and after the
resume, with clipping of the unscaled gradients between.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_loops import CASES, assert_same, differences, loss_of, net, wrap
from torch import nn

OVERFLOWS = (2, 7)


class Run:
    def __init__(self, case: str, fused: bool = False) -> None:
        self.model = net()
        self.optimizer = wrap(self.model, case, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)

    def train(self, first: int, last: int, overflows: tuple[int, ...] = OVERFLOWS) -> None:
        for step in range(first, last):
            loss = loss_of(self.model, step)
            if step in overflows:
                loss = loss * float("inf")
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def saved(self, to: Any) -> Any:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, to)
        return to

    def load(self, file: Any) -> None:
        saved = torch.load(file, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.model, self.optimizer


def without_scaler(case: str, fused: bool, steps: list[int]) -> tuple[Any, Any]:
    """The plain loop over the steps that did not overflow. Powers of two come out of gradients without a rounding."""
    run = Run(case, fused)
    for step in steps:
        loss_of(run.model, step).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.pair


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_overflows_are_steps_that_never_were(case: str, fused: bool) -> None:
    run = Run(case, fused)
    run.train(0, 10)
    assert_same(run.pair, without_scaler(case, fused, [s for s in range(10) if s not in OVERFLOWS]))
    assert run.scaler.get_scale() != 256.0
    assert differences(run.pair, without_scaler(case, fused, list(range(10))))


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_overflows_goes_on_bit_for_bit(case: str, tmp_path: Any) -> None:
    run = Run(case)
    run.train(0, 5)
    file = run.saved(tmp_path / "at-5.pt")
    run.train(5, 10)
    resumed = Run(case)
    resumed.load(file)
    resumed.train(5, 10)
    assert_same(resumed.pair, run.pair)
    assert resumed.scaler.state_dict() == run.scaler.state_dict()
    smooth = Run(case)
    smooth.load(file)
    smooth.train(5, 10, overflows=())
    assert differences(smooth.pair, run.pair)


@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_autocast(case: str) -> None:
    """Under autocast forward and backward are in bfloat16; the step, rotations too, is what it is outside of it."""
    runs = []
    for inside in (False, True):
        run = Run(case)
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss_of(run.model, step).backward()
                if inside:
                    run.optimizer.step()
            if not inside:
                run.optimizer.step()
            run.optimizer.zero_grad()
        runs.append(run.pair)
    assert_same(*runs)
    plain = Run(case)
    plain.train(0, 4, overflows=())
    assert differences(plain.pair, runs[0])
