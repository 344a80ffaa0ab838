"""Checks, their registration, and the report of their outcomes."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from selective.testing.harness import CheckFailed, NotApplicable, Skipped, isolated
from selective.testing.subject import Subject

Verdict = Literal["passed", "failed", "not applicable", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    `message` is empty if the check passed; else it says what the wrapper did, or why the check does not apply.
    "skipped" means that the check applies but could not be run here, so that nothing is known.

    `row` is the number of the check's row in the conformance table, and 0 for a policy's checks. `error` is the
    exception that the wrapper or policy itself raised, if any.
    """

    check: str
    row: int
    verdict: Verdict
    message: str = ""
    error: BaseException | None = field(default=None, compare=False)

    def __str__(self) -> str:
        row = f"row {self.row}, " if self.row else ""
        return f"{row}{self.check}: {self.message or self.verdict}"


def in_short(error: BaseException) -> str:
    """The type and text of an error in one line of at most 300 characters, because some print whole tensors."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + " ..."


_NOT_THEIRS = (Path(__file__).parent, Path(torch.__file__).parent)
_STANDARD = Path(sysconfig.get_path("stdlib"))


def place(error: BaseException) -> str:
    """The origin of an error, as " (file.py:12)": the innermost line outside of the suite, torch and Python.

    Empty if there is none: then the suite's call itself was refused.
    """

    def theirs(name: str) -> bool:
        path = Path(name)
        standard = path.is_relative_to(_STANDARD) and "site-packages" not in path.parts
        return not (name.startswith("<") or standard or any(path.is_relative_to(folder) for folder in _NOT_THEIRS))

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if theirs(frame.filename)]
    return f" ({'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno})" if frames else ""


def outcome_of(name: str, row: int, run: Callable[[], None], describe: Callable[[Exception], str]) -> Outcome:
    """Run a check once. Any exception but the checks' own is a failure, too, with `describe(error)` as message."""
    try:
        run()
    except NotApplicable as reason:
        return Outcome(name, row, "not applicable", str(reason))
    except Skipped as reason:
        return Outcome(name, row, "skipped", str(reason))
    except CheckFailed as failure:
        return Outcome(name, row, "failed", str(failure), failure.__cause__)
    except Exception as error:  # a stranger's code may raise anything
        return Outcome(name, row, "failed", describe(error), error)
    return Outcome(name, row, "passed")


@dataclass(frozen=True)
class Check:
    """A check of wrappers. Call it with a subject: it returns, or raises `CheckFailed`, `NotApplicable` or `Skipped`.

    `doc` says what is checked, and `why` says what a user suffers if the check fails. A failure does not count if the
    base alone fails the same check. It counts in any case if `mendable` says that a wrapper can do better than its
    base, and `Subject.strict` is set.
    """

    row: int
    name: str
    doc: str
    why: str
    run: Callable[[Subject], None]
    mendable: bool = False

    def __call__(self, subject: Subject) -> None:
        outcome = self.outcome(subject)
        if outcome.verdict == "failed":
            raise CheckFailed(f"{subject.name}: {outcome.message} Why it matters: {self.why}") from outcome.error
        if outcome.verdict != "passed":
            raise (Skipped if outcome.verdict == "skipped" else NotApplicable)(outcome.message)

    def outcome(self, subject: Subject) -> Outcome:
        """Run the check, and return the outcome instead of raising."""
        if self.name in subject.waives:
            return Outcome(self.name, self.row, "not applicable", f"waived: {subject.waives[self.name]}")
        with isolated():
            outcome = self._attempt(subject)
            if outcome.verdict != "failed" or (self.mendable and subject.strict):
                return outcome
            alone = self._attempt(subject.alone())
        if alone.verdict != "failed":
            return outcome
        message = f"the base alone fails it too: {alone.message}"
        return Outcome(self.name, self.row, "not applicable", message)

    def _attempt(self, subject: Subject) -> Outcome:
        return outcome_of(
            self.name, self.row, partial(self.run, subject), lambda error: f"it raised {in_short(error)}{place(error)}."
        )


class Checks(Sequence[Check]):
    """The registered checks, in the order of their rows. Iterate over them, or look one up by its name."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    def register(self, row: int, why: str, mendable: bool = False) -> Callable[[Callable[[Subject], None]], Check]:
        """Return a decorator that makes a check of a function: its name, and its docstring as `doc`."""

        def add(function: Callable[[Subject], None]) -> Check:
            check = Check(row, function.__name__, (function.__doc__ or "").strip(), why, function, mendable)
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


conformance_checks = Checks()  # The checks that need nothing but torch: a fraction of a second each, in one process.
stack_checks = Checks()  # The checks that need a training stack or several processes: seconds each.


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of one subject. `str(report)` is a table."""

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


def check_wrapper(subject: Subject, only: Sequence[str] | None = None, stacks: bool = False) -> Report:
    """Run every check of `conformance_checks`, or those that `only` names, on `subject`, and return a `Report`.

    It is deterministic, runs on the CPU, takes about a second for a small wrapper, and leaves the global generators as
    they were. With `stacks` it also runs `stack_checks`, which take seconds each. Raises TypeError if `subject` is no
    `Subject`, and ValueError if `only` or `subject.waives` names a check that does not exist.
    """
    if not isinstance(subject, Subject):
        raise TypeError(
            f"check_wrapper takes a Subject, which says how to make the wrapper and its base; found {subject!r}. "
            f"Subject(name='mine', base=lambda params: torch.optim.AdamW(params), wrap=MyWrapper)"
        )
    known = {check.name: check for check in (*conformance_checks, *stack_checks)}
    for name in [*(only or ()), *subject.waives]:
        if name not in known:
            raise ValueError(f"there is no check {name!r}; there are {', '.join(known)}")
    usual = [*conformance_checks, *(stack_checks if stacks else ())]
    chosen = usual if only is None else [check for check in known.values() if check.name in only]
    return Report(subject.name, tuple(check.outcome(subject) for check in sorted(chosen, key=lambda c: c.row)))
