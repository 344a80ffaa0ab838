"""The findings of the doctor, as data. `str(report)` is the text for the terminal."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FINE, TO_MEND, NOT_LOADED = 0, 1, 2
"""Exit codes of `selective doctor`."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Data):
    """Something that the user should know."""

    level: Literal["mend", "advice"]
    """"mend": it is wrong, or hardly what was meant. "advice": it works, and another way is usually better."""
    code: str
    """A short name that stays the same when the text changes, such as "not_finite"."""
    text: str
    """The fault, its place, and what to do."""


class Group(_Data):
    """The facts of one kind of parameter group. Groups of which the same can be said share one entry."""

    title: str
    numbers: list[int]
    """Indices into the optimizer's `param_groups`; for a chain, into those of the member that the title names."""
    facts: dict[str, list[str]]
    """Texts by their label: "policy", "capture", "kernels" and others, as `explain()` has them."""


class Memory(_Data):
    """Bytes that last from step to step, measured after the steps."""

    parameters: int
    """Bytes of the parameters that the optimizer steps."""
    base: int
    """State of the base optimizer."""
    selection: int
    """State of the wrapper for policies, for a momentum of its own, and for what rounding has left."""
    rotation: int
    """State of the wrapper for the bases of rotated parameters."""
    elements: int
    """The number of the parameters' elements, so that the bytes of one can be said."""


class Steps(_Data):
    """Steps on random gradients. Times are in milliseconds."""

    taken: int
    warm_up_ms: list[float]
    """For each step before those that are timed: the time until `step()` returned. They make the state and the bases
    and, on a GPU, compile kernels."""
    host_ms: list[float]
    """For each timed step: the time until `step()` returned."""
    device_ms: list[float] | None
    """For each timed step on an NVIDIA GPU: the time until the GPU was done. None elsewhere."""
    graph: bool | None
    """True if the last step replayed a CUDA graph of the wrapper, False if not. None if that is not known, as for a
    bare optimizer."""
    graph_reasons: list[str]
    """The ways in which launches were made, in words."""
    not_finite: list[str]
    """Names of parameters with a NaN or an infinity after the steps."""
    failure: str | None
    """The reason why the steps ended early, or why none was taken. None if all were taken."""


class Trial(_Data):
    """A bare optimizer, wrapped for a trial."""

    policy: str
    refusal: str | None
    """The reason why it can't be wrapped. None if it can."""
    groups: list[Group]
    memory: Memory | None
    steps: Steps | None


class Report(_Data):
    """All that `doctor` found out about an optimizer."""

    schema_version: Literal[1] = 1
    versions: dict[str, str]
    optimizer: str
    """The optimizer's class; for a wrapper, with that of its base."""
    wrapped: bool
    """True if a `SelectiveUpdate` is at work, alone or in a `ChainedOptimizer`."""
    tensors: int
    elements: int
    devices: list[str]
    dtypes: list[str]
    groups: list[Group]
    """Empty for a bare optimizer. A member of a chain that is not wrapped has one."""
    memory: Memory | None
    """None if no step could be taken."""
    steps: Steps
    trial: Trial | None
    """Of a bare optimizer only: the same wrapped, on the same gradients."""
    findings: list[Finding]
    exit_code: Literal[0, 1]
    """0 if nothing has to be mended, otherwise 1."""

    def of_level(self, level: Literal["mend", "advice"]) -> list[Finding]:
        """Return the findings of this level."""
        return [finding for finding in self.findings if finding.level == level]

    def __str__(self) -> str:
        from selective.doctor.text import text_of

        return text_of(self)
