"""Policies are data: they print as written, go to JSON and back, are frozen, and say what is wrong with bad input."""

from __future__ import annotations

import contextlib
import json
import math
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import selective
from selective import policies
from selective.policies import (
    MGUP,
    Agreement,
    Cautious,
    Decay,
    Dense,
    MatchedRandomMask,
    NormPreserving,
    Policy,
    RandomMask,
    Selection,
    Strength,
    TopK,
    policy_from,
)  # fmt: skip

FAMILIES: dict[str, type[Any]] = {"policy": Policy, "selection": Selection, "strength": Strength, "decay": Decay}
OURS = {  # ours only: tests define kinds of their own
    name: sorted((c for c in family._registry.values() if c.__module__.startswith("selective.")), key=lambda c: c.kind)
    for name, family in FAMILIES.items()
}
MEMBERS = [member for members in OURS.values() for member in members]
NAMES = {**{m.__name__: m for m in MEMBERS}, "Policy": Policy}


def bounded_floats(metadata: list[Any]) -> st.SearchStrategy[float]:
    """Floats within a field's own bounds, the edges among them."""
    low, high, open_low, open_high = -1e6, 1e6, False, False
    for bound in metadata:
        low, open_low = (bound.gt, True) if hasattr(bound, "gt") else (getattr(bound, "ge", low), open_low)
        high, open_high = (bound.lt, True) if hasattr(bound, "lt") else (getattr(bound, "le", high), open_high)
    return st.floats(low, high, exclude_min=open_low, exclude_max=open_high)


def values(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """The values that a field of this type may hold."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return st.one_of(*(values(a, metadata) for a in get_args(annotation)))
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is float:
        return bounded_floats(metadata)
    if annotation is Policy:  # a control's policy has to have parts: not a control again
        return st.one_of(*(instances(m) for m in OURS["policy"] if m is not MatchedRandomMask))
    family = {Selection: "selection", Strength: "strength"}[annotation]
    return st.one_of(*(instances(m) for m in OURS[family]))


def allowed(model: type[Any], fields: dict[str, Any]) -> bool:
    """The one rule between two fields: there is no previous update."""
    return model is not Agreement or (fields.get("momentum"), fields.get("of")) != ("previous", "update")


def instances(model: type[Any]) -> st.SearchStrategy[Any]:
    """Members of one class with some of their fields given."""
    fields = {name: values(field.annotation, field.metadata) for name, field in model.model_fields.items()}
    required = {name: s for name, s in fields.items() if model.model_fields[name].is_required()}
    optional = {name: s for name, s in fields.items() if name not in required}
    given_fields = st.fixed_dictionaries(required, optional=optional).filter(lambda f: allowed(model, f))
    return given_fields.map(lambda f: model(**f))


anything = st.sampled_from(MEMBERS).flatmap(instances)
few = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def family_of(member: Any) -> type[Any]:
    return next(family for family in FAMILIES.values() if isinstance(member, family))


def test_all_kinds_are_here() -> None:
    names = {m.__name__ for m in MEMBERS}
    assert {
        "Dense", "AlphaConsistency", "MGUP", "CautiousMGUP", "Cautious", "Grams", "Magma", "SkipUpdate", "RandomMask",
        "MatchedRandomMask", "Combined", "Everything", "Agreement", "TopK", "Bernoulli", "Fixed", "MeanPreserving",
        "NormPreserving", "Alignment", "CautiousDecay", "RandomDecay",
    } <= names  # fmt: skip
    assert names <= set(policies.__all__)


@few
@given(anything)
def test_json_and_back(member: Any) -> None:
    text = member.model_dump_json()
    again = family_of(member).from_data(text)
    assert type(again) is type(member)
    assert again == member
    assert again.model_dump_json() == text
    assert json.loads(text)["kind"] == member.kind
    assert family_of(member).from_data(member.model_dump()) == member


@few
@given(anything)
def test_repr_evaluates_to_an_equal_member(member: Any) -> None:
    again = eval(repr(member), dict(NAMES))
    assert again == member
    assert repr(again) == repr(member)
    assert str(member) == repr(member)


def test_repr_shows_what_was_written() -> None:
    assert repr(MGUP()) == "MGUP()"
    assert repr(MGUP(tau=0.25)) == "MGUP(tau=0.25)"
    assert repr(RandomMask.matching(Cautious())) == "MatchedRandomMask(policy=Cautious(), norm=True, cap=10.0)"


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.__name__)
def test_a_name_alone_is_a_kind_with_its_defaults(member: Any) -> None:
    family = next(f for f in FAMILIES.values() if issubclass(member, f))
    if any(field.is_required() for field in member.model_fields.values()):
        with pytest.raises(ValueError, match="required"):
            family.from_data(member.kind)
    else:
        assert family.from_data(member.kind) == member()


def test_none_is_dense() -> None:
    assert policy_from(None) == Dense()


@few
@given(anything)
def test_members_are_frozen_and_hashable(member: Any) -> None:
    for name in type(member).model_fields:
        with pytest.raises(AttributeError, match="frozen"):
            setattr(member, name, getattr(member, name))
    assert hash(member) == hash(member.model_copy())


PREVIOUS_UPDATE = {"kind": "Agreement", "momentum": "previous", "of": "update"}
CONTROL = {"kind": "MatchedRandomMask", "policy": "MGUP"}


@pytest.mark.parametrize(
    "data,parts",
    [
        ("Mgupp", ["policy", "'Mgupp'", "'MGUP'", "'Cautious'"]),
        ({"kind": "Fixed"}, ["policy", "'Fixed' is a strength"]),  # a strength is no policy
        ({"kind": 3}, ["kind 3 is not known", "'MGUP'"]),
        ({"tau": 0.3}, ["no 'kind'", "'tau'", "'MGUP'"]),
        ([1], ["[1]", "kind's name"]),
        ("{oops", ["policy", "not JSON"]),
        ({"kind": "MGUP", "tua": 0.3}, ["tua", "unknown key; MGUP has tau, alpha"]),
        ({"kind": "MGUP", "tau": 1.5}, ["tau", "less than or equal to 1", "1.5"]),
        ({"kind": "MGUP", "tau": 0}, ["tau", "greater than 0"]),
        ({"kind": "MGUP", "alpha": math.nan}, ["alpha", "finite"]),
        ({"kind": "MGUP", "score": "sign"}, ["score", "'update', 'momentum' or 'nesterov'", "'sign'"]),
        (
            {"kind": "Policy", "selection": {"kind": "TopK", "fraction": 2}, "strength": {"kind": "Fixed"}},
            ["selection.fraction", "less than or equal to 1"],
        ),
        (
            {"kind": "Policy", "selection": {"kind": "TopP"}, "strength": {"kind": "Fixed"}},
            ["selection", "'TopP'", "'TopK'", "'Agreement'"],
        ),
        (
            {"kind": "AlphaConsistency", "strength": {"kind": "NormPreserving", "cap": 0}},
            ["strength.cap", "greater than 0"],
        ),
        (
            {"kind": "Policy", "selection": PREVIOUS_UPDATE, "strength": "Fixed"},
            ["selection", "no update of the step before"],
        ),
        (
            {"kind": "MatchedRandomMask", "policy": {"kind": "Magma", "smoothing": 1}},
            ["policy.smoothing", "less than 1"],
        ),
        ({"kind": "MatchedRandomMask", "policy": CONTROL}, ["which coordinates", "MatchedRandomMask"]),
    ],
)
def test_errors_name_path_found_and_allowed(data: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        policy_from(data)
    for part in parts:
        assert part in str(caught.value)


def test_positional_arguments_and_wrong_families_are_refused() -> None:
    with pytest.raises(TypeError):
        MGUP(0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="selection"):
        Policy(selection=NormPreserving(), strength=TopK())


DIVIDED = """
class {name}(Policy):
    by: float = {by}
    def mask(self, view):
        return view.update * 0 + 1 / self.by
"""


def define(source: str, name: str, module: str = "user_code") -> Any:
    """A class as a user's module or notebook cell defines it."""
    scope: dict[str, Any] = {**vars(policies), "torch": torch, "__name__": module}
    exec("from typing import ClassVar\n" + source, scope)
    return scope[name]


def test_a_subclass_registers_and_travels() -> None:
    cls = define(DIVIDED.format(name="Halved", by=2.0), "Halved")
    assert policy_from("Halved") == cls()
    assert policy_from(cls(by=4).model_dump_json()) == cls(by=4)
    signed = define("class Signed(Selection):\n    def select(self, view):\n        return view.update > 0\n", "Signed")
    policy = Policy(selection=signed(), strength=NormPreserving(cap=3))
    assert policy_from(policy.model_dump_json()) == policy


def test_a_subclass_is_saved_and_loaded_with_its_fields() -> None:
    cls = define(DIVIDED.format(name="Third", by=3.0), "Third")
    optimizers = []
    for by in (5.0, 3.0):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizers.append(selective.SelectiveUpdate(torch.optim.SGD([p], lr=1.0, momentum=0.9), policy=cls(by=by)))
        optimizers[-1].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].policy_groups[0].policy == cls(by=5.0)
    assert repr(optimizers[1].policy_groups[0].policy) == "Third(by=5.0)"


