"""The report as text: about a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from selective.doctor.report import Finding, Group, Memory, Report, Steps, Trial
from selective.doctor.words import counted

WIDTH = 80
_LABEL = 12
_MOST_GROUPS = 3
_UNSTEADY = 3  # times as long as the fastest of the timed steps
_MOST_CHARACTERS = 120  # of the names of rotated parameters
# Labels of `explain()` that are worth their lines here, with the most texts of each. The others are in the JSON form.
_FACTS = {"policy": 1, "capture": 1, "kernels": 1, "rotated": 1, "left out": 2, "rate": 1, "note": 1}


def text_of(report: Report) -> str:
    """Return the report as text, which ends without a line break."""
    what = f"{counted(report.tensors, 'tensor')}, {counted(report.elements, 'parameter')}"
    lines = [report.optimizer, f"  {what}, {', '.join(report.dtypes)} on {', '.join(report.devices)}", ""]
    if report.wrapped:
        lines += _of_groups(report.groups)
        lines += _of_memory(report.memory)
        lines += _of_steps(report.steps)
    elif report.trial is not None:
        lines += _of_trial(report, report.trial)
    lines += ["", *_of_findings("To mend", report.of_level("mend"))]
    lines += _of_findings("Advice", report.of_level("advice"))
    return "\n".join([*lines, verdict(report)])


def verdict(report: Report) -> str:
    """Return the last line of the text."""
    wrong, better = len(report.of_level("mend")), len(report.of_level("advice"))
    first = f"{counted(wrong, 'thing')} to mend" if wrong else "Nothing to mend"
    return f"{first}{f', {better} to think about' if better else ''}. Everything is as it was before the steps."


def _of_trial(report: Report, trial: Trial) -> list[str]:
    """Return the lines on a bare optimizer: what wrapping it would add."""
    lines = [*_of_bare_memory(report.memory), *_of_steps(report.steps)]
    if trial.refusal is not None:
        return [*lines, "", "It can't be wrapped: see below."]
    lines += ["", f"The same in SelectiveUpdate(..., policy={trial.policy})"]
    lines += _of_groups(trial.groups)
    lines += _of_memory(trial.memory)
    if trial.steps is not None:
        lines += _of_steps(trial.steps)
    question = "Does it train better? selective compare --task ... tries it"
    return [*lines, *_labelled("then", question)]


def _of_groups(groups: Sequence[Group]) -> list[str]:
    lines: list[str] = []
    for group in groups[:_MOST_GROUPS]:
        lines += textwrap.wrap(group.title, WIDTH, subsequent_indent=" " * 4)
        for label, most in _FACTS.items():
            for number, text in enumerate(group.facts.get(label, [])[:most]):
                lines += _labelled("" if number else label, _shortened(text))
    more = len(groups) - _MOST_GROUPS
    if more > 0:
        lines.append(f"and {counted(more, 'more kind')} of groups: see explain(), or --json")
    return lines


def _shortened(text: str) -> str:
    """Return the text without the names in its middle if it is long. Its end says by what parameters are rotated."""
    names, by, what = text.rpartition(", by ")
    return text if not by or len(names) <= _MOST_CHARACTERS else f"{names[:_MOST_CHARACTERS]}..., by {what}"


def _of_memory(memory: Memory | None) -> list[str]:
    if memory is None:
        return []
    elements = max(memory.elements, 1)
    parts = [f"{memory.base:,} bytes of the base, {memory.base / elements:.2f} a parameter"]
    for what, added in (("selection", memory.selection), ("rotation", memory.rotation)):
        parts += [f"{what} adds {added:,}, {added / elements:.2f} a parameter"] if added else []
    nothing = [what for what in ("selection", "rotation") if not getattr(memory, what)]
    parts += [f"{' and '.join(nothing)} add{'s' if len(nothing) == 1 else ''} nothing"] if nothing else []
    return _labelled("state", "; ".join(parts))


def _of_bare_memory(memory: Memory | None) -> list[str]:
    if memory is None:
        return []
    return _labelled("state", f"{memory.base:,} bytes, {memory.base / max(memory.elements, 1):.2f} a parameter")


def _of_steps(steps: Steps) -> list[str]:
    if not steps.warm_up_ms:
        return _labelled("steps", f"none could be taken: {steps.failure}")
    times = f"{_ms(steps.host_ms)} ms" if steps.host_ms else "none was timed"
    on_gpu = f" on the host, {_ms(steps.device_ms)} ms until the GPU was done" if steps.device_ms else ""
    if steps.host_ms and max(steps.host_ms) > _UNSTEADY * min(steps.host_ms):
        on_gpu += " (so different that they mean little: is the machine busy?)"
    before = f"the slowest of {len(steps.warm_up_ms)} before took {_ms([max(steps.warm_up_ms)])} ms"
    fine = "all values finite" if not steps.not_finite else "with values that are not finite"
    lines = _labelled("steps", f"{times}{on_gpu}; {before}; {fine}")
    if steps.failure is not None:
        lines += _labelled("", steps.failure)
    if steps.graph is not None or steps.graph_reasons:
        used = {True: "yes", False: "no", None: "not known"}[steps.graph]
        lines += _labelled("CUDA graph", f"{used}: {'; '.join(steps.graph_reasons)}")
    return lines


def _ms(times: Sequence[float]) -> str:
    return ", ".join(f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in times)


def _of_findings(heading: str, findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    lines = [heading]
    for finding in findings:
        lines += textwrap.wrap(finding.text, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return [*lines, ""]


def _labelled(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {label:<{_LABEL}}", subsequent_indent=" " * (_LABEL + 2))
