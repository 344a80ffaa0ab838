"""Facts of an optimizer as data: its groups in the words of `explain()`, its memory, and the steps that it took."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from selective import ChainedOptimizer, SelectiveUpdate
from selective.base.state_entries import state_entries
from selective.doctor.report import Group, Memory, Steps
from selective.doctor.subject import has_values
from selective.doctor.take_steps import Taken
from selective.explain.groups import TRITON, paragraphs
from selective.explain.memory import bytes_of_bases
from selective.explain.paragraph import Paragraph
from selective.explain.title import title_of
from selective.state.store import follow_changes

_NO_GPU = "no Triton: the parameters are on {}, and Triton's kernels need an NVIDIA GPU"
_REPLAYED = "replayed as a CUDA graph"
_PLACE = re.compile(r"param_groups\[\d+\]\[\d+\]")


def wrapped_in(optimizer: Optimizer) -> list[SelectiveUpdate]:
    """Return the wrappers of ours: the optimizer itself, or members of a chain."""
    members = optimizer.members if isinstance(optimizer, ChainedOptimizer) else (optimizer,)
    return [member for member in members if isinstance(member, SelectiveUpdate)]


def described(optimizer: Optimizer) -> str:
    """Return the classes of an optimizer and of what it wraps."""
    if isinstance(optimizer, SelectiveUpdate):
        return f"SelectiveUpdate over {_class(optimizer.base)}"
    if isinstance(optimizer, ChainedOptimizer):
        return f"ChainedOptimizer of {' and '.join(map(described, optimizer.members))}"
    return _class(optimizer)


def _class(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def groups_of(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[Group]:
    """Return what `explain()` says of each kind of group, with these names of parameters.

    A chain has those of its members, bare ones included. Another bare optimizer has none.
    """
    if isinstance(optimizer, ChainedOptimizer):
        named = zip(optimizer.names, optimizer.members, strict=True)
        return [
            group.model_copy(update={"title": f"member {name!r}, {group.title}"})
            for name, member in named
            for group in groups_of(member, names) or [_bare(member)]
        ]
    if not isinstance(optimizer, SelectiveUpdate):
        return []
    follow_changes(optimizer.groups, optimizer.store)
    plans = optimizer.groups.plans
    places = {
        parameter.name: names.get(parameter.tensor, parameter.name)
        for plan in plans
        for parameter in plan.params.parameters
    }
    return [
        _group(each, plans[each.numbers[0]].params.tensors, places)
        for each in paragraphs(optimizer.base, plans, optimizer.options, optimizer.store)
    ]


def _group(paragraph: Paragraph, params: Sequence[Tensor], places: Mapping[str, str]) -> Group:
    """Return a paragraph as data. `places` has a name for each place of a parameter, such as "param_groups[0][3]"."""

    def renamed(text: str) -> str:
        return _PLACE.sub(lambda found: places.get(found[0], found[0]), text)

    labels = dict.fromkeys(line.label for line in paragraph.lines if line.label)
    facts = {label: [renamed(text) for text in paragraph.texts(label)] for label in labels}
    if params and not facts["capture"][0].startswith("dense"):
        device = params[0].device.type
        facts.setdefault("kernels", [_NO_GPU.format("a CPU" if device == "cpu" else device)])
    return Group(title=paragraph.title, numbers=list(paragraph.numbers), facts=facts)


def _bare(member: Optimizer) -> Group:
    """Return the one paragraph of a chain's member that is not wrapped."""
    groups = dict(enumerate(member.param_groups))
    facts = {"policy": ["none"], "capture": [f"none: {_class(member)} steps these by itself"]}
    return Group(title=title_of(groups), numbers=list(groups), facts=facts)


def memory_of(optimizer: Optimizer, params: Sequence[Tensor]) -> Memory:
    """Return the bytes that are there now, after some steps."""
    bases, ours, rotation = [optimizer], 0, 0
    if isinstance(optimizer, ChainedOptimizer):
        bases = list(optimizer.members)
    for member in wrapped_in(optimizer):
        plans = member.groups.plans
        ours += sum(each.lasting_bytes for each in paragraphs(member.base, plans, member.options, member.store))
        rotation += bytes_of_bases([plan.rotation for plan in plans if plan.rotation is not None])
    bases = [member.base if isinstance(member, SelectiveUpdate) else member for member in bases]
    states = [entries for base in bases for entries in base.state.values() if isinstance(entries, dict)]
    return Memory(
        parameters=sum(p.nbytes for p in params if has_values(p)),
        base=sum(
            each.nbytes
            for entries in states
            for _, value in state_entries(entries)
            for each in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(each, Tensor)
        ),
        selection=ours - rotation,
        rotation=rotation,
        elements=sum(p.numel() for p in params if has_values(p)),
    )


def steps_of(taken: Taken, groups: Sequence[Group], wrapped: bool) -> Steps:
    """Return the steps as data. `groups` were read after them."""
    graph, reasons = _graph(groups) if wrapped else (None, [])
    on_gpu = [time for _, time in taken.timed if time is not None]
    return Steps(
        taken=len(taken.times),
        warm_up_ms=[time for time, _ in taken.times[: taken.warm_up]],
        host_ms=[time for time, _ in taken.timed],
        device_ms=on_gpu or None,
        graph=graph,
        graph_reasons=reasons,
        not_finite=taken.not_finite,
        failure=taken.failure,
    )


def _graph(groups: Sequence[Group]) -> tuple[bool | None, list[str]]:
    """Return if a CUDA graph was replayed, as far as it is known, and how launches were made, in words."""
    launches = list(dict.fromkeys(text for group in groups for text in group.facts.get("launches", [])))
    if launches:
        return any(text.startswith(_REPLAYED) for text in launches), launches
    if any(text == TRITON for group in groups for text in group.facts.get("kernels", [])):
        return None, ["it is not reported for rotated parameters"]
    return False, ["no Triton kernel is launched"]
