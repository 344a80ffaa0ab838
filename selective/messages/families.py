"""The message about an object of one family in the place of another: a selection where a policy is wanted."""

from __future__ import annotations

import json
from types import FunctionType

from selective.messages.short import short

FUNCTION = "function "
"""The beginning of the kind of every policy that was made of a function."""

_CLOSED = ("decay", "norm")  # families whose kinds are those of the library

_WAYS = {
    ("policy", "selection"): "pass Policy(selection={it}, strength=...)",
    ("policy", "strength"): "pass Policy(selection=..., strength={it})",
    ("policy", "preconditioner"): "pass it as preconditioner={it}",
    ("policy", "decay"): "pass it as decay={it}",
    ("policy", "norm"): "pass it as norm={it}",
    ("decay", "norm"): "pass it as norm={it}",
    ("norm", "decay"): "pass it as decay={it}",
    ("norm", "policy"): "pass it as policy={it}",
    ("decay", "policy"): "pass it as policy={it}",
    ("preconditioner", "policy"): "pass it as policy={it}",
    ("selection", "strength"): "pass it as strength={it}",
    ("strength", "selection"): "pass it as selection={it}",
    ("selection", "policy"): "a policy has a selection of its own: pass it as it is, as policy={it}",
    ("strength", "policy"): "a policy has a strength of its own: pass it as it is, as policy={it}",
}


def of_another_family(wanted: str, actual: str, it: str) -> str:
    """Say of which family `it` is (its repr, or its name), and where it goes. For a `wanted` policy, for instance."""
    way = _WAYS.get((wanted, actual), f"a {wanted} is needed here")
    text = f"{wanted}: {it} is a {actual}; {way.format(it=it)}"
    if wanted == "policy" and actual in ("selection", "strength") and it[:1] == "'":  # a name: on a command line, say
        data = {"kind": "Policy", "selection": "...", "strength": "...", actual: it.strip("'")}
        text += f"; as JSON: {json.dumps(data)}"
    return text


def missing_function(kind: str) -> str:
    """The message about a policy in data, such as a checkpoint, whose function is not known."""
    name = kind.removeprefix(FUNCTION)
    return f"policy: it is the function {name!r}, which no data holds; build the optimizer with policy={name} first"


def no_member(wanted: str, head: str, data: object) -> str:
    """The message about an object in the place of a `wanted` policy, for instance, whose base class is `head`."""
    way = ""
    if isinstance(data, FunctionType) and wanted != "policy":
        own = "" if wanted in _CLOSED else f", a {wanted} of your own is a `class ...({head})`"
        way = f"; only a policy can be a function{own}"
    elif wanted not in _CLOSED and type(data).__module__ != "builtins":
        way = f"; a {wanted} of your own is a `class {type(data).__name__}({head})`"
    return f"{wanted}: expected a {wanted}, a kind's name or a dict with a 'kind', found {short(data)}{way}"
