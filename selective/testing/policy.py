"""Contract checks for authors of policies: the rules for a `mask`, on ordinary and on degenerate tensors."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from selective.base.generators import generators_restored, seed_all
from selective.kernels import spec
from selective.optimizer import SelectiveUpdate
from selective.policies import Policy, policy_from
from selective.policies.view import TENSORS, StepView, Tensors
from selective.testing.harness import difference, require
from selective.testing.kernel import require_twins
from selective.testing.report import Report, in_short, outcome_of

policy_checks: dict[str, Callable[[Policy], None]] = {}  # The checks of `check_policy`, by name.
"""The checks by name. Each takes a policy, and returns or raises `CheckFailed`, `NotApplicable` or `Skipped`."""

_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (5, 3), (1, 6), (4, 3, 2, 2))
_SCOPES = ("tensor", "row", "element")


def _register(check: Callable[[Policy], None]) -> Callable[[Policy], None]:
    policy_checks[check.__name__] = check
    return check


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Ordinary inputs: a gradient, an update and momenta that agree with it in most coordinates."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=exact)

    grad, previous = draw(), draw()
    momentum = 0.9 * previous + 0.1 * grad
    return {"grad": grad, "previous_momentum": previous, "momentum": momentum,
            "update": 1e-2 * torch.sign(momentum) * draw().abs(), "param": draw().to(dtype)}  # fmt: skip


def _view(policy: Policy, tensors: dict[str, Tensor], *, every: bool = True) -> StepView:
    """A view of `tensors`. With `every`, it allows reads that are not declared: only one check is about those."""
    view = StepView(
        Tensors(**tensors),  # type: ignore[arg-type]
        reads=frozenset(TENSORS) if every else policy.needs(),
        who=type(policy).__name__,
        name="weight",
        draw=spec.Draw(seed=1, step=3),
        address=2,
    )
    view.state = policy.init_state(view)
    return view


def _mask(policy: Policy, view: StepView) -> Tensor:
    """The policy's mask, without its state."""
    result = policy.mask(view)
    mask = result[0] if isinstance(result, tuple) else result
    require(isinstance(mask, Tensor), f"mask() returned a {type(mask).__name__}, not a tensor.")
    return mask


@_register
def mask_is_a_multiplier(policy: Policy) -> None:
    """The mask is a bool or floating tensor that broadcasts to the parameter and is finite on ordinary inputs."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in _SHAPES:
            mask = _mask(policy, _view(policy, _tensors(shape, dtype)))
            where = f"for a {str(dtype).removeprefix('torch.')} parameter of shape {shape}"
            kind = mask.dtype == torch.bool or mask.dtype.is_floating_point
            require(kind, f"mask() returned {mask.dtype} {where}; it must be bool or floating.")
            try:
                fits = torch.broadcast_shapes(mask.shape, shape) == torch.Size(shape)
            except RuntimeError:
                fits = False
            require(fits, f"mask() returned shape {tuple(mask.shape)} {where}; it must broadcast to it.")
            require(bool(torch.isfinite(mask).all()), f"mask() returned NaN or infinity {where}.")


@_register
def mask_is_deterministic(policy: Policy) -> None:
    """The same view gives the same mask, whatever came in between. A policy's memory belongs in its state."""
    first = _mask(policy, _view(policy, _tensors((5, 3)))).clone()
    _mask(policy, _view(policy, _tensors((4, 3), seed=9)))
    text = difference(_mask(policy, _view(policy, _tensors((5, 3)))), first)
    require(text is None, f"called again with the same view, the mask {text}.")


@_register
def view_is_not_written(policy: Policy) -> None:
    """`mask` does not write on the view's tensors or its state. They are the base's: a write changes its moments."""
    tensors = _tensors((5, 3))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    view = _view(policy, tensors)
    state = {key: value.clone() for key, value in view.state.items()}
    _mask(policy, view)
    for name, tensor in tensors.items():
        text = difference(tensor, before[name])
        require(text is None, f"mask() wrote on view.{name}: it {text}.")
    require(set(view.state) == set(state), f"mask() changed the entries of view.state to {sorted(view.state)}.")
    for key, value in state.items():
        text = difference(view.state[key], value)
        require(text is None, f"mask() wrote on view.state[{key!r}]: it {text}; return (mask, new state) instead.")


@_register
def global_generators_are_left_alone(policy: Policy) -> None:
    """Randomness comes from `view.random`, so that replicas with other global seeds select the same coordinates."""
    masks = []
    with generators_restored():
        for seed in (11, 12):
            seed_all(seed)
            before = torch.get_rng_state(), random.getstate()
            masks.append(_mask(policy, _view(policy, _tensors((64, 3)))).clone())
            moved = not torch.equal(torch.get_rng_state(), before[0]) or random.getstate() != before[1]
            require(not moved, "mask() moved a global generator; use view.random().")
    text = difference(masks[1], masks[0])
    require(text is None, f"with another global seed the mask {text}; use view.random().")


@_register
def declared_reads_suffice(policy: Policy) -> None:
    """`mask` and `init_state` read only what `reads` declares, and `reads` and `scope` have allowed values."""
    unknown = policy.needs() - set(TENSORS)
    require(not unknown, f"reads declares {sorted(unknown)}; there are {', '.join(TENSORS)}.")
    require(policy.scope in _SCOPES, f"scope is {policy.scope!r}; there are {', '.join(_SCOPES)}.")
    _mask(policy, _view(policy, _tensors((5, 3)), every=False))


