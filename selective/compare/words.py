"""What a comparison found, in words for somebody who has read nothing else. The interval decides what they may say."""

from __future__ import annotations

from selective.compare.config import CompareConfig
from selective.compare.intervals import Interval
from selective.compare.summary import Found, Summary

RANDOM = "a random mask of the same share and norm"


def so_far(config: CompareConfig, summary: Summary) -> str:
    """One line while it runs: means over the seeds that are complete."""
    parts = []
    for one in summary.found:
        if one.diverged or one.against_base is None:
            parts.append(f"{one.contender.label} has nothing to be compared with")
            continue
        control = one.against_control
        beside = "" if control is None else f" and {control.mean:+.3f} against its random control"
        parts.append(f"{one.contender.label} {one.against_base.mean:+.3f} against {one.base.label}{beside}")
    found = "; ".join(parts) or "the baseline alone"
    return f"seed {len(summary.seeds)} of {len(config.seeds)}: so far {found} (held-out loss; below 0 is better)"


def in_plain_words(summary: Summary) -> list[str]:
    """A line for each rotation and each policy. The last one is of the first policy."""
    policies = [one for one in summary.found if one.contender.role == "policy"]
    others = [one for one in summary.found if one.contender.role != "policy"]
    return [_words(one) for one in (*others, *reversed(policies))]


def _words(found: Found) -> str:
    name, base = found.contender.label, found.base.label
    if found.diverged:
        return f"{name} diverged: at every learning rate its loss stopped being a number."
    if found.against_base is None:
        return f"{name}: nothing can be said, because {base} diverged at every learning rate."
    if found.n == 1:
        return _one_seed(found, found.against_base)
    said = {-1: _helped, 0: _not_shown, 1: _hurt}[found.against_base.sign](found, found.against_base)
    if found.at_edge:
        said += f" {base} is best at the edge of its learning rates: a better one may lie beyond."
    return said


def _one_seed(found: Found, difference: Interval) -> str:
    control = found.against_control
    beside = "" if control is None else f", {_side(control)} than that of {RANDOM}"
    return (
        f"One seed is no evidence: here the held-out loss of {found.contender.label} is {_side(difference)} than that "
        f"of {found.base.label}{beside}. Run five."
    )


def _helped(found: Found, difference: Interval) -> str:
    said = f"{found.contender.label} helped: {_held(found)} {_side(difference)} than that of {found.base.label}"
    if found.speed is not None and found.base.role == "baseline":
        said += f", which takes {_size(found.speed)} times as many steps to its own final loss"
    control = found.against_control
    if found.contender.of is None:
        return f"{said}."
    if control is None:
        return f"{said}. Its random control diverged."
    if control.sign == -1:
        return f"{said}. It is {_side(control)} than that of {RANDOM}: it matters which coordinates are selected."
    if control.sign == 1:
        return f"{said}. But it is {_side(control)} than that of {RANDOM}: the choice of coordinates did not help."
    return (
        f"{said}. Against {RANDOM} it is {_signed(control)}: it is not shown to matter which coordinates are selected."
    )


def _not_shown(found: Found, difference: Interval) -> str:
    said = (
        f"{found.contender.label}: no difference shown. Over {found.n} seeds, with 95 % intervals, its held-out loss "
        f"differs by {_signed(difference)} from that of {found.base.label}, which may as well be 0."
    )
    control = found.against_control
    if control is not None and control.sign == -1:
        said += f" It is {_side(control)} than that of {RANDOM}: it matters which coordinates are selected."
    return said


def _hurt(found: Found, difference: Interval) -> str:
    return f"{found.contender.label} hurt: {_held(found)} {_side(difference)} than that of {found.base.label}."


def _held(found: Found) -> str:
    return f"over {found.n} seeds, with 95 % intervals, its held-out loss is"


def _side(difference: Interval) -> str:
    """`0.156 ± 0.070 lower`, with the 95 % interval where there is one."""
    size = Interval(abs(difference.mean), difference.half, difference.n)
    return f"{_size(size)} {'lower' if difference.mean < 0 else 'higher'}"


def _size(interval: Interval) -> str:
    return f"{interval.mean:.3f}" if interval.half is None else f"{interval.mean:.3f} ± {interval.half:.3f}"


def _signed(interval: Interval) -> str:
    return f"{'+' if interval.mean >= 0 else '−'}{_size(Interval(abs(interval.mean), interval.half, interval.n))}"
