"""The pytest plugin: makes each check an item, and prints a summary at the end."""

from __future__ import annotations

import inspect
import json
import platform
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from selective.testing.harness import isolated
from selective.testing.report import Check, Outcome
from selective.testing.rows import all_checks
from selective.testing.spec import Spec, SpecError, subject_of
from selective.testing.subject import Subject

_KEY = "conformance"  # the property of a report that carries a check's outcome, also from worker processes


class NotConforming(Exception):
    """Raised for a failed check. pytest prints its outcome, without a traceback of the suite."""

    def __init__(self, outcome: Outcome, check: Check) -> None:
        super().__init__(outcome.message)
        self.outcome, self.check = outcome, check

    def told(self, traceback_too: bool) -> str:
        lines = [
            f"found     {self.outcome.message}",
            f"so that   {self.check.why}",
            f"checked   {' '.join(self.check.doc.split())}",
        ]
        if traceback_too and self.outcome.error is not None:
            lines += ["", *"".join(traceback.format_exception(self.outcome.error)).splitlines()]
        return "\n".join(lines)


class Suite(pytest.Collector):
    """All checks of one wrapper over one base."""

    subject: Subject

    def collect(self) -> list[CheckItem]:
        return [CheckItem.of(self, check) for check in all_checks()]


class CheckItem(pytest.Item):
    """One check, with the check's name and its row as name."""

    check: Check

    @classmethod
    def of(cls, suite: Suite, check: Check) -> CheckItem:
        item = cls.from_parent(suite, name=f"{check.name}[row-{check.row:02}]")
        item.check = check
        return item

    def runtest(self) -> None:
        assert isinstance(self.parent, Suite)
        outcome = self.check.outcome(self.parent.subject)
        summary = {"row": outcome.row, "check": outcome.check, "verdict": outcome.verdict, "message": outcome.message}
        self.user_properties.append((_KEY, {"subject": self.parent.subject.name, **summary}))
        if outcome.verdict == "failed":
            raise NotConforming(outcome, self.check)
        if outcome.verdict != "passed":
            pytest.skip(f"{outcome.verdict}: {outcome.message}")

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, NotConforming):
            return excinfo.value.told(self.config.option.tbstyle in ("long", "short", "native"))
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        lines = inspect.getsourcelines(self.check.run)[1]
        return Path(inspect.getsourcefile(self.check.run) or "."), lines - 1, self.name


class Conformance:
    """The hooks that pytest calls if `--wrapper` is given."""

    def __init__(self, config: pytest.Config, bases: list[str]) -> None:
        self.config, self.bases = config, bases
        self.subjects: list[Subject] = []
        self.outcomes: list[dict[str, Any]] = []
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = []  # without paths on the command line, run the checks and no tests of this folder

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Build every subject. A wrapper that can't be used is one error, before anything is collected."""
        option = self.config.option
        claims = {"model": option.wrapper_model, "cap": option.wrapper_cap, "copies": option.wrapper_copies}
        try:
            wrapper = Spec(option.wrapper)
            for base in dict.fromkeys(self.bases):
                with isolated():
                    subject = subject_of(wrapper, Spec(base, "--wrapper-base"), strict=option.wrapper_strict, **claims)
                self.subjects.append(subject)
        except SpecError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the checks before other plugins do, so that `-k` and `--deselect` see them."""
        for subject in self.subjects:
            suite = Suite.from_parent(session, name=subject.name, nodeid=subject.name)
            suite.subject = subject
            checks = suite.collect()
            items.extend(checks)
            report = pytest.CollectReport(suite.nodeid, "passed", None, checks)  # type: ignore[arg-type]  # of all items
            session.config.hook.pytest_collectreport(report=report)  # the terminal takes its count from this

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.outcomes += [dict(value) for key, value in report.user_properties if key == _KEY]  # type: ignore[call-overload]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print counts and reasons, in a section for each base."""
        for subject in dict.fromkeys(o["subject"] for o in self.outcomes):
            outcomes = [o for o in self.outcomes if o["subject"] == subject]
            counts = Counter(o["verdict"] for o in outcomes)
            terminalreporter.section(f"conformance of {subject}")
            verdicts = ("passed", "failed", "not applicable", "skipped")
            terminalreporter.line(
                ", ".join(f"{counts[v]} {v}" for v in verdicts if counts[v]) + f" (torch {torch.__version__})"
            )
            for o in sorted(outcomes, key=lambda o: (verdicts.index(o["verdict"]), o["row"])):
                if o["verdict"] != "passed":
                    terminalreporter.line(f"row {o['row']:2}  {o['verdict']:<14}  {o['check']}: {o['message']}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = self.config.option.wrapper_json
        if path is not None and not hasattr(self.config, "workerinput"):  # under pytest-xdist, only the main process
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            told = {
                "wrapper": self.config.option.wrapper,
                **versions,
                "outcomes": sorted(self.outcomes, key=lambda o: o["row"]),
            }
            Path(path).write_text(json.dumps(told, indent=1) + "\n")
