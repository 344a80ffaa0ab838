"""A selection with a kernel of its own: its form, what is refused, and what the contract check catches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_selections import DEVICE, AlongTheMomentum, FarUpdates, in_kernels

from selective import Fixed, Policy, Selection, TopK
from selective.kernels import (
    Draw,
    GivenRule,
    Item,
    SGDRule,
    Strength,
    evaluate_function,
    selective_step,
    spec,
)
from selective.testing import check_policy
from selective.testing import kernel as kernel_check

CHECK = "kernel_agrees_with_its_twin"


def define(kernel: Any, base: type[Selection] = Selection, **more: Any) -> type[Selection]:
    """A selection with one field of each kind, defined here and now."""

    def select(self, view):
        return view.update > 0

    fields = {"threshold": float, "count": int, "flag": bool, "mode": str}
    body: dict[str, Any] = {"threshold": 0.5, "count": 1, "flag": False, "mode": "a", "select": select, **more}
    names = {"__annotations__": fields, "__module__": __name__, "__qualname__": "Defined", "kernel": kernel}
    return type(base)("Defined", (base,), {**names, **{k: v for k, v in body.items() if v is not None}})


def positive(grad, update, momentum):
    return update > 0


def above(grad, update, momentum, threshold):
    return update > threshold


def every_number(grad, update, momentum, flag, count, threshold):
    return (update > threshold) & (flag > 0) & (count > 0)


def five(grad, update, momentum, threshold, count, flag, a, b):
    return update > threshold


def unknown(grad, update, momentum, limit):
    return update > limit


def text(grad, update, momentum, mode):
    return update > 0


def misordered(update, grad, momentum):
    return update > 0


def starred(grad, update, momentum, *numbers):
    return update > 0


def test_plain_static_and_jitted_functions_are_kernels() -> None:
    triton = pytest.importorskip("triton")
    tensors = [torch.tensor([-1.0, -0.0, 0.4, 0.6, float("nan")], device=DEVICE)] * 3
    for kernel in (above, staticmethod(above), triton.jit(above), staticmethod(triton.jit(above))):
        selection = define(kernel)(threshold=0.5)
        described = selection.spec()
        assert described is not None
        assert (described.kind, described.numbers, described.reads_momentum) == ("function", (0.5,), False)
        assert selection.kernel is described.function is type(selection).kernel  # never bound to the instance
        if kernel is above:
            assert evaluate_function(described, *tensors).tolist() == [False, False, False, True, False]
    assert define(every_number)(flag=True, count=3).spec().numbers == (1.0, 3.0, 0.5)
    assert define(positive, reads=frozenset({"momentum"}))().spec().reads_momentum


@pytest.mark.parametrize(
    ("kernel", "more", "words"),
    [
        (misordered, {}, r"found kernel\(update, grad, momentum\); a kernel takes grad, update, momentum and then"),
        (starred, {}, r"found kernel\(grad, update, momentum, \*numbers\)"),
        (five, {}, r"takes 5 numbers \(threshold, count, flag, a, b\), at most 4 can be handed to it"),
        (unknown, {}, r"'limit', which is no field .* those are threshold, count, flag. Add `limit: float = ...`"),
        (text, {}, r"'mode', which is no field of the class that holds a number"),
        (lambda grad, update, momentum: update > 0, {}, "write it with `def kernel"),
        (print, {}, "write it with `def kernel"),
        (positive, {"reads": frozenset({"update", "previous_momentum"})}, r"names \['previous_momentum'\]; a kern"),
        (positive, {"reads": frozenset({"param"})}, r"can see grad, update, momentum and numbers"),
        (positive, {"select": None}, r"needs its twin in torch.*override select\(view\)"),
        (positive, {"base": TopK}, "TopK has kernels of its own, so that this kernel would not run"),
    ],
)  # fmt: skip
def test_what_can_be_no_kernel_is_refused_where_it_is_written(kernel: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match="^Defined: .*" + words):
        define(kernel, **more)


def test_a_subclass_changes_both_or_none() -> None:
    parent = define(positive)
    assert type(parent)("Same", (parent,), {"__module__": __name__}).kernel is parent.kernel
    body = {"__module__": __name__, "select": lambda self, view: view.update < 0}
    with pytest.raises(TypeError, match=r"select is Half's, the kernel still Defined's.*give Half a kernel too"):
        type(parent)("Half", (parent,), body)
    without = type(parent)("Without", (parent,), {**body, "kernel": None})
    assert without().spec() is None


def test_the_step_refuses_a_function_that_cannot_run_before_anything_moves() -> None:
    described = FarUpdates().spec()
    assert described is not None
    how: Any = {"rule": SGDRule(0.1, 0.9), "strength": Strength("fixed"), "draw": Draw(0, 0)}
    for backend in ("cpu", "reference"):
        item = Item(torch.ones(4), torch.ones(4), {"momentum_buffer": torch.ones(4)}, 3)
        with pytest.raises(ValueError, match=r"a Triton function, which runs on a GPU only.*parameter 3: the"):
            selective_step([item], selection=described, backend=backend, **how)
        assert item.param.tolist() == item.state["momentum_buffer"].tolist() == [1.0] * 4
    item = Item(torch.ones(4, device=DEVICE), torch.ones(4, device=DEVICE), {"update": torch.ones(4)}, 3)
    needs = AlongTheMomentum().spec()
    assert needs is not None
    how["rule"] = GivenRule()
    with in_kernels(), pytest.raises(ValueError, match="the selection's function needs a momentum, and GivenRule has"):
        selective_step([item], selection=needs, **how)


def test_it_needs_no_triton_on_a_cpu() -> None:
    """Defined, stepped and checked where Triton is not installed: the report says that the kernel was not run."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernel_selections import FarUpdates
