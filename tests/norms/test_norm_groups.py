"""Norm control in parameter groups, checkpoints and pickles, where it is refused, and what is said of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from optimi import AdamW as KahanAdamW
from torch.optim import SGD, Adafactor, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from selective import (
    AlphaConsistency,
    Cautious,
    CautiousDecay,
    ChainedOptimizer,
    NormControl,
    Policy,
    RandomMask,
    SelectiveUpdate,
    Soap,
    base_part,
    norm_from,
    param_groups_for,
)
from selective.step import norms

LR = 0.05


def parameters(shapes: Any = ((6, 5), (6, 5), (5,))) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


def values(opt: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def made(norm: Any = "normcontrol", params: Any = None, **options: Any) -> SelectiveUpdate:
    params = parameters() if params is None else params
    return SelectiveUpdate(AdamW(params, lr=LR, weight_decay=0.1), norm=norm, **{"policy": Cautious(), **options})


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


# --- groups ---


def test_hyper_parameters_are_entries_and_the_rule_can_be_set() -> None:
    opt = made(NormControl(scale=2.0))
    assert [dict(group) for group in opt.norm_groups] == [{"scale": 2.0}]
    opt.norm_groups[0]["scale"] = 0.5
    assert opt.norm_groups[0].norm == NormControl(scale=0.5)
    twin = made(NormControl(scale=0.5))
    train(opt, 0, 2), train(twin, 0, 2)
    assert same(opt, twin)
    opt.norm_groups[0].norm = None
    before = opt.param_groups[0]["params"][0].norm().item()
    train(opt, 2, 3)
    assert opt.param_groups[0]["params"][0].norm().item() != pytest.approx(before, rel=1e-4)
    opt.norm_groups[0].norm = "NormControl"
    before = opt.param_groups[0]["params"][0].norm().item()
    train(opt, 3, 4)
    assert opt.param_groups[0]["params"][0].norm().item() == pytest.approx(before, rel=1e-6)
    with pytest.raises(AttributeError, match=r"opt\.norm_groups\[i\]\.norm"):
        opt.norm = NormControl()
    opt.param_groups[0]["norm"] = None
    with pytest.raises(ValueError, match="got a 'norm' after it was taken in"):
        opt.step()


def test_a_group_is_added_and_a_norm_of_the_base_stays_there() -> None:
    class WithNorm(SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=LR)
            self.defaults["norm"] = 2
            for group in self.param_groups:
                group.setdefault("norm", 2)

    opt = SelectiveUpdate(WithNorm([{"params": parameters(), "norm": 1}]), norm=NormControl())
    assert opt.param_groups[0]["norm"] == 1
    opt = made()
    opt.add_param_group({"params": parameters(), "norm": None})
    assert [group.norm for group in opt.norm_groups] == [NormControl(), None]


def test_a_policy_with_a_field_of_that_name_is_no_mistake() -> None:
    """A matched control has a field `norm`, too."""
    control = RandomMask.matching(Cautious())
    groups = [{"params": parameters(), "policy": control, "norm": NormControl()}]
    opt = SelectiveUpdate(AdamW(groups, lr=LR))
    assert opt.policy_groups[0].policy == control
    assert opt.norm_groups[0].norm == NormControl()
    train(opt, 0, 1)


def test_data_makes_one_and_wrong_data_is_said() -> None:
    assert norm_from(None) is None
    assert norm_from("norm_control") == norm_from({"kind": "NormControl"}) == NormControl()
    with pytest.raises(ValueError, match="greater than 0"):
        NormControl(scale=0)
    with pytest.raises(ValueError, match="pass it as norm=NormControl"):
        made(None, policy=NormControl())
    with pytest.raises(ValueError, match="pass it as decay=CautiousDecay"):
        made(CautiousDecay())


def test_for_model_controls_inner_matrices_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 7))
    rates = {"matrices": 0.04, "rest": 0.003}
    opt = SelectiveUpdate.for_model(model, lr=rates, norm=NormControl(), preconditioner="soap")
    by_name = {group["name"]: norm.norm for group, norm in zip(opt.param_groups, opt.norm_groups, strict=True)}
    assert by_name == {"matrices": NormControl(), "embeddings": None, "head": None, "vectors": None}
    groups = param_groups_for(model, norm={"head": "NormControl"})
    assert [(group["name"], group["norm"]) for group in groups if group["norm"] is not None] == [
        ("head", NormControl())
    ]


# --- checkpoints ---


def test_a_run_goes_on_from_a_checkpoint_a_copy_and_a_pickle() -> None:
    whole, half = (
        made(NormControl(scale=2.0), preconditioner=Soap()),
        made(NormControl(scale=2.0), preconditioner=Soap()),
    )
    train(whole, 0, 6), train(half, 0, 3)
    saved = copy.deepcopy(half.state_dict())
    resumed = made(params=[torch.nn.Parameter(p) for p in values(half)], preconditioner=Soap())
    resumed.load_state_dict(saved)
    assert resumed.norm_groups[0].norm == NormControl(scale=2.0)
    copied, pickled = copy.deepcopy(half), pickle.loads(pickle.dumps(half))
    for opt in (half, resumed, copied, pickled):
        train(opt, 3, 6)
        assert same(opt, whole)


def test_another_rule_is_refused_and_an_older_checkpoint_loads() -> None:
    opt = made()
    train(opt, 0, 1)
    saved = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="has norm=None, the checkpoint was made with NormControl"):
        made(None).load_state_dict(saved)
    plain = AdamW(parameters(), lr=LR)
    plain.load_state_dict(base_part(saved))
    before = made(None)
    train(before, 0, 1)
    opt.load_state_dict(before.state_dict())
    assert opt.norm_groups[0].norm == NormControl()


def test_a_dense_group_says_its_rule_too() -> None:
    opt = SelectiveUpdate(AdamW(parameters(), lr=LR), norm=NormControl(scale=3.0))
    train(opt, 0, 1)
    other = SelectiveUpdate(AdamW(parameters(), lr=LR), norm=NormControl())
    other.load_state_dict(opt.state_dict())
    assert other.norm_groups[0].norm == NormControl(scale=3.0)


def test_schedules_and_exchanged_parameters_are_followed() -> None:
    opt = made()
    schedule = CosineAnnealingLR(opt, 10)
    turned = []
    for step in range(6):
        before = values(opt)[0]
        train(opt, step, step + 1)
        schedule.step()
        turned.append(float((values(opt)[0] - before).norm() / before.norm()))
    assert turned == sorted(turned, reverse=True)
    first = opt.param_groups[0]["params"][0]
    first.data = first.data.double()
    opt.state[first].update({k: v.double() for k, v in opt.state[first].items() if v.shape == first.shape})
    norm = first.norm().item()
    first.grad = torch.ones_like(first)
    opt.step()
    assert first.norm().item() == pytest.approx(norm, rel=1e-12)


# --- refusals ---


def test_a_matrix_of_zeros_is_refused_before_anything_moves() -> None:
    params = parameters(((6, 5), (2, 4, 3), (5,)))
    params[1].data[1] = 0
    opt = made(params=params, matrix_view="experts")
    before = values(opt)
    with pytest.raises(ValueError, match=r"'param_groups\[0\]\[1\]', or a matrix in it, is 0"):
        train(opt, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(opt), before, strict=True))
    assert not opt.base.state[params[0]] or opt.base.state[params[0]]["step"] == 0
    params[1].data[1] = 1
    train(opt, 0, 1)
    params[1].data.zero_()  # later on it stays 0, and is no NaN
    train(opt, 1, 2)
    assert not params[1].any()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes the place of weight decay, and param_groups\[0\] has decay="):
        made(decay=CautiousDecay())
    with pytest.raises(ValueError, match=r"set weight_decay=0 in param_groups\[0\]"):
        SelectiveUpdate(Adafactor(parameters(), lr=LR, weight_decay=0.1), norm=NormControl())
    low = [p.detach().bfloat16().requires_grad_() for p in parameters()]
    with pytest.raises(ValueError, match="keeps the rounding residues"):
        SelectiveUpdate(KahanAdamW(low, lr=LR, kahan_sum=True), Cautious(), norm=NormControl())
    theirs = pytest.importorskip("transformers.optimization")
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no lr, because Adafactor makes its own"):
        SelectiveUpdate(theirs.Adafactor(parameters()), norm=NormControl())


def test_who_looks_at_the_parameters_is_said() -> None:
    class LooksAtTheParameter(Policy):
        reads = frozenset({"param", "update"})

        def mask(self, view: Any) -> Any:
            return view.param * view.update > 0

    with pytest.raises(ValueError, match=r"because the policy LooksAtTheParameter\(\) looks at the parameters"):
        made(policy=LooksAtTheParameter())
    with pytest.raises(ValueError, match="because Adafactor looks at the parameters"):
        SelectiveUpdate(Adafactor(parameters(), lr=LR, weight_decay=0.1), norm=NormControl())


def test_a_sparse_gradient_is_refused_with_what_helps() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    opt = SelectiveUpdate(SGD(embedding.parameters(), lr=LR), norm=NormControl())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="put it into a parameter group with norm None"):
        opt.step()


def test_what_the_base_steps_at_a_relative_rate_is_warned_of() -> None:
    shapes = ((6, 5), (4, 3, 2, 2))
    with pytest.warns(UserWarning, match=r"'param_groups\[0\]\[1\]' of param_groups\[0\] are not under NormControl"):
        made(params=parameters(shapes))
    made(NormControl(scale=6.0), params=parameters(shapes))
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 7))
    with pytest.warns(UserWarning, match="lr is left out"):
        SelectiveUpdate.for_model(model, norm=NormControl())


def test_a_refusal_in_one_member_of_a_chain_leaves_the_others() -> None:
    fine, zero = parameters(((4, 4), (4, 4)))
    zero.data.zero_()
    members = {"a": made(params=[fine]), "b": SelectiveUpdate(SGD([zero], lr=LR), norm=NormControl())}
    before = fine.detach().clone()
    fine.grad, zero.grad = torch.ones(4, 4), torch.ones(4, 4)
    with pytest.raises(ValueError, match="is 0, and NormControl"):
        ChainedOptimizer(members).step()
    assert torch.equal(fine, before)


@pytest.mark.parametrize("where", ["hold_matrices_", "norm_sums", "turn_matrices_"])
def test_an_error_in_the_rule_itself_puts_parameters_back(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call fails, when a first shape is held, added up or turned already."""
    opt = made(params=parameters(((6, 5), (4, 4))))
    train(opt, 0, 1)
    before, real, calls = values(opt), getattr(norms, where), []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(where)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory today")
        return real(*arguments, **options)

    monkeypatch.setattr(norms, where, fails)
    with pytest.raises(torch.OutOfMemoryError):
        train(opt, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(values(opt), before, strict=True))


