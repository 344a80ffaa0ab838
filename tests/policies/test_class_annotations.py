"""A policy, a preconditioner and a selection whose file postpones its annotations, with `ClassVar` without brackets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective import SelectiveUpdate, configured, policies
from selective.preconditioner.base import Preconditioner

IMPORTS = {
    "by-name": ("from typing import ClassVar", "ClassVar"),
    "renamed": ("from typing import ClassVar as OfTheClass", "OfTheClass"),
    "dotted": ("import typing as t", "t.ClassVar"),
    "extensions": ("import typing_extensions", "typing_extensions.ClassVar"),
    "for-type-checkers": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from typing import ClassVar",
        "ClassVar",
    ),
    "with-brackets": ("from typing import ClassVar", "ClassVar[frozenset[str]]"),
}

POLICY = """
class {name}(Policy):
    reads: {annotation} = frozenset({{"update", "param"}})
    scope: {annotation} = "element"
    size: float = 0.5

    def mask(self, view):
        return torch.full_like(view.update, self.size)
"""


def define(imports: str, source: str, name: str, postponed: bool = True) -> Any:
    """A class as a module of its own defines it."""
    scope: dict[str, Any] = {
        **vars(policies),
        "torch": torch,
        "Preconditioner": Preconditioner,
        "__name__": "user_code",
    }
    future = "from __future__ import annotations\n" if postponed else ""
    exec(compile(f"{future}{imports}\n{source}", "user_code.py", "exec", dont_inherit=True), scope)
    return scope[name]


@pytest.mark.parametrize("postponed", [True, False], ids=["postponed", "evaluated"])
@pytest.mark.parametrize("how", IMPORTS)
def test_a_policy_keeps_its_class_variables_and_its_fields(how: str, postponed: bool) -> None:
    if how == "for-type-checkers" and not postponed:
        pytest.skip("Python itself raises a NameError")
    imports, annotation = IMPORTS[how]
    name = f"Sized{how.title().replace('-', '')}{postponed}"
    cls = define(imports, POLICY.format(name=name, annotation=annotation), name, postponed)
    assert list(cls.model_fields) == ["size"]
    assert cls.reads == {"update", "param"} and cls.scope == "element"
    assert policies.Policy.from_data(cls(size=0.25).model_dump_json()) == cls(size=0.25)
    with pytest.raises(ValueError, match="unknown key"):
        cls(reads=frozenset())  # no hyper-parameter
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    SelectiveUpdate(torch.optim.SGD([p], lr=1.0), policy=cls()).step()
    assert torch.equal(p, torch.full((3,), 0.5))


@pytest.mark.parametrize("family", ["Selection", "Strength", "Preconditioner"])
def test_the_other_families_do_too(family: str) -> None:
    source = f"class Own{family}({family}):\n    tables: ClassVar = (1, 2)\n    size: float = 0.5\n"
    cls = define("from typing import ClassVar", source, f"Own{family}")
    assert list(cls.model_fields) == ["size"] and cls.tables == (1, 2)


def test_types_of_the_function_around_are_still_found() -> None:
    """pydantic looks for them in the frame that called its metaclass."""
    Share = float

    class Local(policies.Policy):
        share: Share = 0.5  # type: ignore[valid-type]

    assert Local.model_fields["share"].annotation is float


def test_a_field_that_is_no_class_variable_stays_a_field() -> None:
    source = "class Plain(Policy):\n    ClassVariable: float = 1.0\n    other: t.Any = None\n"
    assert list(define("import typing as t", source, "Plain").model_fields) == ["ClassVariable", "other"]


def test_pydantic_is_handed_an_evaluated_annotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing twin: without the replacement it is handed a text, which older ones cannot evaluate."""
    source = POLICY.format(name="Handed", annotation="ClassVar")
    assert not isinstance(namespace_annotation(source), str)
    monkeypatch.setattr(configured, "_TEXT_IS_EVALUATED", True)
    assert namespace_annotation(source) == "ClassVar"


def namespace_annotation(source: str) -> Any:
    """The annotation of `reads` in the namespace that the metaclass gets."""
    seen: dict[str, Any] = {}

    class Spy(type(policies.Policy)):  # type: ignore[misc]
        def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **more: Any) -> Any:
            seen.update(namespace["__annotations__"])
            return type(name, (), {})

    head = "class Handed(Policy):"
    assert head in source
    scope = {"torch": torch, "Policy": policies.Policy, "Spy": Spy, "__name__": "user_code"}
    text = "from __future__ import annotations\nfrom typing import ClassVar\n"
    text += source.replace(head, "class Handed(Policy, metaclass=Spy):")
    exec(compile(text, "user_code.py", "exec", dont_inherit=True), scope)
    return seen["reads"]
