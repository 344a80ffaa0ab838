"""Checks, how they are registered and run, and the report that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from selective.testing.harness import CheckFailed, NotApplicable
from selective.testing.subject import Subject

Verdict = Literal["passed", "failed", "not applicable", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What one check said: `message` is empty where it passed, else what was found, or why it does not apply.

    "skipped": it applies, and could not be run here; nothing is known.

    `row` is the check's place in the list of what a wrapper has to survive; 0 for a policy's checks.
    """

    check: str
    row: int
    verdict: Verdict
    message: str = ""

    def __str__(self) -> str:
        row = f"row {self.row}, " if self.row else ""
        return f"{row}{self.check}: {self.message or self.verdict}"


def in_short(error: Exception) -> str:
    """Kind and text of an error in one line: some print whole tensors."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + " ..."


@dataclass(frozen=True)
class Check:
    """One thing that a wrapper of an optimizer has to survive. Call it with a subject: it returns, or raises
    `CheckFailed`, or `NotApplicable`.

    `doc` says what is checked, `why` what goes wrong for a user where it fails. With `excused` (the default), a
    failure counts only if the base alone does not fail in the same check.
    """

    row: int
    name: str
    doc: str
    why: str
    run: Callable[[Subject], None]
    excused: bool = True

    def __call__(self, subject: Subject) -> None:
        if self.name in subject.waives:
            raise NotApplicable(f"waived: {subject.waives[self.name]}")
        with torch.random.fork_rng(devices=[]):
            try:
                self._attempt(subject)
            except CheckFailed as failure:
                fault = self._fault_of_base(subject) if self.excused else None
                if fault is not None:
                    raise NotApplicable(f"the base alone fails it too: {fault}") from failure
                raise CheckFailed(f"{subject.name}: {failure} Why it matters: {self.why}") from failure.__cause__

    def _attempt(self, subject: Subject) -> None:
        """Run; whatever else is raised is a failure too."""
        try:
            self.run(subject)
        except (CheckFailed, NotApplicable):
            raise
        except Exception as error:
            raise CheckFailed(f"raised {in_short(error)}") from error

    def _fault_of_base(self, subject: Subject) -> str | None:
        """What the base alone does wrong in this check, if anything."""
        try:
            self._attempt(subject.alone())
        except CheckFailed as failure:
            return str(failure)
        except NotApplicable:
            return None
        return None

    def outcome(self, subject: Subject) -> Outcome:
        """Run, and say what came of it instead of raising."""
        try:
            self(subject)
        except NotApplicable as reason:
            return Outcome(self.name, self.row, "not applicable", str(reason))
        except CheckFailed as failure:
            return Outcome(self.name, self.row, "failed", str(failure))
        return Outcome(self.name, self.row, "passed")


class Checks(Sequence[Check]):
    """The registered checks, in the order of their rows; iterate, or look one up by name."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    def register(self, row: int, why: str, excused: bool = True) -> Callable[[Callable[[Subject], None]], Check]:
        """A decorator; the check's name is the function's, its `doc` the function's docstring."""

        def add(function: Callable[[Subject], None]) -> Check:
            check = Check(row, function.__name__, (function.__doc__ or "").strip(), why, function, excused)
            self._checks.append(check)
            self._checks.sort(key=lambda c: c.row)
            return check

        return add

    def __getitem__(self, key):  # an index, a slice, or a name
        if isinstance(key, str):
            return next(check for check in self._checks if check.name == key)
        return self._checks[key]

    def __len__(self) -> int:
        return len(self._checks)

    def __iter__(self) -> Iterator[Check]:
        return iter(self._checks)

    @property
    def names(self) -> list[str]:
        return [check.name for check in self._checks]


conformance_checks = Checks()  # Every check of the suite, by row.


@dataclass(frozen=True)
class Report:
    """What all checks said about one subject. `str(report)` is a table."""

    subject: str
    outcomes: tuple[Outcome, ...]

    def having(self, verdict: Verdict) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.verdict == verdict]

    @property
    def passed(self) -> list[Outcome]:
        return self.having("passed")

    @property
    def failed(self) -> list[Outcome]:
        return self.having("failed")

    @property
    def not_applicable(self) -> list[Outcome]:
        return self.having("not applicable")

    @property
    def skipped(self) -> list[Outcome]:
        return self.having("skipped")

    def __str__(self) -> str:
        width = max((len(outcome.check) for outcome in self.outcomes), default=0)
        head = f"{self.subject}: {len(self.passed)} passed, {len(self.failed)} failed, "
        head += f"{len(self.not_applicable)} not applicable"
        lines = [head + (f", {len(self.skipped)} skipped" if self.skipped else "")]
        for o in self.outcomes:
            lines.append(f"{o.row or '':>3}  {o.check:<{width}}  {o.verdict:<14}  {o.message}".rstrip())
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        if self.failed:
            raise CheckFailed("\n".join(str(outcome) for outcome in self.failed))


def check_wrapper(subject: Subject, only: Sequence[str] | None = None) -> Report:
    """Run every check that applies to `subject` (or those named in `only`) and report.

    Deterministic, on the CPU, about a second for a small wrapper; leaves the global generators as they were. Raises
    ValueError where `only` or `subject.waives` names a check that does not exist.
    """
    if not isinstance(subject, Subject):
        raise TypeError(
            f"check_wrapper takes a Subject, which says how to make the wrapper and its base; found {subject!r}. "
            f"Subject(name='mine', base=lambda params: torch.optim.AdamW(params), wrap=MyWrapper)"
        )
    for name in [*(only or ()), *subject.waives]:
        if name not in conformance_checks.names:
            raise ValueError(f"there is no check {name!r}; there are {', '.join(conformance_checks.names)}")
    chosen = [check for check in conformance_checks if only is None or check.name in only]
    return Report(subject.name, tuple(check.outcome(subject) for check in chosen))
