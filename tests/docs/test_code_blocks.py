"""Runs what README.md and docs/ show.

Every ```python block is executed as it stands; the blocks of a page share a namespace. `<!-- no-run: reason -->`
on the line above leaves one out. A ```text block below `<!-- output -->` is held against what the last python block
printed. `<!-- needs: accelerate -->` above a block runs it only where that can be imported. In ```bash blocks,
`selective ...` lines have to parse and `make ...` lines have to name a target.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_scripts import ForkedScripts
from optional import THEIR_WARNINGS, missing

from selective import Policy, Preconditioner, Selection, Strength
from selective.bench.__main__ import parser as bench_parser
from selective.cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_SKIPPED = 4  # of all pages together
SETTINGS = ("lr", "betas", "eps", "weight_decay")  # which both sides of a diff state alike


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of its first line in the page, from 1
    comment: str  # what the HTML comment on the line above says


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page. A fence that is never closed is an error."""
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"^```(\w*)", lines[number])
        if fence is None:
            number += 1
            continue
        end = next((n for n in range(number + 1, len(lines)) if lines[n].startswith("```")), None)
        assert end is not None, f"line {number + 1}: the block is never closed"
        above = re.fullmatch(r"<!-- (.*) -->", lines[number - 1].strip()) if number else None
        code = "\n".join(lines[number + 1 : end]) + "\n"
        found.append(Block(fence[1], code, number + 2, above[1] if above else ""))
        number = end + 1
    return found


def run_page(text: str, where: str) -> None:
    """Execute the python blocks of a page; an AssertionError where a shown output is not what was printed."""
    page = types.ModuleType("__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", page)  # what a page defines can be pickled, as in a script
        _run_blocks(blocks_of(text), vars(page), where)


def _run_blocks(blocks: list[Block], namespace: dict[str, object], where: str) -> None:
    printed: str | None = ""
    for block in blocks:
        if block.language == "python" and block.comment.startswith("needs:"):
            if missing(name.strip() for name in block.comment.removeprefix("needs:").split(",")):
                printed = None
                continue
        if block.language == "python" and not block.comment.startswith("no-run:"):
            out = io.StringIO()
            padded = "\n" * (block.line - 1) + block.code  # a traceback then has the page's own line numbers
            with contextlib.redirect_stdout(out):
                exec(compile(padded, where, "exec", dont_inherit=True), namespace)
            printed = out.getvalue()
        elif block.comment == "output" and printed is not None:
            assert printed.rstrip() == block.code.rstrip(), f"{where}:{block.line}: printed was\n{printed}"