def test_a_redefinition_in_the_same_place_replaces_and_elsewhere_is_refused() -> None:
    define(DIVIDED.format(name="Cell", by=1.0), "Cell", "notebook")
    again = define(DIVIDED.format(name="Cell", by=7.0), "Cell", "notebook")
    assert type(policy_from("Cell")) is again
    assert policy_from("Cell").by == 7.0  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"'Cell' is taken by notebook.Cell.*rename"):
        define(DIVIDED.format(name="Cell", by=2.0), "Cell", "elsewhere")
    assert type(policy_from("Cell")) is again
    with pytest.raises(TypeError, match=r"'MGUP' is taken by selective\.policies\.mgup\.MGUP"):
        define("class MGUP(Policy):\n    pass\n", "MGUP", "elsewhere")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(NAMES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(sorted({"kind", *(name for m in MEMBERS for name in m.model_fields)}))
near_policies = st.recursive(
    json_values,
    lambda inner: st.builds(
        lambda kind, rest: {**rest, "kind": kind},
        st.sampled_from([m.kind for m in MEMBERS]),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(near_policies | json_values)
def test_any_json_is_a_policy_or_a_value_error(data: Any) -> None:
    for form in (data, json.dumps(data)):
        with contextlib.suppress(ValueError):  # anything else fails the test
            assert isinstance(policy_from(form), Policy)


almost_json = st.text('{}[]",:0123456789eE.-kind', max_size=30).map(lambda text: "{" + text)


@settings(max_examples=200)
@given(st.text(max_size=30) | almost_json | st.binary(max_size=9))
def test_any_text_is_a_policy_or_a_value_error(text: Any) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(policy_from(text), Policy)