@_register
def copies_are_equal(policy: Policy) -> None:
    """pickle and deepcopy give an equal policy, because it is copied with the optimizer."""
    for how, twin in (("pickle", pickle.loads(pickle.dumps(policy))), ("deepcopy", copy.deepcopy(policy))):
        require(twin == policy, f"{how} gave {twin!r} for {policy!r}.")
        text = difference(_mask(twin, _view(twin, _tensors((5, 3)))), _mask(policy, _view(policy, _tensors((5, 3)))))
        require(text is None, f"after {how} the mask {text}.")


@_register
def json_round_trip(policy: Policy) -> None:
    """A policy that goes to JSON and back is the same. Configs and checkpoints hold it in this form."""
    twin = policy_from(policy.model_dump_json())
    require(type(twin) is type(policy) and twin == policy, f"through JSON, {policy!r} came back as {twin!r}.")


@_register
def state_keeps_its_form(policy: Policy) -> None:
    """State is tensors, 0-d or shaped like the parameter, with the same entries, shapes and dtypes after each step."""
    for shape in ((5, 3), (1,)):
        view = _view(policy, _tensors(shape))
        state = dict(view.state)
        for key, value in state.items():
            good = isinstance(value, Tensor) and value.shape in (torch.Size(()), torch.Size(shape))
            require(good, f"init_state made {key!r}, which is no tensor, 0-d or of the parameter's shape.")
        result = policy.mask(view)
        if not isinstance(result, tuple):
            continue
        require(len(result) == 2 and isinstance(result[1], dict), "mask() returned a tuple that is not (mask, state).")
        new = result[1]
        require(set(new) == set(state), f"mask() returned the state {sorted(new)}, init_state made {sorted(state)}.")
        for key, value in state.items():
            same = isinstance(new[key], Tensor) and new[key].shape == value.shape and new[key].dtype == value.dtype
            require(same, f"mask() returned state {key!r} of another shape or dtype than init_state made.")


def _degenerate() -> dict[str, dict[str, Tensor]]:
    """Inputs on which masks have divided by zero, or selected nothing or NaN."""
    zeros, ones = torch.zeros(6, 4), torch.ones(6, 4)
    tied = {"grad": ones, "update": 0.01 * ones, "momentum": ones, "previous_momentum": ones, "param": ones}
    still = {**_tensors((6, 4)), "grad": zeros}
    against = {**tied, "grad": -ones}
    nothing = dict.fromkeys(tied, zeros)
    first = {**_tensors((6, 4)), "previous_momentum": zeros}
    cases = {"all tied": tied, "all zero gradients": still, "no coordinate aligned": against, "all zero": nothing,
             "the first step": first, "one element": _tensors((1,)), "a scalar": _tensors(())}  # fmt: skip
    return {what: {name: tensor.clone() for name, tensor in tensors.items()} for what, tensors in cases.items()}


@_register
def degenerate_tensors_are_defined(policy: Policy) -> None:
    """The mask is finite for ties, zeros, one element, nothing aligned and a first step. The sign of 0 is ignored.

    Untouched embedding rows have gradients of +0 or -0. The mask must treat both alike.
    """
    for what, tensors in _degenerate().items():
        mask = _mask(policy, _view(policy, tensors))
        require(bool(torch.isfinite(mask).all()), f"with {what}, mask() returned NaN or infinity.")
        if what == "all zero gradients":
            other = _mask(policy, _view(policy, {**tensors, "grad": -tensors["grad"]}))
            text = difference(other, mask)
            require(text is None, f"with gradients of -0.0 instead of 0.0, the mask {text}.")


@_register
def nan_stays_where_it_is(policy: Policy) -> None:
    """With a NaN in one tensor's gradient, the step runs and no other tensor becomes NaN."""
    healthy, sick = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    optimizer = SelectiveUpdate(torch.optim.AdamW([healthy, sick], lr=1e-2), policy=policy)
    for step in range(3):
        healthy.grad, sick.grad = _tensors((6, 4), seed=step)["grad"], _tensors((6, 4), seed=step)["grad"]
        sick.grad[2, 1] = float("nan")
        optimizer.step()
    require(bool(torch.isfinite(healthy).all()), "a NaN in one tensor's gradient made another tensor NaN.")


@_register
def steps_in_an_optimizer(policy: Policy) -> None:
    """Six steps over AdamW: tensors of no, one and many elements stay finite, and a matrix moves."""
    for dtype in (torch.float32, torch.bfloat16):
        params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((), (0,), (1,), (0, 3), (64, 8))]
        optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=0.1), policy=policy)
        for step in range(6):
            for p in params:
                p.grad = _tensors(tuple(p.shape), seed=step)["grad"].to(dtype)
            optimizer.step()
        finite = all(bool(torch.isfinite(p).all()) for p in params)
        require(finite, f"after six steps over AdamW, {dtype} parameters are not finite.")
        require(bool((params[-1] != 1).any()), f"in six steps over AdamW no element of a {dtype} matrix moved.")


@_register
def kernel_agrees_with_its_twin(policy: Policy) -> None:
    """A selection's kernel selects the elements that `select` selects, in float32, and reads only what it declares.

    The kernel is compiled on a machine with a GPU, and interpreted if TRITON_INTERPRET is set; else this is skipped.
    """
    require_twins(policy, _tensors, _view)


def check_policy(policy: Policy) -> Report:
    """Run every contract check on a policy. Returns a `Report`, as `check_wrapper` does for wrappers.

    It is deterministic and takes a few hundredths of a second on the CPU. A selection's kernel is compiled on a machine
    with a GPU, else interpreted; if it can't be, its check is skipped. Raises TypeError if `policy` is no `Policy`.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"check_policy: expected a Policy, found a {type(policy).__name__}; build it first")
    outcomes = []
    for name, check in policy_checks.items():
        outcomes.append(outcome_of(name, 0, partial(check, policy), lambda error: f"raised {in_short(error)}"))
    return Report(repr(policy), tuple(outcomes))
