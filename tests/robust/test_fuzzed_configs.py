"""Whatever JSON is in a configuration: an object that survives a round trip, or an error that can be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from selective import Policy, Preconditioner, Selection, Strength, policy_from, preconditioner_from
from selective.compare import ConfigError, build
from selective.compare.config import CompareConfig, dump, read
from selective.policies import Decay

FAMILIES: tuple[type[Any], ...] = (Policy, Selection, Strength, Decay, Preconditioner)
# The library's own: other test files register kinds as well, some of them broken on purpose.
OWN = {f: {k: m for k, m in f._registry.items() if m.__module__.startswith("selective.")} for f in FAMILIES}
KINDS = sorted({kind for own in OWN.values() for kind in own})
FIELDS = sorted({name for own in OWN.values() for model in own.values() for name in model.model_fields})
SETTINGS = sorted(CompareConfig.model_fields)

texts = st.one_of(st.sampled_from([*KINDS, *FIELDS, *SETTINGS, "kind", "", "null"]), st.text(max_size=8))
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308]))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)


def nested(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    grown = lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4))  # noqa: E731
    return st.recursive(leaves, grown, max_leaves=12)


data = nested(texts)
# Nearly right: a kind with its own fields, which arbitrary JSON would never hit upon.
tagged = st.sampled_from(KINDS).flatmap(
    lambda kind: st.fixed_dictionaries({"kind": st.just(kind)}, optional=dict.fromkeys(FIELDS, leaves))
)
own_fields = st.sampled_from([(f, k) for f in FAMILIES for k in OWN[f]]).flatmap(
    lambda pair: st.fixed_dictionaries(
        {"kind": st.just(pair[1])},
        optional={name: st.one_of(leaves, tagged) for name in pair[0]._registry[pair[1]].model_fields},
    )
)
anything = st.one_of(data, tagged, own_fields, st.sampled_from(KINDS), own_fields.map(json.dumps), data.map(json.dumps))
names = st.one_of(st.sampled_from([s for s in SETTINGS if s != "imports"]), texts)  # imports would run code
comparisons = st.dictionaries(names.filter(lambda name: name != "imports"), data, max_size=4)

PARSERS: dict[str, Callable[[Any], Any]] = {
    "policy_from": policy_from,
    "Selection": Selection.from_data,
    "Strength": Strength.from_data,
    "Decay": Decay.from_data,
    "preconditioner_from": preconditioner_from,
}


def holds(parse: Callable[[Any], Any], found: Any) -> bool:
    """True if it was refused with an error for users (any other propagates), or is one that survives JSON."""
    made, reason = None, None
    try:
        made = parse(found)
    except ValueError as error:  # pydantic's and ConfigError are ValueErrors
        reason = str(error)
    if reason is not None:
        assert 0 < len(reason.strip()) < 20_000
        return False
    if isinstance(made, BaseModel):
        text = made.model_dump_json()
        again = parse(json.loads(text))
        assert again == made
        assert again.model_dump_json() == text
    else:
        assert made is None
    return True


def compares(found: Any) -> bool:
    """The same of a whole comparison."""
    reason, made = "", None
    try:
        made = build(found)
    except ConfigError as error:
        reason = str(error)
    if made is None:
        assert "is not a comparison" in reason
        return False
    assert build(json.loads(json.dumps(dump(made)))) == made
    return True


@pytest.mark.parametrize("name", PARSERS)
@given(found=anything)
@settings(max_examples=60)
def test_policies_and_preconditioners(name: str, found: Any) -> None:
    holds(PARSERS[name], found)


@given(found=comparisons)
@settings(max_examples=60)
def test_comparisons(found: dict[str, Any]) -> None:
    compares(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
@given(found=anything)
@settings(max_examples=3000)
def test_policies_and_preconditioners_at_length(name: str, found: Any) -> None:
    holds(PARSERS[name], found)


@pytest.mark.slow
@given(found=comparisons)
@settings(max_examples=3000)
def test_comparisons_at_length(found: dict[str, Any]) -> None:
    compares(found)


DEEP = 100_000


def deep(depth: int = 5_000) -> Any:
    """Lists in lists that were never JSON."""
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


HOSTILE: dict[str, Any] = {
    "deep list": "[" * DEEP, "deep dictionary": '{"kind":' * DEEP,
    "deep and whole": '{"kind":' * DEEP + "1" + "}" * DEEP,
    "long number": '{"kind": "TopK", "fraction": ' + "9" * 10_000 + "}",
    "not a number": '{"kind": "TopK", "fraction": NaN}', "half a pair": '{"kind": "\\ud800"}',
    "null bytes": '{"kind": "TopK\\u0000"}', "bytes": b"TopK", "tuple": ("TopK",), "set": {"TopK"}, "object": object(),
    "class": Policy, "number": 3, "not text": {"kind": ["TopK"]}, "numbers for keys": {1: 2, "kind": "TopK"},
    "deep data": deep(), "deep kind": {"kind": deep()}, "no kind, deep": {"tau": deep()},
    "deep tau": {"kind": "MGUP", "tau": deep()}, "deep fraction": {"kind": "TopK", "fraction": deep()},
    "deep beta": {"kind": "Eigenbasis", "beta": deep()}, "long text": "x" * 10**5,
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile(name: str, what: str) -> None:
    holds(PARSERS[name], HOSTILE[what])


NO_COMPARISONS: list[Any] = [
    None, 3, "x", [], [1], ["ab"], {"policies": [HOSTILE["deep and whole"]]}, {1: 2}, {"model": deep()}, {"lr": deep()},
    {"base_options": deep()}, {"policies": [deep()]}, {"policies": [{"kind": deep()}]},
    {"seeds": 2**31}, {"seeds": 2**63},
]  # fmt: skip


@pytest.mark.parametrize("found", NO_COMPARISONS, ids=range(len(NO_COMPARISONS)))
def test_what_is_no_comparison(found: Any) -> None:
    assert not compares(found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[" * DEEP),
        ("a.json", "9" * 10_000),
        ("a.yaml", "[" * 5_000),
        ("a.yaml", "steps: 2020-13-45"),
        ("a.yaml", "a: &a [*a]\n{"),
    ],
)
def test_files_that_are_none(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"is not valid (JSON|YAML)"):
        read(tmp_path / name)


def test_both_outcomes_are_drawn() -> None:
    """The twin: a generator that only makes nonsense would show nothing."""
    outcomes = set()

    @given(found=own_fields)
    @settings(max_examples=300, database=None)
    def draw(found: Any) -> None:
        for name, parse in PARSERS.items():
            outcomes.add((name, holds(parse, found)))

    draw()
    assert outcomes == {(name, held) for name in PARSERS for held in (False, True)}
