"""docs/reference/conformance.md is what scripts/conformance_table.py makes of the suite and of what was found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from selective.testing import all_checks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("conformance_table", ROOT / "scripts" / "conformance_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "conformance_table", module)  # dataclasses look there
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def found(script: Any) -> Any:
    return json.loads(script.RESULTS.read_text())


def test_the_page_is_what_the_script_makes(script: Any, found: Any) -> None:
    text = script.PAGE.read_text()
    assert script.page(text, found) == text


def test_a_page_of_other_findings_is_noticed(script: Any, found: Any) -> None:
    text = script.PAGE.read_text()
    found["columns"][0]["outcomes"][0]["verdict"] = "failed"
    assert script.page(text, found) != text
    with pytest.raises(SystemExit, match="found 0 marks of checks"):
        script.page(text.replace("<!-- checks -->", ""), found)


def test_every_check_was_run_on_every_wrapper(script: Any, found: Any) -> None:
    """A check that was added or renamed asks for `--run`."""
    expected = sorted((check.row, check.name) for check in all_checks())
    assert [column["title"] for column in found["columns"]] == [column.title for column in script.COLUMNS]
    for column in found["columns"]:
        assert sorted((one["row"], one["check"]) for one in column["outcomes"]) == expected, column["title"]


def test_ours_fail_nothing_and_nothing_was_skipped(found: Any) -> None:
    for column in found["columns"]:
        verdicts = {one["verdict"] for one in column["outcomes"]}
        assert "skipped" not in verdicts, column["title"]
        if column["distribution"] in ("selective-update", "torch"):
            assert "failed" not in verdicts, column["title"]


def test_the_options_are_on_the_page(script: Any) -> None:
    from _pytest.config.argparsing import Parser

    from selective.testing import pytest_addoption

    parser = Parser(_ispytest=True)
    pytest_addoption(parser)
    (group,) = [group for group in parser._groups if group.name == "conformance"]
    page = script.PAGE.read_text()
    names = [option.names()[0] for option in group.options]
    assert len(names) == 7
    assert [name for name in names if f"| `{name}" not in page] == []