@pytest.fixture
def _as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, with a seed; policies that a page defines are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    kept = [(family, dict(family._registry)) for family in (Policy, Selection, Strength, Preconditioner)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    for family, registry in kept:
        family._registry.clear()
        family._registry.update(registry)


@pytest.mark.filterwarnings(*(f"ignore:{re.escape(message)}" for message in THEIR_WARNINGS))
@pytest.mark.usefixtures("_as_a_reader")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(page: Path) -> None:
    run_page(page.read_text(), str(page))


def new_side(diff: str, left_out: str = "-") -> str:
    """The code that a diff leads to: its added lines, and those that stay. With `left_out="+"`: what it comes from."""
    return "".join(line[2:] for line in diff.splitlines(keepends=True) if not line.startswith(left_out))


def settings(code: str) -> dict[str, list[float]]:
    """The numbers that all calls together give to each of SETTINGS."""
    given: dict[str, list[float]] = {}
    for call in ast.walk(ast.parse(code)):
        for keyword in call.keywords if isinstance(call, ast.Call) else []:
            if keyword.arg in SETTINGS:
                numbers = [part.value for part in ast.walk(keyword.value) if isinstance(part, ast.Constant)]
                given.setdefault(keyword.arg, []).extend(n for n in numbers if isinstance(n, int | float))
    return {name: sorted(numbers) for name, numbers in given.items()}


def same_settings(diff: str) -> bool:
    return settings(new_side(diff)) == settings(new_side(diff, left_out="+"))


def timms_adamw(model: torch.nn.Module, name: str, lr: float, layer_decay: float) -> torch.optim.Optimizer:
    """In the place of timm's `create_optimizer_v2`, which the suite does not install."""
    assert (name, layer_decay) == ("adamw", 0.75)
    return torch.optim.AdamW(model.parameters(), lr=lr)


@pytest.mark.usefixtures("_as_a_reader")
def test_what_the_diffs_of_coming_from_lead_to_runs() -> None:
    blocks = blocks_of((ROOT / "docs" / "guides" / "coming-from.md").read_text())
    diffs = [block for block in blocks if block.language == "diff"]
    assert len(diffs) >= 7
    for block in diffs:
        namespace: dict[str, Any] = {"create_optimizer_v2": timms_adamw}
        for code in [b.code for b in blocks if b.language == "python"] + [new_side(block.code)]:
            exec(compile(code, f"coming-from.md:{block.line}", "exec", dont_inherit=True), namespace)
        loss = namespace["model"](torch.randn(8, 16)).square().mean()
        loss.backward()
        before = [p.detach().clone() for p in namespace["model"].parameters()]
        namespace["opt"].step()
        namespace["opt"].step()  # SOAP only looks in its first step
        assert all(not torch.equal(p, b) for p, b in zip(namespace["model"].parameters(), before, strict=True))


def test_both_sides_of_the_diffs_of_coming_from_have_the_same_settings() -> None:
    blocks = blocks_of((ROOT / "docs" / "guides" / "coming-from.md").read_text())
    assert [block.line for block in blocks if block.language == "diff" and not same_settings(block.code)] == []


def test_one_side_of_a_diff_is_left_out() -> None:
    diff = "- a = 1\n+ b = 2\n  c = 3\n"
    assert (new_side(diff), new_side(diff, left_out="+")) == ("b = 2\nc = 3\n", "a = 1\nc = 3\n")


def test_settings_of_one_side_only_are_noticed() -> None:
    assert same_settings("- f(lr=1.0, betas=(0.9, 0.95))\n+ g(lr=1.0, betas=(0.9, 0.95), policy='x')\n")
    assert same_settings("- f(lr=0.1)\n- g(lr=0.2)\n+ f(lr={'matrices': 0.2, 'rest': 0.1})\n")
    assert not same_settings("- f(lr=1.0)\n+ f(lr=1.0, weight_decay=0.01)\n")
    assert not same_settings("- f(lr=1.0, betas=(0.9, 0.95))\n+ f(lr=1.0, betas=(0.95, 0.95))\n")


def test_a_block_that_fails_is_noticed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n", "page")
    with pytest.raises(AssertionError, match="printed was"):
        run_page("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", "page")
    with pytest.raises(AssertionError, match="never closed"):
        run_page("```python\nprint(1)\n", "page")
    run_page("<!-- needs: no_such_package -->\n```python\n1 / 0\n```\n<!-- output -->\n```text\n2\n```\n", "page")
    with pytest.raises(ZeroDivisionError):
        run_page("<!-- needs: torch, pytest -->\n```python\n1 / 0\n```\n", "page")
    run_page("<!-- no-run: it divides by zero -->\n```python\n1 / 0\n```\n", "page")


def stray_outputs(text: str) -> list[int]:
    """The lines of comments `<!-- output -->` that do not stand right above a block, so that nothing is compared."""
    lines = text.splitlines()
    return [
        number
        for number, (line, below) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1)
        if line.strip() == "<!-- output -->" and not below.startswith("```")
    ]


def test_every_output_is_compared() -> None:
    found = {str(page.relative_to(ROOT)): stray_outputs(page.read_text()) for page in PAGES}
    assert {page: lines for page, lines in found.items() if lines} == {}


def test_an_output_that_nothing_compares_is_noticed() -> None:
    assert stray_outputs("<!-- output -->\n```text\n1\n```\n<!-- output -->\n\n```text\n2\n```\n") == [5]


def test_few_blocks_are_left_out_and_each_says_why() -> None:
    comments = [b.comment for page in PAGES for b in blocks_of(page.read_text()) if b.language == "python"]
    skipped = [c for c in comments if c.startswith("no-run")]
    assert all(re.fullmatch(r"no-run: \S.*", c) for c in skipped), skipped
    assert len(skipped) <= MOST_SKIPPED
    assert len(comments) - len(skipped) >= 20, "the pages' blocks are not found any more"


@pytest.mark.parametrize("page", ["README.md", "docs/guides/quick-start.md"])
def test_the_quick_start_runs_alone(page: str, forked_scripts: ForkedScripts, tmp_path: Path) -> None:
    """README's in a fresh interpreter."""
    first = next(b for b in blocks_of((ROOT / page).read_text()) if b.language == "python")
    script = tmp_path / "quick_start.py"
    script.write_text(first.code)
    if page != "README.md":
        code, _, errors = forked_scripts.run(script, tmp_path)
        assert code == 0, errors
        return
    done = subprocess.run([sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shell_lines() -> list[tuple[str, list[str]]]:
    """(page and line, words) of each command in a ```bash block."""
    found = []
    for page in PAGES:
        for block in blocks_of(page.read_text()):
            if block.language != "bash":
                continue
            for command in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                if words:
                    found.append((f"{page.name}:{block.line}", words))
    return found


def test_make_lines_name_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = [(where, words[1]) for where, words in shell_lines() if words[0] == "make"]
    assert named
    assert [(where, target) for where, target in named if target not in targets] == []


def test_command_lines_parse() -> None:
    lines = [(where, words[1:]) for where, words in shell_lines() if words[0] == "selective"]
    assert lines
    for where, arguments in lines:
        try:
            if arguments[0] == "bench":  # has a parser of its own
                bench_parser().parse_args(arguments[1:])
            else:
                _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{where}: `selective {' '.join(arguments)}` does not parse")