def test_hooks_of_the_base_see_parameters_and_may_change_them() -> None:
    params = parameters(((6, 5),))
    base = AdamW(params, lr=LR)
    opt = SelectiveUpdate(base, Cautious(), norm=NormControl())
    seen: list[torch.Tensor] = []
    base.register_step_pre_hook(lambda *_: seen.append(params[0].detach().clone()))
    base.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone()))
    clamp = base.register_step_post_hook(lambda *_: params[0].data.clamp_(-0.5, 0.5))
    start = params[0].detach().clone()
    train(opt, 0, 1)
    assert torch.equal(seen[0], start)
    assert seen[1].norm().item() == pytest.approx(start.norm().item(), rel=1e-6) and not torch.equal(seen[1], start)
    assert params[0].abs().max() <= 0.5
    clamp.remove()


def test_an_error_in_a_step_puts_the_parameters_back() -> None:
    class HasNoMaskToday(Policy):
        def mask(self, view: Any) -> Any:
            raise RuntimeError("no mask today")

    opt = made(policy=HasNoMaskToday())
    before = values(opt)
    with pytest.raises(RuntimeError, match="no mask today"):
        train(opt, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(opt), before, strict=True))


# --- what is said ---


def test_explain_says_what_is_kept() -> None:
    text = " ".join(made(NormControl(scale=2.0), policy=AlphaConsistency()).explain().split())
    assert "kept of 2 parameters, turned by lr * 2, relative to it" in text
    assert "1 other stepped at lr: 1-D, no matrix" in text
    assert "not of the matrices whose norm is kept" in text
    assert "relative to the norm: 0.009 (AdamW) to 0.018 (in Soap)" in text
    matrices = " ".join(made(params=parameters(((4, 3),))).explain().split())
    assert "none, because of NormControl()" in matrices
    assert "and a copy of the matrices whose norm is kept, 48 bytes" in matrices
    dense = SelectiveUpdate(AdamW(parameters(((4, 3),)), lr=LR), norm=NormControl()).explain()
    assert "during the step a copy of the matrices whose norm is kept, 48 bytes" in " ".join(dense.split())
    vectors = " ".join(made(params=parameters(((4,),))).explain().split())
    assert "NormControl(): no parameter here; 1-D, no matrix" in vectors
    assert "decoupled" in vectors and "whose norm is kept" not in vectors
    assert "norm=NormControl(scale=2.0)" in repr(made(NormControl(scale=2.0)))
