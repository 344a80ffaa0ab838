"""Makes the reference pages' text from docstrings, in the place of `<!-- reference: selective.MGUP -->`.

Markdown, in directives of Sphinx's Python domain, so that every name has an anchor and a place in index and search.
Sphinx's own autodoc reads docstrings as reStructuredText, which ours are not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel

from .docstrings import field, prose, to_markdown
from .signatures import bounds, signature

# Packages with an __all__. Each name in it has an entry in some page, under one of its full names.
PACKAGES = (
    "selective",
    "selective.norms",
    "selective.policies",
    "selective.preconditioner",
    "selective.testing",
    "selective.compare",
    "selective.bench",
    "selective.doctor",
    "selective.kernels",
)
# Modules without an __all__, and their names that are for users.
MODULES = {
    "selective.callbacks": ("lightning_callback", "trainer_callback"),
    "selective.param_groups.by_kind": ("ParamGroups",),
    "selective.watching": ("Sample", "Watch", "tensorboard"),
}
HANDED_OUT = {"ParamGroups", "StepView", "Watch"}  # users don't construct these, so their entries have no signature
DIRECTIVE = re.compile(r"^<!-- reference:(.+?)-->$", flags=re.MULTILINE | re.DOTALL)


def public_names() -> list[str]:
    """Every public name in full. An object with several names comes once for each."""
    packages = [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]
    return packages + [f"{module}.{name}" for module, names in MODULES.items() for name in names]


def names_in(page: str) -> list[str]:
    """The names for which a page has directives, in its order."""
    return [name for listed in DIRECTIVE.findall(page) for name in re.split(r"[\s,]+", listed.strip())]


def expand(page: str) -> str:
    """The page with its directives replaced by the entries."""
    return DIRECTIVE.sub(lambda found: "\n\n".join(map(entry, names_in(found[0]))), page)


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def entry(name: str) -> str:
    """The entry of a public name with its members, in the scope of its module, because some names are in several."""
    return f"```{{py:currentmodule}} {name.rpartition('.')[0]}\n```\n\n{_entry(name)}"


def _is_class(value: Any) -> bool:
    """True for a class. To Python 3.10 an alias such as `dict[str, Tensor]` is one as well."""
    return inspect.isclass(value) and not isinstance(value, types.GenericAlias)


def _entry(name: str) -> str:
    value = resolve(name)
    module, _, short = name.rpartition(".")
    if _is_class(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        parts = [
            _bases(value),
            _class_text(value),
            *(_member(attribute, member) for attribute, member in members(value)),
        ]
        called = "" if short in HANDED_OUT else signature(value)
        return _directive(f"{{py:{kind}}} {short}{called}", "\n\n".join(filter(None, parts)), module)
    if inspect.isfunction(value):
        text = to_markdown(value.__doc__, inspect.signature(value).parameters)
        return _directive(f"{{py:function}} {short}{signature(value)}", text, module)
    return _directive(f"{{py:data}} {short}", _data_text(module, short), module)


def summary(name: str) -> str:
    """The first sentence of its docstring, or of the comment on it."""
    value = resolve(name)
    text = value.__doc__ if _is_class(value) or inspect.isfunction(value) else _comment(*name.rsplit(".", 1))
    first = " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())
    return prose(re.split(r"(?<=[^.])\.(?= |$)", first)[0])


def index(names: list[str]) -> str:
    """A table of names, each linked to its entry, with its first sentence."""
    rows = [f"| {{py:obj}}`{n.rpartition('.')[2]} <{n}>` | {summary(n).replace('|', chr(92) + '|')} |" for n in names]
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])


def _directive(head: str, body: str, module: str = "", options: str = "") -> str:
    fence = "::::" if module else ":::"
    options += f":module: {module}\n" if module else ""
    return f"{fence}{head}\n{options}\n{body.strip()}\n{fence}"


def _bases(cls: type[Any]) -> str:
    public = {id(resolve(name)): name for name in reversed(public_names())}
    bases = [f"{{py:class}}`~{public[id(base)]}`" for base in cls.__bases__ if id(base) in public]
    return f"Is a {', '.join(bases)}." if bases else ""


def _class_text(cls: type[Any]) -> str:
    """The docstring, and the strings and comments beside the fields of a model or a dataclass."""
    docstring = vars(cls).get("__doc__") or ""
    init = vars(cls).get("__init__")
    declared = vars(cls).get("__annotations__", {})
    text = to_markdown(docstring, {*declared, *(inspect.signature(init).parameters if init else ())})
    fields = {**vars(cls).get("__dataclass_fields__", {}), **getattr(cls, "model_fields", {})}
    of_fields = _texts_of_fields(cls) if fields or issubclass(cls, BaseModel) else {}
    lines = []
    others = [name for name in declared if name not in fields and not name.startswith("_") and of_fields.get(name)]
    for name in declared:
        if name in fields and f":param {name}:" not in text:
            limits = bounds(fields[name]) if issubclass(cls, BaseModel) else ""
            allowed = f"Allowed: {limits}" if limits else ""
            what = ". ".join(filter(None, [of_fields.get(name, "").strip().removesuffix("."), allowed]))
            if what:
                lines.append(field(f"param {name}", what))
    attributes = [_directive(f"{{py:attribute}} {name}", to_markdown(of_fields[name])) for name in others]
    return "\n\n".join(filter(None, [text, "\n".join(lines), *attributes]))


def _texts_of_fields(cls: type[Any]) -> dict[str, str]:
    """By field, the string below it or the comment behind it."""
    source = inspect.cleandoc(f"\n{inspect.getsource(cls)}")
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, below in zip_longest(body.body, body.body[1:]):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        texts[node.target.id] = text if isinstance(text, str) else _behind(source, node)
    return texts


def members(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield documented public methods and properties, up to a public base class, which has its own entry."""
    public = {id(resolve(name)) for name in public_names()}
    seen: set[str] = set(getattr(cls, "__dataclass_fields__", ()))
    for owner in cls.__mro__:
        if owner is not cls and id(owner) in public:
            return
        if not owner.__module__.startswith("selective"):
            continue
        for name, value in vars(owner).items():
            plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if name.startswith("_") or name in seen or not (inspect.isfunction(plain) or isinstance(plain, property)):
                continue
            seen.add(name)
            if plain.__doc__:
                yield name, value


