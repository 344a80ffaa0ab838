"""The contract check of a selection's kernel: it must select the elements that `select`, its torch twin, selects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selective.kernels import evaluate_function, function_device, spec
from selective.policies import Policy, Selection
from selective.policies.kernel import TENSORS
from selective.policies.view import StepView
from selective.testing.harness import CheckFailed, NotApplicable, Skipped, require

Inputs = dict[str, Tensor]

# One element, a few, exactly a block, and more than a block.
_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (5, 3), (1024,), (1500,), (3, 7, 11))
# These and the selection's own numbers are tried as gradient, update and momentum, each with each. Products of the
# small ones underflow.
_SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.3, 1e-30, -1e-30, 1e-40, 3e38, float("inf"), float("-inf"), float("nan"))


def require_twins(policy: Policy, ordinary: Callable[..., Inputs], view: Callable[[Policy, Inputs], StepView]) -> None:
    """Compare the kernel of the policy's selection with its `select`.

    `ordinary(shape)` makes the tensors of a view, and `view` makes the view. Raises `NotApplicable` if there is no
    kernel, `Skipped` if no kernel can run here.
    """
    parts = policy.parts()
    selection = None if parts is None else parts[0]
    described = None if selection is None else selection.spec()
    if selection is None or described is None or described.kind != "function":
        raise NotApplicable("no selection with a kernel of its own")
    device, why = function_device()
    if device is None:
        raise Skipped(f"the kernel was not run: {why}")
    cases = {f"ordinary tensors of shape {shape}": ordinary(shape) for shape in _SHAPES}
    cases["zeros, infinities, NaN and extreme numbers"] = _special(described.numbers)
    for what, tensors in cases.items():
        here = {name: tensor.to(device) for name, tensor in tensors.items()}
        by_kernel = _by_kernel(described, here)
        _require_declared(selection, described, here, by_kernel)
        _compare(what, here, by_kernel, _by_twin(selection, view(policy, here)))


def _special(numbers: tuple[float, ...]) -> Inputs:
    values = torch.tensor([*_SPECIAL, *numbers, *(-x for x in numbers)])
    grad, update, momentum = (x.flatten() for x in torch.meshgrid(values, values, values, indexing="ij"))
    names = {"grad": grad, "update": update, "momentum": momentum, "previous_momentum": momentum, "param": grad}
    return {name: tensor.clone() for name, tensor in names.items()}


def _by_kernel(described: spec.Selection, tensors: Inputs) -> Tensor:
    try:
        return evaluate_function(described, *(tensors[name] for name in TENSORS))
    except Exception as error:  # a stranger's function under Triton's compiler may raise anything
        innermost: BaseException = error  # Triton wraps an error once for each function around it
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        reason = " ".join(f"{type(innermost).__name__}: {innermost}".split())
        if len(reason) > 500:  # Triton shows the source first, and the error last
            reason = f"{reason[:150]} ... {reason[-350:]}"
        raise CheckFailed(f"the kernel does not compile or run: {reason}") from error


def _by_twin(selection: Selection, view: StepView) -> Tensor:
    selected = selection.select(view)
    returned = f"{selected.dtype} {tuple(selected.shape)}" if isinstance(selected, Tensor) else type(selected).__name__
    good = isinstance(selected, Tensor) and selected.dtype == torch.bool and selected.shape == view.shape
    require(
        good, f"select() returned {returned}; it must be a bool tensor of the parameter's shape {tuple(view.shape)}."
    )
    return selected


def _compare(what: str, tensors: Inputs, by_kernel: Tensor, by_twin: Tensor) -> None:
    differs = (by_kernel != by_twin).flatten()
    if not bool(differs.any()):
        return
    first = int(differs.nonzero()[0])
    values = ", ".join(f"{name}={tensors[name].flatten()[first].item():.9g}" for name in TENSORS)
    raise CheckFailed(
        f"kernel and select() disagree in {int(differs.sum())} of {differs.numel()} elements of {what}; the first: "
        f"{values}: the kernel says {bool(by_kernel.flatten()[first])}, select() says {bool(by_twin.flatten()[first])}."
    )


def _require_declared(selection: Selection, described: spec.Selection, tensors: Inputs, by_kernel: Tensor) -> None:
    """Require that the kernel's answer does not depend on tensors that `reads` does not declare."""
    for name in TENSORS:
        if name in selection.needs():
            continue
        for other in (1.0 - 3.0 * tensors[name], torch.full_like(tensors[name], float("nan"))):
            same = torch.equal(_by_kernel(described, {**tensors, name: other}), by_kernel)
            require(same, f"the kernel looks at {name}, which reads does not declare: add {name!r} to reads.")
