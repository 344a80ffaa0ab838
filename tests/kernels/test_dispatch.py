"""Refusals, before anything has moved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from selective import Cautious, RandomMask, SelectiveUpdate
from selective.kernels import (
    AdamRule,
    Control,
    Draw,
    GivenRule,
    Item,
    Selection,
    SGDRule,
    StepCall,
    StepSpec,
    Strength,
    _dispatch,
    _together,
    check_steps,
    selective_step,
    selective_steps,
    top_k,
    use_backend,
)

ADAM = AdamRule(1e-2, 0.9, 0.99, 1e-8)


def refused(item, rule, selection, strength, match, error=ValueError):
    before = item.param.clone()
    state = {k: v.clone() for k, v in item.state.items()}
    with pytest.raises(error, match=match):
        selective_step([item], rule=rule, selection=selection, strength=strength, draw=Draw(0, 0))
    assert torch.equal(item.param, before)
    assert all(torch.equal(item.state[k], v) for k, v in state.items())


def test_gradient_of_another_shape(make):
    item = make(ADAM, (4, 3))
    item.grad = torch.zeros(3, 4)
    refused(
        item, ADAM, Selection("everything"), Strength("fixed"), r"parameter 5 has shape \(3, 4\), the parameter \(4"
    )


def test_calls_are_checked_once_and_before_all_of_them(make, monkeypatch):
    """`check_steps` refuses and moves nothing; `selective_steps` takes what it returns without a second check."""
    spec = StepSpec(ADAM, Selection("agreement"), Strength("fixed"), Draw(0, 0))
    good, bad = make(ADAM, (4, 3)), make(ADAM, (4, 3))
    bad.grad = torch.zeros(3, 4)
    before = good.param.clone()
    for refuse in (check_steps, selective_steps):
        with pytest.raises(ValueError, match=r"has shape \(3, 4\)"):
            refuse([StepCall([good], spec), StepCall([bad], spec)])
    assert torch.equal(good.param, before)
    checked = check_steps([StepCall([good], spec)])
    monkeypatch.setattr(_together, "_paths", None)
    assert selective_steps(checked) == [None]
    assert not torch.equal(good.param, before)


def test_complex_is_refused():
    item = Item(torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex64), {}, 1)
    refused(item, SGDRule(0.1), Selection("everything"), Strength("fixed"), "parameter 1 is torch.complex64", TypeError)


@pytest.mark.parametrize(
    "selection, strength, match",
    [
        (Selection("agreement", product="momentum"), Strength("fixed"), "agreement of the momentum"),
        (Selection("top_k", score="nesterov"), Strength("fixed"), "top-K by the nesterov score"),
        (Selection("everything"), Strength("alignment"), "the alignment strength"),
        (Selection("everything"), Strength("norm_preserving", of="momentum"), "the norm of the momentum"),
    ],
)
def test_no_momentum(selection, strength, match):
    item = Item(torch.ones(3), torch.ones(3), {"update": torch.ones(3), "start": torch.ones(3)}, 2)
    refused(
        item, GivenRule(), selection, strength, match + ".* needs a momentum, and GivenRule has none for parameter 2"
    )


def test_previous_momentum_that_was_not_kept(make):
    item = make(GivenRule(), (3,))
    del item.state["previous_momentum"]
    selection = Selection("agreement", product="previous_momentum")
    refused(item, GivenRule(), selection, Strength("fixed"), "it was not kept")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'tpu', must be"):
        top_k(torch.zeros(3), 1, backend="tpu")  # type: ignore[arg-type]


def test_no_items_and_other_devices():
    kw = {"rule": ADAM, "selection": Selection("top_k"), "strength": Strength("fixed"), "draw": Draw(0, 0)}
    assert selective_step([], statistics=True, **kw) == []
    assert selective_step([], **kw) is None
    with pytest.raises(ValueError, match="got a tensor on meta"):
        top_k(torch.zeros(3, device="meta"), 1, backend="cpu")


def test_the_reference_never_waits_for_the_device(make):
    """On the meta device a read of a value raises: nothing here reads one, whatever is asked for."""
    from selective.kernels import LionRule

    rules = [
        AdamRule(torch.tensor(1e-2, device="meta"), 0.9, torch.tensor(0.99, device="meta"), 1e-8, weight_decay=0.1,
                 amsgrad=True),
        SGDRule(0.1, 0.9, nesterov=True), LionRule(1e-2, 0.9, 0.99), GivenRule(offset=1.0),
    ]  # fmt: skip
    selections = [
        Selection("everything"), Selection("agreement", product="previous_momentum"), Selection("top_k"),
        Selection("top_k", quantile="sampled", score="nesterov"), Selection("bernoulli", unit="row"),
        Selection("agreement", control=Control()),
    ]  # fmt: skip
    strengths = [
        Strength("fixed"), Strength("mean_preserving"), Strength("norm_preserving", estimate="sampled"),
        Strength("alignment"),
    ]  # fmt: skip
    for rule in rules:
        for selection in selections:
            for strength in strengths:
                item = make(rule, (300, 300))
                item.state = {k: v.to("meta") for k, v in item.state.items()}
                item = Item(item.param.to("meta"), item.grad.to("meta"), item.state, 0)
                kw = {"rule": rule, "selection": selection, "strength": strength, "draw": Draw(0, 0)}
                (sums,) = selective_step([item], statistics=True, **kw)
                assert sums.selected.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device="meta").item()


def test_use_backend_says_what_auto_means(make, monkeypatch):
    from selective.kernels import cpu

    monkeypatch.setattr(cpu, "top_k", lambda score, k: "cpu")
    assert top_k(torch.zeros(3), 1) == "cpu"
    with use_backend("reference"):
        assert top_k(torch.zeros(3), 1).tolist() == [True, False, False]
        assert top_k(torch.zeros(3), 1, backend="cpu") == "cpu"
    assert top_k(torch.zeros(3), 1) == "cpu"


@pytest.fixture
def without_triton(monkeypatch):
    """As on a machine without it, whatever has been looked up before."""
    monkeypatch.setattr(_dispatch, "_triton_missing", [])

    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(_dispatch, "_gpu", missing)


def path_of(device: str) -> str:
    """The path that an item takes there. There is no GPU here: the item is one by its device alone."""
    item = SimpleNamespace(param=SimpleNamespace(device=torch.device(device)))
    return _dispatch._implementation(item, ADAM, Selection("agreement"), "auto")  # type: ignore[arg-type]


def test_a_gpu_without_triton_is_said_once(without_triton):
    with pytest.warns(UserWarning, match=r"No module named 'triton'\); to have it: pip install triton\. Until then"):
        assert path_of("cuda") == "reference"
    assert path_of("cuda") == "reference"  # warnings are errors here
    assert _dispatch.why_no_triton().startswith("Triton can't be imported")


def test_a_cpu_needs_no_triton(without_triton):
    assert path_of("cpu") == "cpu"
    assert _dispatch._triton_missing == []  # nobody looked for it


def test_explain_says_that_triton_is_missing(without_triton):
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), policy=Cautious())
    with use_backend("gpu"):  # as for a CUDA tensor
        assert "plain torch), because Triton can't be imported (No module named 'triton')" in optimizer.explain()
    control = SelectiveUpdate(torch.optim.AdamW([p]), policy=RandomMask.matching(Cautious()))
    with use_backend("gpu"):
        assert "plain torch), because Triton can't be imported" in control.explain()
