"""Mistakes at the front door: each is an error or a warning that says what to write instead."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from selective import (
    MGUP,
    Cautious,
    Dense,
    SelectiveUpdate,
    Soap,
    TopK,
    param_groups_for,
    watch,
)


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def adamw(model: torch.nn.Module | None = None, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW((net() if model is None else model).parameters(), lr=1e-3, **options)


def give_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape)


def step(optimizer: SelectiveUpdate) -> None:
    give_gradients(optimizer)
    optimizer.step()


@pytest.mark.parametrize(
    "given,policy",
    [("Cautious", Cautious()), ({"kind": "MGUP", "tau": 0.25}, MGUP(tau=0.25)), (None, Dense())],
)
def test_a_policy_that_is_set_takes_all_forms(given: Any, policy: Any) -> None:
    optimizer = SelectiveUpdate(adamw(), policy="MGUP")
    optimizer.policy_groups[0].policy = given
    assert optimizer.policy_groups[0].policy == policy
    step(optimizer)


@pytest.mark.parametrize("wrong,words", [(3, "expected a policy"), (TopK(), "Policy(selection=TopK(), strength=...)")])
def test_a_wrong_object_is_refused_where_it_is_assigned(wrong: Any, words: str) -> None:
    optimizer = SelectiveUpdate(adamw(), policy="MGUP")
    with pytest.raises(TypeError) as caught:
        optimizer.policy_groups[0].policy = wrong
    assert words in str(caught.value)
    assert optimizer.policy_groups[0].policy == MGUP()
    step(optimizer)


NO_ASSIGNMENT: dict[str, tuple[Callable[[SelectiveUpdate], object], str]] = {
    "policy": (lambda opt: setattr(opt, "policy", Cautious()), "set opt.policy_groups[i].policy"),
    "preconditioner": (
        lambda opt: setattr(opt, "preconditioner", Soap()),
        "opt.preconditioner_groups[i].preconditioner",
    ),
    "on_nonfinite": (lambda opt: setattr(opt, "on_nonfinite", "skip"), "it is given at construction"),
    "seed": (lambda opt: setattr(opt, "seed", 3), "it is given at construction"),
    "of a policy": (lambda opt: setattr(opt.policy_groups[0], "alpha", 2.0), "entries: ['alpha'] = 2.0"),
    "of a preconditioner": (lambda opt: setattr(opt.preconditioner_groups[0], "beta", 2.0), "entries: ['beta'] = 2.0"),
}


@pytest.mark.parametrize("case", NO_ASSIGNMENT)
def test_an_assignment_without_effect_says_what_has_one(case: str) -> None:
    assign, words = NO_ASSIGNMENT[case]
    with pytest.raises(AttributeError) as caught:
        assign(SelectiveUpdate(adamw(), policy="MGUP"))
    assert words in str(caught.value)


def test_arguments_of_the_constructor_are_no_attributes() -> None:
    optimizer = SelectiveUpdate(adamw(), policy="MGUP")
    assert not any(hasattr(optimizer, name) for name in ("preconditioner", "seed", "scope", "capture"))


NO_OPTIMIZER: dict[str, Callable[[], Any]] = {
    "parameters": lambda: SelectiveUpdate(net().parameters(), lr=1e-3),  # type: ignore[arg-type,call-arg]
    "as Trainer calls a class": lambda: SelectiveUpdate([{"params": list(net().parameters())}], lr=1e-3, eps=1e-8),  # type: ignore[arg-type,call-arg]
    "a model": lambda: SelectiveUpdate(net(), policy="MGUP"),  # type: ignore[arg-type]
    "a class": lambda: SelectiveUpdate(torch.optim.AdamW, policy="MGUP"),  # type: ignore[arg-type]
    "a name": lambda: SelectiveUpdate("adamw", policy="MGUP"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", NO_OPTIMIZER)
def test_what_is_no_optimizer_is_shown_three_ways(case: str) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer") as caught:
        NO_OPTIMIZER[case]()
    for way in (
        "SelectiveUpdate(torch.optim.AdamW(",
        "SelectiveUpdate.for_model(model, 'adamw'",
        "SelectiveUpdate.bind(",
    ):
        assert way in str(caught.value)


def test_an_unknown_argument_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"no argument 'polcy'\. Did you mean 'policy'\?"):
        SelectiveUpdate(adamw(), polcy="MGUP")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no argument 'lr'\. Arguments of the base go to the base"):
        SelectiveUpdate(adamw(), policy="MGUP", lr=1e-3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no argument 'betas'\. Arguments of the base go to the base"):
        SelectiveUpdate(adamw(), policy="MGUP", betas=(0.9, 0.95))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"base is the class AdamW, must be"):
        SelectiveUpdate(torch.optim.AdamW, policy="MGUP")  # type: ignore[arg-type]
    signature = inspect.signature(SelectiveUpdate)
    assert list(signature.parameters)[:2] == ["base", "policy"] and "self" not in signature.parameters
    assert str(signature.parameters["policy"]).endswith("= None")


@pytest.fixture
def _as_users_see_them() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("_as_users_see_them")
def test_a_wrapper_that_does_nothing_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"neither a policy nor a preconditioner is given.*AdamW's own.*policy=None"
    ) as all_:
        SelectiveUpdate(adamw())
    assert [warning.filename for warning in all_] == [__file__]
    with pytest.warns(UserWarning, match="neither a policy nor"):
        SelectiveUpdate.bind(torch.optim.AdamW)(net().parameters(), lr=1e-3)


@pytest.mark.usefixtures("_as_users_see_them")
def test_a_wrapper_that_does_something_does_not_warn() -> None:
    for options in ({"policy": None}, {"policy": Dense()}, {"preconditioner": "Soap"}, {"on_nonfinite": "skip"}):
        SelectiveUpdate(adamw(), **options)  # type: ignore[arg-type]
    for said in ({"policy": "MGUP"}, {"policy": None}, {"preconditioner": Soap()}):
        SelectiveUpdate(torch.optim.AdamW([{"params": net().parameters(), **said}], lr=1e-3))
    SelectiveUpdate.bind(torch.optim.AdamW, policy=None)(net().parameters(), lr=1e-3)


def test_no_decay_is_a_list() -> None:
    with pytest.raises(ValueError, match=r"no_decay is the string 'vectors'; write a list: \['vectors'\]"):
        param_groups_for(net(), no_decay="vectors")


def test_skipped_steps_are_counted_and_no_checkpoint_has_them() -> None:
    optimizer = SelectiveUpdate(adamw(), policy="MGUP", on_nonfinite="skip")
    assert optimizer.skipped_steps == 0
    samples: list[Any] = []
    with watch(optimizer, samples.append, every=1):
        for bad in (False, True, True, False):
            give_gradients(optimizer)
            if bad:
                next(iter(optimizer.param_groups[0]["params"])).grad[0] = float("nan")
            optimizer.step()
    assert optimizer.skipped_steps == 2 and optimizer.count.steps == 2
    assert [sample.overview()["skipped_steps"] for sample in samples] == [0, 2]
    assert copy.deepcopy(optimizer).skipped_steps == 2
    resumed = SelectiveUpdate(adamw(), policy="MGUP", on_nonfinite="skip")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.skipped_steps == 0 and "skipped" not in str(optimizer.state_dict().keys())


def test_without_skipping_nothing_is_said_of_it() -> None:
    optimizer, samples = SelectiveUpdate(adamw(), policy="MGUP"), []
    with watch(optimizer, samples.append, every=1):
        step(optimizer)
    assert "skipped_steps" not in samples[0].overview()


def test_watching_with_another_model_is_refused() -> None:
    model = net()
    optimizer = SelectiveUpdate(adamw(model), policy="MGUP")
    with pytest.raises(ValueError, match="the model \\(Sequential\\) has none of the optimizer's parameters"):
        watch(optimizer, print, model=copy.deepcopy(model))
    watch(optimizer, print, model=torch.nn.ModuleList([model, net()])).close()  # a part of it is enough
