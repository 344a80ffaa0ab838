"""Errors about policies and preconditioners are one line in plain words, without pydantic's jargon and links."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from selective import (
    MGUP,
    CautiousDecay,
    Fixed,
    Policy,
    PolicyError,
    Preconditioner,
    Selection,
    SelectiveUpdate,
    Soap,
    StepView,
    TopK,
    policy_from,
    preconditioner_from,
)
from selective.policies import decay_from

JARGON = ("pydantic", "http", "validation error", "Input should", "type=", "input_value", "\n")


def assert_plain(error: BaseException, words: str) -> None:
    assert words in str(error)
    assert not [jargon for jargon in JARGON if jargon in str(error)], str(error)


class NoSelection:
    pass


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "out of bounds": (lambda: MGUP(tau=2), "MGUP: tau is 2, must be less than or equal to 1"),
    "no number": (lambda: MGUP(alpha="x"), "MGUP: alpha is 'x', must be a valid number"),
    "two": (lambda: MGUP(tau=2, alpha=-1), "tau is 2, must be less than or equal to 1; alpha is -1, must be"),
    "misspelt": (lambda: MGUP(alhpa=2), "MGUP: alhpa is an unknown key; MGUP has tau, alpha, gamma"),
    "suggested": (lambda: Soap(refresh_evry=2), "(did you mean 'refresh_every'?)"),
    "a number for a key": (lambda: policy_from({"kind": "MGUP", 3: 4}), "3 is an unknown key; MGUP has tau"),
    "of a preconditioner": (lambda: Soap(refresh_every=0), "Soap: refresh_every is 0, must be greater than or equal"),
    "missing": (lambda: Policy(selection=TopK()), "Policy: strength is required"),
    "nested": (
        lambda: policy_from({"kind": "Policy", "selection": {"kind": "TopK", "fraction": 2}, "strength": "Fixed"}),
        "Policy: selection.fraction is 2, must be less than or equal to 1",
    ),
    "by name": (lambda: group_of(MGUP()).__setitem__("tau", 3.0), "MGUP: tau is 3.0, must be less than or equal to 1"),
    "validated": (lambda: MGUP.model_validate({"tau": 3}), "MGUP: tau is 3, must be less than or equal to 1"),
    "no selection": (
        lambda: Policy(selection=NoSelection(), strength=Fixed()),
        "a selection of your own is a `class NoSelection(Selection)`",
    ),
    "a function": (
        lambda: Policy(selection=lambda view: view.update > 0, strength=Fixed()),
        "only a policy can be a function, a selection of your own is a `class ...(Selection)`",
    ),
    "a selection": (lambda: policy_from(TopK()), "TopK() is a selection; pass Policy(selection=TopK(), strength=...)"),
    "a strength's name": (lambda: policy_from("Fixed"), "'Fixed' is a strength; pass Policy(selection=..., strength="),
    "a selection's name": (
        lambda: policy_from("TopK"),
        """strength=...); as JSON: {"kind": "Policy", "selection": "TopK", "strength": "..."}""",
    ),
    "a preconditioner": (lambda: policy_from(Soap()), "Soap() is a preconditioner; pass it as preconditioner=Soap()"),
    "a decay": (lambda: policy_from(CautiousDecay()), "CautiousDecay() is a decay; pass it as decay=CautiousDecay()"),
    "a decay's name": (
        lambda: policy_from("CautiousDecay"),
        "'CautiousDecay' is a decay; pass it as decay='CautiousDecay'",
    ),
    "a name in another case": (lambda: policy_from("soap"), "'Soap' is a preconditioner; pass it as preconditioner="),
    "a short name": (lambda: policy_from("adadiag++"), "'adadiag++' is a preconditioner; pass it as preconditioner="),
    "its beginning": (lambda: decay_from("cautious"), "kind 'cautious' is not known (did you mean 'CautiousDecay'?)"),
    "another spelling": (lambda: policy_from("cautious_decay"), "'CautiousDecay' is a decay; pass it as decay="),
    "its class": (lambda: policy_from(Soap), "Soap() is a preconditioner; pass it as preconditioner=Soap()"),
    "a policy": (lambda: preconditioner_from("MGUP"), "'MGUP' is a policy; pass it as policy='MGUP'"),
    "a policy within": (lambda: Policy(selection=MGUP(), strength=Fixed()), "MGUP() is a policy; a policy has a"),
}


def group_of(policy: Policy) -> Any:
    p = torch.nn.Parameter(torch.zeros(2))
    return SelectiveUpdate(torch.optim.AdamW([p]), policy=policy).policy_groups[0]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_one_line(case: str) -> None:
    make, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        make()
    assert_plain(caught.value, words)


def test_nobody_is_told_to_write_a_decay_of_their_own() -> None:
    """Its kinds are those of the kernels."""
    for wrong in (lambda view: view.update > 0, NoSelection()):
        with pytest.raises(ValueError, match="decay: expected a decay, a kind's name or a dict") as caught:
            decay_from(wrong)
        assert "of your own" not in str(caught.value)


def unannotated() -> None:
    class NoAnnotation(Policy):
        share = 0.5


def bounded_without_annotation() -> None:
    class BoundedWithoutAnnotation(Policy):
        share = Field(0.5, gt=0)


def inherited() -> None:
    class OtherDefault(MGUP):
        alpha = 3.0


def a_callable_object() -> None:
    class CallableMask(Policy):
        mask = torch.nn.Linear(2, 2)


def a_tensor() -> None:
    class TensorField(Preconditioner):
        scale: Tensor


def another_class() -> None:
    class DeviceField(Policy):
        device: torch.device


def an_undefined_name() -> None:
    class UndefinedField(Policy):
        shares: list[flot] = []  # type: ignore[name-defined]  # noqa: F821

    UndefinedField()


BODIES: dict[Callable[[], None], str] = {
    unannotated: "NoAnnotation: share has no annotation; write `share: float = ...` for a hyper-parameter",
    bounded_without_annotation: "BoundedWithoutAnnotation: share has no annotation; write `share: ... = ...`",
    inherited: "OtherDefault: alpha has no annotation; write `alpha: float = ...`",
    a_callable_object: "CallableMask: mask is an object of type Linear; write `def mask(self, ...):`",
    a_tensor: "TensorField: the field 'scale' is a tensor, and hyper-parameters are saved as JSON",
    another_class: "DeviceField: the field 'device' is of type device, and hyper-parameters are saved as JSON",
    an_undefined_name: "UndefinedField: an annotation in its class body names 'flot', which is not defined",
}


@pytest.mark.parametrize("define", BODIES)
def test_a_wrong_class_body_is_one_line(define: Callable[[], None]) -> None:
    with pytest.raises(TypeError) as caught:
        define()
    assert_plain(caught.value, BODIES[define])


def test_a_right_class_body_is_taken() -> None:
    """The failing twin: none of these attributes is a field without an annotation."""

    class ManyAttributes(Policy):
        reads = frozenset({"update"})  # the annotation is the base class's
        table: ClassVar = (1, 2)
        share: float = 0.5
        _calls: int = 0
        _unannotated = 0
        negative = partial(max, 0)

        class Inner:
            pass

        @property
        def half(self) -> float:
            return self.share / 2

        mask = lambda self, view: view.update > self.share  # noqa: E731

    policy = ManyAttributes(share=1.0)
    assert list(ManyAttributes.model_fields) == ["share"] and policy.half == 0.5
    policy._calls += 1  # private attributes were never frozen
    assert policy._calls == 1


class OwnInit(Policy):
    def __init__(self, n: int) -> None:
        self.n = n

    def mask(self, view: StepView) -> Tensor:
        return view.update > 0


class LateOwnInit(Policy):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n


class OwnInitOfPreconditioner(Preconditioner):
    def __init__(self, size: int) -> None:
        self.size = size


class ForgetsTheBase(Selection):
    def __init__(self) -> None:
        pass

    def select(self, view: StepView) -> Tensor:
        return view.update > 0


@pytest.mark.parametrize("cls,name", [(OwnInit, "n"), (LateOwnInit, "n"), (OwnInitOfPreconditioner, "size")])
def test_an_init_of_its_own_is_told_of_fields(cls: Any, name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        cls(3)
    assert_plain(
        caught.value, f"write `{name}: int` in the class body in the place of __init__, and call {cls.__name__}("
    )


def test_an_init_that_forgets_the_base_class_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        Policy(selection=ForgetsTheBase(), strength=Fixed())
    assert_plain(caught.value, "ForgetsTheBase: its __init__ does not call super().__init__()")


class CountsInTheMask(Policy):
    n: int = 0

    def mask(self, view: StepView) -> Tensor:
        self.n += 1
        return view.update > 0


def test_counting_in_a_mask_is_told_of_state() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), policy=CountsInTheMask())
    with pytest.raises(PolicyError) as caught:
        optimizer.step()
    first, after = str(caught.value).splitlines()
    assert (
        "CountsInTheMask: self.n can't be assigned, because a policy is frozen; make what changes from step to step in "
        in first
    )
    assert "init_state(view)" in first and "opt.policy_groups[i]['n'] = ..." in first
    assert after == "Parameters are as they were before the step; moments have moved." and "pydantic" not in first


def test_assigning_to_a_preconditioner_names_its_group() -> None:
    with pytest.raises(AttributeError) as caught:
        Soap().beta = 0.5  # type: ignore[misc]
    assert_plain(caught.value, "opt.preconditioner_groups[i]['beta'] = ...")
