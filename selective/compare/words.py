"""The results of a comparison in plain words, for somebody who has read nothing else. Intervals decide the words."""

from __future__ import annotations

from selective.compare.config import CompareConfig
from selective.compare.intervals import Interval
from selective.compare.summary import Effect, Summary

RANDOM = "a random mask of the same share and norm"


def so_far(config: CompareConfig, summary: Summary) -> str:
    """A line for the terminal while the comparison runs: the means over the seeds that are complete."""
    parts = []
    for effect in summary.found:
        if effect.diverged or effect.failed or effect.against_base is None:
            parts.append(f"{effect.contender.label} has nothing to be compared with")
            continue
        control = effect.against_control
        beside = "" if control is None else f" and {control.mean:+.3f} against its random control"
        parts.append(f"{effect.contender.label} {effect.against_base.mean:+.3f} against {effect.base.label}{beside}")
    text = "; ".join(parts) or "the baseline alone"
    return f"seed {len(summary.seeds)} of {len(config.seeds)}: so far {text} (held-out loss; below 0 is better)"


def in_plain_words(summary: Summary) -> list[str]:
    """A line for each rotation, each optimizer of the user's and each policy. The first policy comes last."""
    policies = [effect for effect in summary.found if effect.contender.role == "policy"]
    others = [effect for effect in summary.found if effect.contender.role != "policy"]
    return [_words(effect) for effect in (*others, *reversed(policies))]


def _words(effect: Effect) -> str:
    name, base = effect.contender.label, effect.base.label
    if effect.failed:
        return f"{name} failed: not one of its runs came to its end. The notes say why."
    if effect.diverged:
        return f"{name} diverged: at every learning rate its loss stopped being a number."
    if effect.against_base is None:
        return f"{name}: nothing can be said, because {base} {_why_no_loss(effect)}."
    if effect.n == 1:
        return _one_seed(effect, effect.against_base)
    text = {-1: _helped, 0: _not_shown, 1: _hurt}[effect.against_base.sign](effect, effect.against_base)
    if effect.at_edge:
        text += f" {base} is best at the edge of its learning rates: a better one may lie beyond."
    return text


def _why_no_loss(effect: Effect) -> str:
    """The reason why the contender's rival has no loss of a seed of which the contender has one."""
    return "failed, as the notes say" if effect.base_failed else "diverged at every learning rate"


def _one_seed(effect: Effect, difference: Interval) -> str:
    control = effect.against_control
    beside = "" if control is None else f", {_side(control)} than that of {RANDOM}"
    return (
        f"One seed is no evidence: here the held-out loss of {effect.contender.label} is {_side(difference)} than that "
        f"of {effect.base.label}{beside}. Run five."
    )


def _helped(effect: Effect, difference: Interval) -> str:
    name, base = effect.contender.label, effect.base.label
    text = f"{name} helped: {_loss_over_seeds(effect)} {_side(difference)} than that of {base}"
    if effect.speed is not None and effect.base.role == "baseline":
        text += f", which takes {_size(effect.speed)} times as many steps to its own final loss"
        if effect.time_speed is not None:
            text += f", and {_size(effect.time_speed)} times as long"
    control = effect.against_control
    if effect.contender.of is None:
        return f"{text}."
    if control is None:
        return f"{text}. Its random control {'failed' if effect.control_failed else 'diverged'}."
    if control.sign == -1:
        return f"{text}. It is {_side(control)} than that of {RANDOM}: it matters which coordinates are selected."
    if control.sign == 1:
        return f"{text}. But it is {_side(control)} than that of {RANDOM}: the choice of coordinates did not help."
    return (
        f"{text}. Against {RANDOM} it is {_signed(control)}: it is not shown to matter which coordinates are selected."
    )


def _not_shown(effect: Effect, difference: Interval) -> str:
    text = (
        f"{effect.contender.label}: no difference shown. Over {effect.n} seeds, with 95 % intervals, its held-out loss "
        f"differs by {_signed(difference)} from that of {effect.base.label}, which may as well be 0."
    )
    control = effect.against_control
    if control is not None and control.sign == -1:
        text += f" It is {_side(control)} than that of {RANDOM}: it matters which coordinates are selected."
    return text


def _hurt(effect: Effect, difference: Interval) -> str:
    name, base = effect.contender.label, effect.base.label
    return f"{name} hurt: {_loss_over_seeds(effect)} {_side(difference)} than that of {base}."


def _loss_over_seeds(effect: Effect) -> str:
    return f"over {effect.n} seeds, with 95 % intervals, its held-out loss is"


def _side(difference: Interval) -> str:
    """The size and side of a difference, with its 95 % interval if it has one: `0.156 ± 0.070 lower`."""
    size = Interval(abs(difference.mean), difference.half, difference.n)
    return f"{_size(size)} {'lower' if difference.mean < 0 else 'higher'}"


def _size(interval: Interval) -> str:
    return f"{interval.mean:.3f}" if interval.half is None else f"{interval.mean:.3f} ± {interval.half:.3f}"


def _signed(interval: Interval) -> str:
    return f"{'+' if interval.mean >= 0 else '−'}{_size(Interval(abs(interval.mean), interval.half, interval.n))}"
