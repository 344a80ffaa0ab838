"""A preconditioner of somebody's own that raises, or returns what does not fit: which method, in which step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transforms import FixedRotation

from selective import MGUP, PreconditionerError, SelectiveUpdate
from selective.preconditioner import Carry

QUESTIONS = ("stands_still", "is_due", "is_overdue", "observes", "refreshes_from_gradients", "itemsize", "carries_in")


class Fails(FixedRotation):
    """Due in every step, and raises in one of its methods once it has been told to, or returns what does not fit."""

    where: str = "report"
    what: Any = None  # what it returns; None: it raises
    now: list[bool]

    def is_due(self, steps, place, count):
        return self.where != "is_overdue"

    def refresh(self, states, grads):
        return [Carry(left=torch.eye(g.shape[1]).expand(len(g), -1, -1)) for g in grads]

    def __getattribute__(self, name):
        if name in (*QUESTIONS, "report", "denoise", "init_state") and name == object.__getattribute__(self, "where"):
            if object.__getattribute__(self, "now")[0]:
                return self._fail
        return super().__getattribute__(name)

    def _fail(self, *given):
        if self.what is None:
            raise ArithmeticError("no luck")
        return self.what


def made(**options: Any) -> tuple[torch.nn.Parameter, SelectiveUpdate]:
    p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    base = torch.optim.AdamW([p], lr=1e-2)
    return p, SelectiveUpdate(base, policy=MGUP(), preconditioner=Fails(**options, now=[False]))


def told(optimizer: SelectiveUpdate) -> None:
    found = optimizer.preconditioner_groups[0].preconditioner
    assert isinstance(found, Fails)
    found.now[0] = True


@pytest.mark.parametrize("where", [*QUESTIONS, "denoise"])
def test_each_method_is_named_with_the_step(where: str) -> None:
    p, optimizer = made(where=where)
    for step in range(2):
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    told(optimizer)
    before = p.detach().clone()
    with pytest.raises(PreconditionerError, match=rf"in step 2, Fails.{where} failed: no luck") as caught:
        optimizer.step()
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert torch.equal(p, before)


@pytest.mark.parametrize("what", [[], [{"a": 3}], [{"a": torch.zeros(3)}], [7], 7], ids=str)
def test_a_report_that_does_not_fit_is_said(what: Any) -> None:
    p, optimizer = made(where="report", what=what)
    p.grad = torch.ones_like(p)
    optimizer.step()
    told(optimizer)
    with pytest.raises(PreconditionerError, match="report failed: it has to return a list with a dictionary of 0-d"):
        optimizer.statistics()


def test_a_state_that_is_none_is_said() -> None:
    p, optimizer = made(where="init_state", what=3)
    told(optimizer)
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"Fails.init_state returned 3 for parameter .* must be a dictionary"):
        optimizer.step()
