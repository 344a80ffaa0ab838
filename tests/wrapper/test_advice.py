"""Warnings about parameter groups that can be stepped, but hardly do what was meant."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from selective import (
    MGUP,
    Agreement,
    Cautious,
    CautiousDecay,
    Fixed,
    Grams,
    Policy,
    RandomMask,
    SelectiveUpdate,
    Soap,
    TopK,
)


@pytest.fixture(autouse=True)
def _as_users_see_them() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class CautiousAdamW(torch.optim.AdamW):
    """As timm's and HeavyBall's: a group option masks the update inside of the base."""

    def __init__(self, params: Any, key: str = "caution", value: bool = True) -> None:
        super().__init__(params, lr=0.1)
        self.defaults[key] = value
        for group in self.param_groups:
            group[key] = value


def param() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.ones(3, 2)
    return p


def wrapped(group: dict[str, Any], policy: Any = "MGUP", preconditioner: Any = None) -> SelectiveUpdate:
    base = torch.optim.AdamW([{"params": [param()], **group}], lr=0.1)
    return SelectiveUpdate(base, policy=policy, preconditioner=preconditioner)


MISSED = {
    "polcy": "'polcy' in param_groups[0] has no effect; did you mean 'policy'?",
    "precondtioner": "did you mean 'preconditioner'?",
    "matrix_veiw": "did you mean 'matrix_view'?",
    "mask_space": "pass mask_space to SelectiveUpdate: it holds for all groups",
    "stochastic_rounding": "pass stochastic_rounding to SelectiveUpdate",
    "alpha": "set opt.policy_groups[0]['alpha']",
    "refresh_every": "set opt.preconditioner_groups[0]['refresh_every']",
    "alpa": "did you mean 'alpha'? Set opt.policy_groups[0]['alpha']",
    "aplha": "did you mean 'alpha'? Set opt.policy_groups[0]['alpha']",
    "max_state_rato": "did you mean 'max_state_ratio'? Set opt.preconditioner_groups[0]['max_state_ratio']",
    "weight_decy": "did you mean 'weight_decay'?",
}


@pytest.mark.parametrize("key", MISSED)
def test_a_key_that_was_meant_for_us_is_pointed_out_at_once(key: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(MISSED[key])) as caught:
        wrapped({key: 1}, preconditioner=Soap())
    assert [warning.filename for warning in caught] == [__file__]


def test_so_is_one_in_a_group_that_is_added() -> None:
    optimizer = wrapped({})
    with pytest.warns(UserWarning, match=r"'polcy' in param_groups\[1\] has no effect; did you mean 'policy'\?"):
        optimizer.add_param_group({"params": [param()], "polcy": "Cautious"})


def test_a_hyper_parameter_in_the_base_s_groups_is_noticed_in_the_next_step_and_once() -> None:
    optimizer = wrapped({}, policy=Policy(selection=TopK(), strength=Fixed()))
    optimizer.step()
    optimizer.param_groups[0]["fraction"] = 0.25
    with pytest.warns(UserWarning, match=r"set opt\.policy_groups\[0\]\['selection\.fraction'\]") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    optimizer.param_groups[0]["initial_lr"] = 0.1  # a scheduler's: the keys are looked at again
    optimizer.step()


def test_keys_of_other_people_are_no_mistake() -> None:
    """The failing twin: a base's own option of our name, a scheduler's keys, names that are only similar."""

    class OwnAlpha(torch.optim.AdamW):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.defaults.update(alpha=0.5, seed=3)
            for group in self.param_groups:
                group.update(alpha=0.5, seed=3)

    own = SelectiveUpdate(OwnAlpha([param()]), policy=MGUP())
    names = ("name", "initial_lr", "max_lr", "use_muon", "precondition_frequency", "lr_scale", "lr_decay", "no_decay",
             "stage", "layer", "max_momentum", "no_weight_decay")  # fmt: skip
    optimizer = wrapped(dict.fromkeys(names, 1), preconditioner=Soap())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    optimizer.step()
    own.step()


@pytest.mark.parametrize("policy", [Cautious(), Grams(), Policy(selection=Agreement(), strength=Fixed())], ids=repr)
@pytest.mark.parametrize("key", ["caution", "cautious"])
def test_a_cautious_mask_over_a_cautious_base(key: str, policy: Policy) -> None:
    with pytest.warns(UserWarning, match=f"masks what CautiousAdamW has masked already, because its {key} is True"):
        SelectiveUpdate(CautiousAdamW([param()], key), policy=policy)


def test_a_cautious_base_of_other_people() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    with pytest.warns(UserWarning, match="masks what Lion has masked already, because its cautious is True"):
        SelectiveUpdate(pytorch_optimizer.Lion([param()], cautious=True), policy=Cautious())
    SelectiveUpdate(pytorch_optimizer.Lion([param()]), policy=Cautious())


def test_switching_to_a_cautious_mask_warns_in_the_next_step() -> None:
    optimizer = SelectiveUpdate(CautiousAdamW([param()]), policy=MGUP())
    optimizer.policy_groups[0].policy = "Cautious"  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="scaled up twice. Build CautiousAdamW with caution=False"):
        optimizer.step()


ALONG = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adam": lambda p: torch.optim.Adam(p, betas=(0.0, 0.9)),
    "radam": lambda p: torch.optim.RAdam(p, betas=(0.0, 0.9)),
    "adamax": lambda p: torch.optim.Adamax(p, betas=(0.0, 0.9)),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize("base", ALONG)
def test_a_cautious_mask_over_the_gradient_itself(base: str) -> None:
    optimizer = ALONG[base]([param()])
    with pytest.warns(
        UserWarning, match=r"Cautious\(\) selects every coordinate of .* without momentum \(param_groups"
    ):
        wrapper = SelectiveUpdate(optimizer, policy=Cautious())
    for _ in range(3):  # and it is true
        wrapper.param_groups[0]["params"][0].grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(_))
        wrapper.step()
        assert all(float(values["share"]) == 1 for values in wrapper.statistics().values())


def test_a_base_that_takes_no_momentum_is_not_told_to_have_one() -> None:
    with pytest.warns(UserWarning, match=r"Take a base with momentum, or a policy that ranks"):
        SelectiveUpdate(torch.optim.Adafactor([param()]), policy=Cautious())


def test_a_selective_decay_of_nothing_says_so() -> None:
    """A λ in one group is enough, and so is one that the decay brings."""
    nothing = torch.optim.AdamW([param()], weight_decay=0.0)
    with pytest.warns(UserWarning, match=r"CautiousDecay\(\) decays nothing, .*Give AdamW a weight_decay") as caught:
        SelectiveUpdate(nothing, decay=CautiousDecay())
    assert [warning.filename for warning in caught] == [__file__]
    SelectiveUpdate(torch.optim.AdamW([param()], weight_decay=0.0), decay=CautiousDecay(weight_decay=0.1))
    groups = [{"params": [param()], "weight_decay": decay} for decay in (0.0, 0.1)]
    SelectiveUpdate(torch.optim.AdamW(groups), decay=CautiousDecay())


def test_what_is_masked_once_does_not_warn() -> None:
    SelectiveUpdate(CautiousAdamW([param()], value=False), policy=Cautious())
    SelectiveUpdate(CautiousAdamW([param()]), policy=MGUP())
    SelectiveUpdate(torch.optim.SGD([param()], lr=0.1, momentum=0.9), policy=Cautious())
    SelectiveUpdate(torch.optim.SGD([param()], lr=0.1), policy=MGUP())
    SelectiveUpdate(torch.optim.SGD([param()], lr=0.1), policy=RandomMask.matching(Cautious()))
    SelectiveUpdate(torch.optim.Adam([param()], lr=0.1), policy=Cautious())
