"""Imports go one way: the stairs of docs/design.md, "The tree, and which way imports go".

The imports are read from the source, not run, so that lazy ones and those for type checkers count as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own step and from those below it. A name stands for everything under it.
STAIRS = [
    {"selective.kernels"},
    {"selective.messages"},
    {
        "selective.bind",
        "selective.configured",
        "selective.foreach",
        "selective.parameter",
        "selective.sharding",
        "selective.statistics",
        "selective.step_count",
        "selective.version",
    },
    {"selective.policies", "selective.preconditioner"},
    {"selective.norms"},
    {"selective.base"},
    {"selective.rotation"},
    {"selective.capture", "selective.param_groups"},
    {"selective.plan"},
    {"selective.state"},
    {"selective.step"},
    {"selective.checkpoint"},
    {"selective.explain"},
    {
        "selective.optimizer",
        "selective.chained",
        "selective.for_model",
    },  # and every other module that has no place of its own here
    {"selective"},  # the front door itself: `selective/__init__.py`
    {"selective.testing"},
    {"selective.compare", "selective.bench", "selective.doctor"},
    {"selective.cli"},
]
# What `import selective` may need at import time: the declared dependencies, and what pydantic itself requires.
# Everything else (matplotlib, other people's optimizers) is imported in the function that uses it.
NEEDED = {"torch", "pydantic", "pydantic_core", "typing_extensions"}
OF_PYTEST = {"selective.testing.plugin"}  # imported by pytest's own hook alone
FREE_OF_EXTRAS = STAIRS.index({"selective.testing"})  # up to here; above, the extra `compare` is there


@dataclass(frozen=True)
class Import:
    """One name that a file imports, and where."""

    module: str  # the importing one
    imported: str
    file: Path
    line: int
    lazy: bool  # inside a function, or for type checkers only

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module} imports {self.imported}"


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    parts = ("selective", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every import of a file; `from a.b import c` counts as `a.b.c` where that is a module, else as `a.b`."""
    module = module_of(file, root)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]

    def is_module(name: str) -> bool:
        parts = name.split(".")
        folder = root / "kernels" if parts[:2] == ["selective", "kernels"] else root / parts[0]
        path = folder.joinpath(*parts[2 if folder.name == "kernels" else 1 :])
        return path.is_dir() or path.with_suffix(".py").is_file()

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, file.relative_to(root), node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(module, name if is_module(name) else base, file.relative_to(root), node.lineno, lazy)
        is_lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or is_lazy or for_types)

    yield from visit(ast.parse(file.read_text(), str(file)), False)


def all_imports(root: Path) -> list[Import]:
    files = [
        file
        for folder in ("selective", "kernels")
        for file in sorted((root / folder).rglob("*.py"))
        if file.relative_to(root).parts[:2] != ("selective", "kernels")  # the symlink, where rglob follows it
    ]
    return list(dict.fromkeys(found for file in files for found in imports_of(file, root)))


def step_of(module: str) -> int:
    """The step that a module stands on."""
    name = ".".join(module.split(".")[:2])
    rest = next(i for i, step in enumerate(STAIRS) if "selective.optimizer" in step)
    return next((i for i, step in enumerate(STAIRS) if name in step), rest)


def complaints(root: Path) -> list[str]:
    """Every import that breaks a rule, with the rule."""
    found = []
    for each in all_imports(root):
        own, top = step_of(each.module), each.imported.split(".")[0]
        if top == "selective":
            if step_of(each.imported) > own:
                found.append(f"{each}: that is upward; move what both need down, or hand it in as an argument")
        elif top == "kernels":
            found.append(f"{each}: the folder's import name is selective.kernels")
        elif top == "triton":
            found += [f"{each}: {why}" for why in [triton_rule(each)] if why]
        elif top == "pytest" and each.module in OF_PYTEST:
            continue
        elif not each.lazy and own <= FREE_OF_EXTRAS and top not in NEEDED and top not in sys.stdlib_module_names:
            found.append(f"{each} at import time, which is no dependency; import it in the function that uses it")
        elif step_of("selective.kernels") == own and top not in {"torch", *sys.stdlib_module_names}:
            found.append(f"{each}: kernels stand on torch and triton alone")
    return found + cycles(root)


def cycles(root: Path) -> list[str]:
    """Every set of folders of the package that import from each other, which they could do on one step."""
    needs: dict[str, set[str]] = {}
    for each in all_imports(root):
        pair = [".".join(name.split(".")[:2]) for name in (each.module, each.imported)]
        if all((root / name.replace(".", "/")).is_dir() for name in pair if name != "selective.kernels"):
            needs.setdefault(pair[0], set()).add(pair[1])

    def reached(first: str) -> set[str]:
        found, waiting = set[str](), [first]
        while waiting:
            new = needs.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    rounds = {frozenset(name for name in reached(first) if first in reached(name)) for first in needs}
    return [f"a cycle: {', '.join(sorted(names))} import from each other" for names in rounds if len(names) > 1]


def triton_rule(each: Import) -> str | None:
    """Triton is a matter of kernels; at import time only of the kernel files, which are loaded for CUDA tensors."""
    if not each.module.startswith("selective.kernels."):
        return "triton belongs into kernels/"
    if each.lazy:
        return None
    if each.module.startswith(("selective.kernels.reference", "selective.kernels.cpu")):
        return "these have to work where triton is not installed"
    return None


