"""The reference: every public name has an entry, and what docstrings say arrives in it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
from documentation import reference
from documentation.docstrings import field, prose, to_markdown
from documentation.signatures import signature

import selective
from selective import MGUP, Eigenbasis, Policy, SelectiveUpdate
from selective.preconditioner import Refreshed

ROOT = Path(__file__).parents[2]

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
ENTRIES = [name for page in PAGES for name in reference.names_in(page.read_text())]


def without_entry(names: list[str], entries: list[str]) -> list[str]:
    """Public names whose object has no entry under any of its names."""
    there = {id(reference.resolve(name)) for name in entries}
    return [name for name in names if id(reference.resolve(name)) not in there]


def test_every_public_name_has_one_entry() -> None:
    assert len(reference.public_names()) > 100
    assert without_entry(reference.public_names(), ENTRIES) == []
    assert [name for name, times in Counter(ENTRIES).items() if times > 1] == []
    assert set(ENTRIES) <= set(reference.public_names())
    assert {f"selective.{name}" for name in selective.__all__} <= set(ENTRIES)


def test_a_name_without_an_entry_is_noticed() -> None:
    lacking = [name for name in ENTRIES if name != "selective.MGUP"]
    assert without_entry(reference.public_names(), lacking) == ["selective.MGUP", "selective.policies.MGUP"]
    with pytest.raises(AttributeError):
        reference.expand("<!-- reference: selective.NoSuchName -->")


def without_example(pages: list[str]) -> list[str]:
    """Public classes and functions of `selective` that no block of code on these pages uses."""
    code = "\n".join(
        block for page in pages for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    )
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    return sorted(set(selective.__all__) - used)


def test_every_class_has_an_example() -> None:
    """The blocks run in test_code_blocks.py."""
    assert without_example([page.read_text() for page in PAGES]) == []
    only = "MGUP\n```python\nfrom selective import Cautious, MGUP\nMGUP()\n```\n"
    assert without_example([only]) == sorted(set(selective.__all__) - {"MGUP"})


def test_the_packages_are_those_with_public_names() -> None:
    inside = [f"selective.{one.name}" for one in pkgutil.iter_modules(selective.__path__) if one.ispkg]
    public = [name for name in inside if hasattr(importlib.import_module(name), "__all__")]
    assert sorted(reference.PACKAGES) == sorted(["selective", *public])


def test_every_entry_says_something() -> None:
    assert [name for name in ENTRIES if not reference.summary(name).strip()] == []
    for name in ENTRIES:
        assert reference.entry(name).count(":::") % 2 == 0, name  # directives are closed


def test_a_policy() -> None:
    entry = reference.entry("selective.MGUP")
    assert "tau: float = 0.5, alpha: float | None = None" in entry
    assert ":param tau: The share of each tensor that is selected. Allowed: > 0, ≤ 1" in entry
    assert "[arXiv 2606.17526](https://arxiv.org/abs/2606.17526)" in entry
    assert "Is a {py:class}`~selective.Policy`." in entry
    assert "from_data" not in entry and "from_data" in reference.entry("selective.Policy")


def test_the_optimizer_has_its_options_and_members() -> None:
    entry = reference.entry("selective.SelectiveUpdate")
    for option in inspect.signature(SelectiveUpdate).parameters:
        assert f":param {option}: " in entry, option
    for member in ("step", "explain", "statistics", "state_dict", "load_state_dict", "init_state", "add_param_group"):
        assert f"{{py:method}} {member}(" in entry, member
    assert "{py:method} bind(" in entry and "{py:method} for_model(" in entry and ":classmethod:" in entry
    assert ":param no_decay: the kinds that do not decay" in entry
    assert ":raises ValueError: the base can't be wrapped" in entry


def test_fields_are_explained_by_strings_and_comments() -> None:
    assert ":param beta: Of the running averages: A ← β A" in reference.entry("selective.Eigenbasis")
    assert "a memory of 20 steps. Allowed: ≥ 0, &lt; 1\n" in reference.entry("selective.Eigenbasis")
    assert "{py:attribute} kernel" in reference.entry("selective.Selection")
    assert ":param seeds: that count" in reference.entry("selective.compare.Summary")
    assert "batch, rows, columns" in reference.entry("selective.preconditioner.Shape")
    with pytest.raises(LookupError, match="assigned neither"):
        reference.assignment(selective.testing, "no_such_constant")


def test_what_is_handed_out_has_no_signature() -> None:
    assert "{py:class} StepView\n" in reference.entry("selective.StepView")
    assert {name.rpartition(".")[2] for name in ENTRIES} >= reference.HANDED_OUT


def test_signatures() -> None:
    def function(a: int, *rest: str, b: list[int] | None = None, c=len) -> dict[str, int]: ...

    assert signature(function) == "(a: int, *rest: str, b: list[int] | None = None, c=len) -> dict[str, int]"
    assert signature(function, bound=True).startswith("(*rest: str")
    assert signature(Refreshed).startswith("(new: bool, order: Tensor | None = None")
    assert signature(Policy) == "()"
    assert signature(selective.PolicyError) == ""
    shown = signature(Eigenbasis)
    defaults = {name: field.get_default() for name, field in Eigenbasis.model_fields.items()}
    assert all(f"{name}: " in shown and f" = {value!r}" in shown for name, value in defaults.items())
    assert signature(MGUP).startswith(
        "(*, tau: float = 0.5, alpha: float | None = None, gamma: float | None = None, score"
    )


def test_docstrings_become_markdown() -> None:
    text = """First u*g and m*g, *signed* and **bold**, 1 < 2, `a * b < c`.

        code = a * b

    Args:
        x, y: of
            two lines
        z: 1 * 2

    Returns:
        a thing

    Raises:
        ValueError: where x < 0

    z: not a section, but a parameter
    """
    assert to_markdown(text, {"z"}).split("\n\n") == [
        r"First u\*g and m\*g, *signed* and **bold**, 1 &lt; 2, `a * b < c`.",
        "    code = a * b",
        ":param x: of two lines\n:param y: as `x`\n:param z: 1 \\* 2",
        ":returns: a thing",
        ":raises ValueError: where x &lt; 0",
        ":param z: not a section, but a parameter",
    ]
    assert to_markdown("z: nobody's parameter") == "z: nobody's parameter"
    assert to_markdown(None) == ""
    assert field("param x", "> 0\n    of it") == r":param x: \> 0 of it"
    with pytest.raises(ValueError, match="begins with"):
        to_markdown("Args:\n    no name here")
    assert prose("arXiv 1234.56789") == "[arXiv 1234.56789](https://arxiv.org/abs/1234.56789)"