def _member(name: str, value: Any) -> str:
    if isinstance(value, property):
        return _directive(f"{{py:property}} {name}", to_markdown(value.__doc__))
    options = f":{type(value).__name__}:\n" if isinstance(value, classmethod | staticmethod) else ""
    plain: Any = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    text = to_markdown(plain.__doc__, inspect.signature(plain).parameters)
    head = f"{{py:method}} {name}{signature(plain, bound=not isinstance(value, staticmethod))}"
    return _directive(head, text, options=options)


def _data_text(module: str, short: str) -> str:
    where, node = assignment(importlib.import_module(module), short)
    code = ast.get_source_segment(inspect.getsource(where), node) or ""
    code = code if code.count("\n") < 6 else f"{code.splitlines()[0]} ..."
    return f"{prose(_comment(module, short))}\n\n```python\n{code}\n```"


def _comment(module: str, short: str) -> str:
    """The comment on a constant: behind it, or on the lines above it."""
    where, node = assignment(importlib.import_module(module), short)
    lines = inspect.getsource(where).splitlines()
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("#"):
            break
        above.insert(0, line.removeprefix("#").strip())
    return _behind(inspect.getsource(where), node) or " ".join(above)


def _behind(source: str, node: ast.stmt) -> str:
    """The comment behind a statement's last line."""
    line = source.splitlines()[(node.end_lineno or node.lineno) - 1]
    return line.encode()[node.end_col_offset or 0 :].decode().strip().removeprefix("#").strip()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that a module runs itself, with those under its own conditions."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def assignment(module: types.ModuleType, name: str) -> tuple[types.ModuleType, ast.stmt]:
    """The module and statement that assign a constant, found through our own modules' imports."""
    for node in _statements(ast.parse(inspect.getsource(module)).body):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            source = "." * node.level + (node.module or "")
            return assignment(importlib.import_module(source, module.__package__), name)
    raise LookupError(f"{name} is assigned neither in {module.__name__} nor where that imports it from")
