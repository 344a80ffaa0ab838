"""Errors of a chain: they begin with its name, say which member they are of, and nothing is done by halves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from selective import Cautious, ChainedOptimizer, Policy, SelectiveUpdate
from selective.policies.view import StepView


class FailsInAMember(Policy):
    def mask(self, view: StepView) -> Tensor:
        raise ZeroDivisionError("not this one")


def chain(policy: Any = "Cautious", **options: Any) -> ChainedOptimizer:
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(2, 3)
    first = SelectiveUpdate(torch.optim.AdamW(params[:1]), policy=Cautious())
    return ChainedOptimizer(
        {"first": first, "last": SelectiveUpdate(torch.optim.AdamW(params[1:]), policy=policy, **options)}
    )


def parameter(opt: ChainedOptimizer) -> Tensor:
    return opt.param_groups[1]["params"][0]


def sparse(opt: ChainedOptimizer) -> None:
    parameter(opt).grad = torch.ones(2, 3).to_sparse()
    opt.step()


def of_another_shape(opt: ChainedOptimizer) -> None:
    parameter(opt).grad.data = torch.ones(2)  # type: ignore[union-attr]
    opt.step()


def no_number(opt: ChainedOptimizer) -> None:
    opt.param_groups[1]["lr"] = "1e-3"
    opt.step()


def moments_of_another_shape(opt: ChainedOptimizer) -> None:
    opt.step()
    opt.state[parameter(opt)]["exp_avg"] = torch.ones(4)
    opt.step()


def not_finite(opt: ChainedOptimizer) -> None:
    parameter(opt).grad.fill_(float("nan"))  # type: ignore[union-attr]
    opt.step()


def a_group(opt: ChainedOptimizer) -> None:
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "member": "last", "policy": "MGUP", "tau": 0.5})


def a_state(opt: ChainedOptimizer) -> None:
    opt.state[parameter(opt)] = {"selective/seed": "a"}


def a_checkpoint(opt: ChainedOptimizer) -> None:
    saved = copy.deepcopy(opt.state_dict())
    del saved["param_groups"][1]["betas"]
    opt.load_state_dict(saved)


LAST = "ChainedOptimizer, member 'last': "
FAULTS: list[tuple[Callable[[ChainedOptimizer], None], dict[str, Any], str]] = [
    (sparse, {}, f"{LAST}parameter 'param_groups[0][0]' has a sparse gradient"),
    (of_another_shape, {}, f"{LAST}parameter 'param_groups[0][0]' has shape (2, 3), its gradient (2,)"),
    (no_number, {}, f"{LAST}param_groups[0]['lr'] is '1e-3'"),
    (moments_of_another_shape, {}, f"{LAST}parameter 'param_groups[0][0]' has shape (2, 3), and 'exp_avg'"),
    (not_finite, {"on_nonfinite": "raise"}, f"{LAST}the gradient of parameter 'param_groups[0][0]' is not finite"),
    (ChainedOptimizer.step, {"policy": FailsInAMember()}, f"{LAST}FailsInAMember failed in step 0"),
    (a_group, {}, f"{LAST}a parameter group has 'tau' beside its policy"),
    (a_state, {}, LAST),
    (a_checkpoint, {}, "ChainedOptimizer: member 'last': "),
]


@pytest.mark.parametrize(("fault", "options", "begin"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_errors_begin_with_the_chain_and_its_member(fault: Any, options: dict[str, Any], begin: str) -> None:
    with pytest.raises(Exception, match="ChainedOptimizer") as raised:
        fault(chain(**options))
    assert str(raised.value).startswith(begin), str(raised.value)


def test_states_are_written_to_all_members_or_to_none() -> None:
    opt = chain()
    opt.step()
    first, last = (group["params"][0] for group in opt.param_groups)
    before = opt.state[first]["exp_avg"].clone()
    states = {first: {**opt.state[first], "exp_avg": torch.zeros(2, 3)}, last: {"selective/seed": "a"}}
    with pytest.raises(ValueError, match="member 'last'"):
        opt.state = states
    assert torch.equal(opt.state[first]["exp_avg"], before)
    states[last] = {}
    opt.state = states
    assert not opt.state[first]["exp_avg"].any()


def test_a_member_alone_speaks_for_itself() -> None:
    opt = chain()
    parameter(opt).grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(ValueError, match=r"^SelectiveUpdate: parameter"):
        opt.member("last").step()
