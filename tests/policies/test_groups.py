"""Policies of parameter groups, their hyper-parameters as a scheduler moves them, and momentum of our own."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from selective import MGUP, Cautious, Dense, Policy, SelectiveUpdate
from selective.policies import Agreement, Alignment, Fixed, TopK


class Looks(Policy):
    """Code of its own that reads the momentum."""

    reads: ClassVar[frozenset[str]] = frozenset({"momentum"})

    def mask(self, view):
        return view.momentum > 0


def parameters(optimizer: SelectiveUpdate) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def three_groups(default: Any) -> SelectiveUpdate:
    groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(4))]} for _ in range(3)]
    groups[1]["policy"] = None
    groups[2]["policy"] = {"kind": "MGUP", "alpha": 3.0, "gamma": 0.25}
    return SelectiveUpdate(torch.optim.SGD(groups, lr=1.0, momentum=0.9), policy=default)


def one_step(optimizer: SelectiveUpdate) -> list[list[float]]:
    """The multipliers of each group: the first step of SGD with learning rate 1, on gradients of 1."""
    optimizer.base.state.clear()
    for p in parameters(optimizer):
        p.grad = torch.ones(4)
        with torch.no_grad():
            p.zero_()
    optimizer.step()
    return [(-p.detach()).tolist() for p in parameters(optimizer)]


def test_groups_have_policies_of_their_own() -> None:
    optimizer = three_groups(MGUP())
    assert [group.policy for group in optimizer.policy_groups] == [MGUP(), Dense(), MGUP(alpha=3, gamma=0.25)]
    assert all("policy" not in group for group in optimizer.param_groups)
    assert one_step(optimizer) == [[2, 2, 0.5, 0.5], [1, 1, 1, 1], [3, 3, 0.25, 0.25]]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4))], "policy": "Cautious"})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4))]})
    assert [group.policy for group in optimizer.policy_groups[3:]] == [Cautious(), MGUP()]


def test_a_scheduler_moves_hyper_parameters_of_a_policy() -> None:
    optimizer = three_groups("MGUP")
    alphas = [1.0, 1.5, 2.5]
    for alpha in alphas:
        optimizer.policy_groups[0]["alpha"] = alpha
        assert one_step(optimizer)[0] == [alpha, alpha, 0.5, 0.5]
    assert optimizer.policy_groups[2]["alpha"] == 3.0
    with pytest.raises(ValueError, match="alpha"):
        optimizer.policy_groups[0]["alpha"] = -1.0
    with pytest.raises(KeyError, match=r"no hyper-parameter 'beta'.*alpha"):
        optimizer.policy_groups[0]["beta"] = 1.0
    assert one_step(optimizer)[0] == [2.5, 2.5, 0.5, 0.5]


def test_nested_hyper_parameters_have_dotted_names() -> None:
    optimizer = three_groups(Policy(selection=Agreement(), strength=Fixed(selected=2.0)))
    optimizer.policy_groups[0]["strength.selected"] = 4.0
    assert one_step(optimizer)[0] == [4.0] * 4
    names = set(optimizer.policy_groups[0])
    assert {"selection.momentum", "selection.of", "selection.strict", "strength.rest", "strength.selected"} <= names
    assert not any(name.endswith("kind") for name in names)


NEEDY = ["AlphaConsistency", "Magma", {"kind": "MGUP", "score": "momentum"}, Looks()]


@pytest.mark.parametrize("policy", NEEDY, ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_a_base_without_momentum_is_an_error_that_says_what_to_do(base: Any, policy: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=rf"(?s)needs the base's momentum.*{base.__name__}.*momentum_beta=0\.9"):
        SelectiveUpdate(base(params, lr=0.1), policy=policy)
    SelectiveUpdate(base(params, lr=0.1), policy=policy, momentum_beta=0.9)


def test_momentum_of_our_own_is_the_running_average() -> None:
    """m <- beta m + (1 - beta) g beside SGD without momentum; previous and current are what they say."""

    class Sees(Policy):
        reads: ClassVar[frozenset[str]] = frozenset({"momentum", "previous_momentum"})
        seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

        def mask(self, view):
            self.seen.append((view.previous_momentum.clone(), view.momentum.clone()))
            return torch.ones(view.shape)

    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SelectiveUpdate(torch.optim.SGD([p], lr=0.1), policy=Sees(), momentum_beta=0.8)
    expected = torch.zeros(4, dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn(4, generator=generator, dtype=torch.float64)
        optimizer.step()
        previous, expected = expected, 0.8 * expected + 0.2 * p.grad
        torch.testing.assert_close(Sees.seen[-1][0], previous, rtol=0, atol=1e-15)  # float64, a rounding or two
        torch.testing.assert_close(Sees.seen[-1][1], expected, rtol=0, atol=1e-15)


def test_a_group_added_on_the_base_keeps_its_place_before_one_added_on_the_wrapper() -> None:
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = SelectiveUpdate(torch.optim.SGD(params[:1], lr=0.1), policy=MGUP())
    optimizer.base.add_param_group({"params": params[1:2]})
    optimizer.add_param_group({"params": params[2:], "policy": "Cautious"})
    assert [group.policy for group in optimizer.policy_groups] == [MGUP(), MGUP(), Cautious()]


def test_a_constructor_that_fails_leaves_the_policies_in_the_groups() -> None:
    """In a notebook the same base is wrapped again; its groups must not have lost their policies silently."""
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    base = torch.optim.Adafactor([{"params": params[:1], "policy": "MGUP"}, {"params": params[1:], "policy": None}])
    with pytest.raises(ValueError, match="scratch"):
        SelectiveUpdate(base, policy=Cautious(), capture="scratch")
    optimizer = SelectiveUpdate(base, policy=Cautious())
    assert [group.policy for group in optimizer.policy_groups] == [MGUP(), Dense()]


def test_a_policy_put_into_a_group_later_is_not_ignored() -> None:
    optimizer = three_groups(MGUP())
    optimizer.param_groups[1]["policy"] = "Cautious"
    with pytest.raises(ValueError, match=r"opt.policy_groups\[1\].policy"):
        optimizer.step()
    del optimizer.param_groups[1]["policy"]
    optimizer.policy_groups[1].policy = Cautious()
    assert one_step(optimizer)[1] == [1, 1, 1, 1]


@pytest.mark.parametrize("beta", ["0.9", float("nan"), 1.0, -0.1])
def test_a_momentum_of_our_own_has_a_number_for_its_coefficient(beta: Any) -> None:
    base = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match=r"momentum_beta is .*, must be a number"):
        SelectiveUpdate(base, momentum_beta=beta)


def test_another_strength_of_the_same_kind_of_policy_makes_its_state_anew():
    """`Policy` is one class whatever it is made of; the average is of `Alignment`, and is kept from step to step."""
    agreement = Agreement(of="momentum")
    p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    opt = SelectiveUpdate(torch.optim.AdamW([p], lr=0.1), policy=Policy(selection=agreement, strength=Fixed()))

    def step() -> None:
        p.grad = torch.ones_like(p)
        opt.step()

    def kept() -> set[str]:
        return {key for key in opt.state_dict()["state"][0] if key.startswith("selective/state/")}

    step()
    assert kept() == set()
    opt.policy_groups[0].policy = Policy(selection=agreement, strength=Alignment())
    step()
    first = opt.state[p]["selective/state/average"].clone()
    step()
    assert kept() == {"selective/state/average"}
    assert not torch.equal(opt.state[p]["selective/state/average"], first)
    twin = torch.nn.Parameter(p.detach().clone())
    other = SelectiveUpdate(torch.optim.AdamW([twin], lr=0.1), policy=Policy(selection=agreement, strength=Alignment()))
    other.load_state_dict(opt.state_dict())
    opt.policy_groups[0].policy = Policy(selection=TopK(score="momentum"), strength=Alignment())
    step()
    assert kept() == {"selective/state/average"}
    opt.policy_groups[0].policy = Policy(selection=agreement, strength=Fixed())
    step()
    assert kept() == set()
