"""Refusals when an optimizer is wrapped, or when a group's policy changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.capture.choose import Capture
from selective.messages.construction import no_optimizer
from selective.parameter import Parameter
from selective.policies import Decay, Policy
from selective.sharding.dtensor import shard_of

_FLATTENED = "_fsdp_flattened"  # torch.distributed.fsdp._common_utils.FSDP_FLATTENED, in torch 2.9 to 2.13


def check_arguments(
    wrapper: type,
    base: object,
    capture: str,
    momentum_beta: float | None,
    on_nonfinite: str,
    seed: int,
    mask_space: str,
    scope: str,
    graph: object,
) -> None:
    """Refuse what `SelectiveUpdate` cannot be built from."""
    if isinstance(base, (list, tuple, Mapping)) and any(isinstance(one, Optimizer) for one in _values(base)):
        raise TypeError(
            "SelectiveUpdate: base is a collection of optimizers, must be one; wrap each that is to be selective, and "
            "make one optimizer of all: ChainedOptimizer([SelectiveUpdate(first, policy=...), second])"
        )
    if getattr(type(base), "chains_optimizers", False):
        raise TypeError(
            "SelectiveUpdate: base is a ChainedOptimizer; wrap its members instead: "
            "ChainedOptimizer([SelectiveUpdate(first, policy=...), second])"
        )
    if not isinstance(base, Optimizer):
        raise TypeError(no_optimizer(base))
    if isinstance(base, wrapper):
        raise TypeError("SelectiveUpdate: base is a SelectiveUpdate already; wrap its base, with one policy for both")
    if capture not in ("auto", "fused", "scratch", "delta"):
        raise ValueError(f"SelectiveUpdate: capture is {capture!r}, must be 'auto', 'fused', 'scratch' or 'delta'")
    if mask_space not in ("rotated", "original"):
        raise ValueError(f"SelectiveUpdate: mask_space is {mask_space!r}, must be 'rotated' or 'original'")
    if scope not in ("global", "local"):
        raise ValueError(f"SelectiveUpdate: scope is {scope!r}, must be 'global' or 'local'")
    if graph != "auto" and graph is not False:
        raise ValueError(
            f"SelectiveUpdate: graph is {graph!r}, must be 'auto' or False: a step records CUDA graphs by itself where "
            f"it can, or it never does"
        )
    if on_nonfinite not in ("ignore", "skip", "raise"):
        raise ValueError(f"SelectiveUpdate: on_nonfinite is {on_nonfinite!r}, must be 'ignore', 'skip' or 'raise'")
    if momentum_beta is not None and not (isinstance(momentum_beta, (int, float)) and 0 <= momentum_beta < 1):
        raise ValueError(f"SelectiveUpdate: momentum_beta is {momentum_beta!r}, must be a number in [0, 1)")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"SelectiveUpdate: seed is {seed!r}, must be an integer in [0, 2**63)")


def _values(collection: Sequence[Any] | Mapping[Any, Any]) -> Iterable[Any]:
    return collection.values() if isinstance(collection, Mapping) else collection


def check_shards(parameters: Sequence[Parameter]) -> None:
    """Raise for DTensor placements that `shard_of` can't describe.

    The call also creates the process groups of meshes with several dimensions, so all ranks make it in one order.
    """
    for parameter in parameters:
        try:
            shard_of(parameter.tensor)
        except ValueError as error:
            raise ValueError(f"SelectiveUpdate: parameter {parameter.name!r} {error}") from error


def check_flattened(parameters: Sequence[Parameter]) -> None:
    """Refuse parameters that FSDP1 has joined into flat ones, or keeps as views of those.

    Called in every step of a process group, because a model may be wrapped after the optimizer was made. The mark is
    on the tensors.
    """
    found = next((p for p in parameters if getattr(p.tensor, _FLATTENED, False)), None)
    if found is not None:
        raise ValueError(
            f"SelectiveUpdate: parameter {found.name!r} (param_groups[{found.group}]) belongs to FSDP1 "
            f"(FullyShardedDataParallel). It joins parameters into flat ones and cuts those without regard to shapes, "
            f"so that a rank would select something else than one device does, and its state could not be saved. Use "
            f"FSDP2: torch.distributed.fsdp.fully_shard(model), before the optimizer is made. Or train without "
            f"selection and rotation: policy and preconditioner None"
        )


def check_complete(policy: Policy, number: int) -> None:
    """Refuse a policy that has neither a mask nor parts."""
    if policy.parts() is None and type(policy).mask is Policy.mask:
        raise TypeError(
            f"SelectiveUpdate: {type(policy).__name__} (param_groups[{number}]) says nothing: override mask(view), or "
            f"parts() to name a selection and a strength"
        )


def check_momentum(
    base: Optimizer, group: dict[str, Any], number: int, policy: Policy, capture: Capture, own: bool
) -> None:
    """Refuse a policy that reads a momentum which nobody keeps."""
    wanted = policy.needs() & {"momentum", "previous_momentum"}
    if wanted and not own and not capture.has_momentum(group):
        raise ValueError(
            f"SelectiveUpdate: {policy!r} needs the base's momentum, and {type(base).__name__} "
            f"(param_groups[{number}]) keeps no first moment of the gradient; pass "
            f"momentum_beta=0.9 and the wrapper keeps its own"
        )


def check_decay(base: Optimizer, group: dict[str, Any], number: int, decay: Decay, capture: Capture) -> None:
    """Refuse a selective decay beside a decay of the base that it can't take over, or that would come on top of it."""
    kind, name, where = capture.facts.decay, type(base).__name__, f"param_groups[{number}]"
    own, set_by_base = decay.weight_decay is not None, group.get("weight_decay", 0.0)
    decays = isinstance(set_by_base, Tensor) or set_by_base != 0
    if decays and kind in ("coupled", "inside"):
        how = "adds its weight decay to the gradient" if kind == "coupled" else "has its weight decay in the update"
        raise ValueError(
            f"SelectiveUpdate: {name} ({where}) {how}, and that reaches every coordinate; set weight_decay=0 in the "
            f"group, and give λ to the decay: {type(decay).__name__}(weight_decay=...)"
        )
    if not own and kind != "decoupled":
        raise ValueError(
            f"SelectiveUpdate: {decay!r} takes over the decoupled weight decay of the base, and {name} ({where}) has "
            f"none; give λ to the decay: {type(decay).__name__}(weight_decay=...)"
        )
    if own and decays:
        raise ValueError(
            f"SelectiveUpdate: {where} has weight_decay={set_by_base}, and {decay!r} brings its own: set the group's "
            f"to 0, or take it over with {type(decay).__name__}()"
        )
    if own and group.get("lr") is None:
        raise ValueError(
            f"SelectiveUpdate: {decay!r} decays by lr · λ, and {where} has no lr, because {name} makes its own; "
            f"take over the decay of the base with {type(decay).__name__}()"
        )
