"""Subject: tells the suite how to build somebody's wrapper, and what the wrapper does not claim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


def base_attribute(wrapper: Optimizer) -> Optimizer:
    """The `base` of a wrapper, where most wrappers keep the optimizer that they wrap."""
    return wrapper.base  # type: ignore[attr-defined]


def itself(wrapper: Optimizer) -> Optimizer:
    """The `get_base` of an optimizer that wraps nothing, and the `wrap` of no wrapper."""
    return wrapper


@dataclass(frozen=True)
class ConfigClaims:
    """Tells the suite how to build a policy from data, and a value that must be refused.

    `build` takes a config. `good` is a config that it accepts, whose `tag` entry names the kind. `out_of_range` is
    (key, value, bound): the error for `good | {key: value}` has to name the key and the bound, as text.
    """

    build: Callable[[Mapping[str, Any]], Any]
    good: Mapping[str, Any]
    out_of_range: tuple[str, Any, str]
    tag: str = "kind"


@dataclass(frozen=True)
class Subject:
    """One wrapper around one base, as the conformance suite sees it.

    Give `wrap` (base optimizer -> wrapper) if the wrapper takes an optimizer; the suite then also wraps optimizers of
    its own that misbehave in known ways. Give `make` (parameters -> wrapper) if it is built in some other way; the
    checks that need such a base are then reported as not applicable. Without either, ValueError is raised.

    Args:
        name: its name in the report.
        base: parameters -> the base alone, with the same hyper-parameters as inside the wrapper.
        get_base: wrapper -> its base; None if the base can't be reached (checks that compare with it are then reported
            as not applicable).
        model: "mixed" trains a matrix, a vector, an embedding, a convolution, one element, a parameter that gets no
            gradient until step 5 and a frozen one; "matrices" only 2-D parameters, for base optimizers such as Muon.
        cap: the largest factor by which the wrapper may enlarge a coordinate's step (row 29).
        copies: how much memory the wrapper claims to keep between steps beside its base, in copies of the parameters
            (row 23); None if it claims nothing.
        strict: also fail it for faults of the base that a wrapper can mend: exact dtypes of state.
        exact_base: if `base` keeps inexact moments (8-bit), the same rule with exact ones (row 25).
        config: tells how its policies are built from data (row 32).
        group_keys: what `add_param_group` asks for in a group beside `params` and hyper-parameters.
        waives: check name -> reason, for checks that the wrapper does not claim to pass. They are reported as not
            applicable, with the reason.

    A wrapper that draws random numbers is held to the same bits as any other: its draws have to follow from its own
    seed and state.
    """

    name: str
    base: Callable[[Any], Optimizer]
    wrap: Callable[[Optimizer], Optimizer] | None = None
    make: Callable[[Any], Optimizer] | None = None
    get_base: Callable[[Any], Optimizer] | None = base_attribute
    model: Literal["mixed", "matrices"] = "mixed"
    cap: float = 10.0
    copies: float | None = None
    strict: bool = False
    exact_base: Callable[[Any], Optimizer] | None = None
    config: ConfigClaims | None = None
    group_keys: Mapping[str, Any] = field(default_factory=dict)
    waives: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.wrap is None and self.make is None:
            raise ValueError(f"Subject {self.name!r}: neither `wrap` nor `make` is given; the suite cannot build it")

    def build(self, params: Any) -> Optimizer:
        """A fresh wrapper over `params`."""
        if self.make is not None:
            return self.make(params)
        assert self.wrap is not None  # __post_init__ saw to it
        return self.wrap(self.base(params))

    def alone(self) -> Subject:
        """The base by itself, as a subject. A check that it fails, too, is not the wrapper's fault."""
        changes = {"make": self.base, "wrap": itself, "get_base": itself, "copies": None, "config": None}
        return replace(self, name=f"{self.name}, its base alone", group_keys={}, **changes)