from selective import Fixed, Policy, SelectiveUpdate
from selective.testing import check_policy
policy = Policy(selection=FarUpdates(threshold=0.01), strength=Fixed())
p = torch.nn.Parameter(torch.ones(5))
p.grad = torch.ones(5)
SelectiveUpdate(torch.optim.AdamW([p], lr=0.1), policy=policy).step()
assert (p < 1).all()
report = check_policy(policy)
assert not report.failed, str(report)
assert [o.check for o in report.skipped] == ["kernel_agrees_with_its_twin"]
assert "1 skipped" in str(report) and "skipped         the kernel was not run: Triton can't be imported" in str(report)
"""
    support = next(path for path in sys.path if path.endswith("support"))
    code = f"import sys; sys.path[:0] = {[support, *sys.path]!r}\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True)


def outcome(selection: Selection) -> tuple[str, str]:
    (found,) = [o for o in check_policy(Policy(selection=selection, strength=Fixed())).outcomes if o.check == CHECK]
    return found.verdict, found.message


@pytest.mark.parametrize("selection", [FarUpdates(), AlongTheMomentum(), AlongTheMomentum(either=True)], ids=str)
def test_twins_keep_the_contract(selection: Selection) -> None:
    assert outcome(selection) == ("passed", "")


def test_a_kernel_that_nothing_can_run_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "function_device", lambda: (None, "there is no CUDA device"))
    assert outcome(FarUpdates()) == ("skipped", "the kernel was not run: there is no CUDA device")


def not_below(grad, update, momentum, threshold):
    return update >= threshold


def not_at_most(grad, update, momentum, threshold):
    return (update <= threshold) == False  # noqa: E712  (NaN is selected)


def at_momentum(grad, update, momentum, threshold):
    return (update > threshold) & (momentum == momentum)


def not_there(grad, update, momentum, threshold):
    return update.absolutely() > threshold


def a_mask(grad, update, momentum, threshold):
    return update - threshold


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (not_below, "extreme numbers; the first: grad=0, update=0.5, momentum=0: the kernel says True, select"),
        (not_at_most, "update=nan, momentum=0: the kernel says True, select() says False"),
        (at_momentum, "the kernel looks at momentum, which reads does not declare: add 'momentum' to reads"),
        (not_there, "the kernel does not compile or run: AttributeError"),
        (a_mask, "a selection's kernel has to return bools"),
    ],
)
def test_a_kernel_that_says_something_else_is_caught(kernel: Any, words: str) -> None:
    verdict, message = outcome(define(kernel, select=lambda self, view: view.update > self.threshold)())
    assert verdict == "failed"
    assert words in message


def test_a_twin_of_the_wrong_kind_is_caught() -> None:
    verdict, message = outcome(define(positive, select=lambda self, view: (view.update > 0).float())())
    assert (verdict, "select() returned torch.float32 ()" in message) == ("failed", True)


def test_what_is_no_function_of_float32_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 tensors of one shape; found torch.float32 \(2,\), torch.float64"):
        evaluate_function(spec.Selection("function", function=positive), torch.ones(2), torch.ones(2).double())