def test_imports_go_one_way():
    found = complaints(ROOT)
    assert found == [], "\n" + "\n".join(found)


def test_few_modules_lie_directly_in_the_package():
    """They are the first that a newcomer sees: the face and what all folders stand on. Everything else has a folder."""
    modules = sorted(file.name for file in (ROOT / "selective").glob("*.py"))
    assert len(modules) <= 12, modules


def test_the_reading_is_not_empty():
    # A reader that finds nothing would hold every rule.
    read = {each.module for each in all_imports(ROOT)}
    assert "selective.kernels.spec" in read
    assert {"torch", "typing"} <= {e.imported for e in all_imports(ROOT) if e.module == "selective.kernels.spec"}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("kernels/top_k.py", "import selective.policies", "imports selective.policies: that is upward"),
        ("kernels/top_k.py", "from .. import policies", "imports selective.policies: that is upward"),
        ("kernels/cpu/step.py", "from ...policies import base", "imports selective.policies.base: that is upward"),
        ("kernels/top_k.py", "import pydantic", "kernels stand on torch and triton alone"),
        ("kernels/top_k.py", "def f():\n    import pydantic", "kernels stand on torch and triton alone"),
        ("kernels/cpu/step.py", "import triton.language as tl", "where triton is not installed"),
        ("selective/policies/base.py", "def f():\n    from selective import optimizer", "optimizer: that is upward"),
        ("selective/policies/base.py", "from selective import Policy", "imports selective: that is upward"),
        ("selective/policies/base.py", "def f():\n    import triton", "triton belongs into kernels/"),
        ("selective/policies/base.py", "from kernels import spec", "import name is selective.kernels"),
        ("selective/policies/base.py", "import optimi", "no dependency"),
        ("selective/testing/subject.py", "import pytest", "no dependency"),
        ("selective/testing/__init__.py", "import pytest", "no dependency"),
        ("selective/capture/base.py", "if TYPE_CHECKING:\n    import selective.optimizer", "that is upward"),
        ("selective/optimizer.py", "from selective.testing import check", "that is upward"),
        ("selective/__init__.py", "from .compare import main", "that is upward"),
        ("selective/helpers.py", "from selective.cli import main", "that is upward"),
        ("selective/capture/base.py", "from .. import helpers", "imports selective.helpers: that is upward"),
    ],
)
def test_a_wrong_import_is_caught_and_named(tmp_path, file, text, complaint):
    frame = [
        "kernels/__init__.py",
        "kernels/cpu/__init__.py",
        "selective/__init__.py",
        "selective/policies/__init__.py",
    ]
    frame += ["selective/policies/base.py", "selective/optimizer.py", "selective/helpers.py"]
    write(tmp_path, dict.fromkeys(frame, ""))
    assert complaints(tmp_path) == []
    write(tmp_path, {file: text})
    (found,) = complaints(tmp_path)
    line = 1 + text.count("\n")
    assert found.startswith(f"{file}:{line}: ")
    assert complaint in found


@pytest.mark.parametrize("way", [["policies", "preconditioner"], ["policies", "preconditioner", "sharding"]], ids=len)
def test_a_cycle_of_folders_on_one_step_is_caught(tmp_path, way, monkeypatch):
    monkeypatch.setitem(globals(), "STAIRS", [{f"selective.{name}" for name in way}, {"selective.optimizer"}])
    files = {f"selective/{name}/__init__.py": "" for name in way}
    files |= {f"selective/{name}/a.py": f"from selective.{way[place - 1]} import a" for place, name in enumerate(way)}
    write(tmp_path, {**files, "selective/__init__.py": "", f"selective/{way[0]}/a.py": ""})
    assert complaints(tmp_path) == []
    write(tmp_path, files)
    (found,) = complaints(tmp_path)
    assert found == f"a cycle: {', '.join(f'selective.{name}' for name in sorted(way))} import from each other"


def test_right_imports_are_let_through(tmp_path):
    write(
        tmp_path,
        {
            "kernels/__init__.py": "import torch\ndef f():\n    from . import selective_step",
            "kernels/selective_step.py": "import triton\nimport triton.language as tl\nfrom .spec import Item",
            "kernels/spec.py": "",
            "selective/policies/base.py": "import pydantic\nfrom selective import kernels\nfrom ..kernels import spec",
            "selective/capture/facts.py": "def f():\n    import optimi\nfrom selective.policies.base import Policy",
            "selective/__init__.py": "from .optimizer import SelectiveUpdate",
            "selective/optimizer.py": "from .capture import facts\nfrom . import helpers",
            "selective/helpers.py": "from selective import optimizer",
            "selective/testing/plugin.py": "import pytest",
            "selective/compare/plots.py": "import matplotlib\nfrom selective import SelectiveUpdate",
        },
    )
    assert complaints(tmp_path) == []


def test_import_selective_needs_no_triton(tmp_path):
    """An installed Triton is left alone, too: tests/test_lean_import.py."""
    # `None` in sys.modules makes an import of that name fail, as where the package isn't installed.
    code = (
        "import sys; sys.modules['triton'] = None; import torch; before = set(sys.modules); "
        "import selective, selective.kernels; "
        "print(sorted(m for m in set(sys.modules) - before if m.partition('.')[0] == 'triton'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
