"""Changes between steps, and what is unusual from the start: no table that was made of something else may be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_support import copied, few_samples, made

from selective import MGUP, CautiousMGUP, RandomMask, SelectiveUpdate
from selective.kernels import (
    AdamRule,
    Draw,
    GivenRule,
    Item,
    ItemList,
    Selection,
    SGDRule,
    Strength,
    selective_step,
    use_backend,
)
from selective.kernels.layouts import Layouts

ADAM = AdamRule(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
LAST = torch.channels_last


def both(ours: list[Item], theirs: list[Item], **changes) -> None:
    how = {
        "rule": ADAM,
        "selection": Selection("agreement"),
        "strength": Strength("fixed", 2.0, 0.5),
        "draw": Draw(7, 3),
    }
    how |= changes
    selective_step(ours, backend="gpu", **how)
    selective_step(theirs, backend="reference", **how)


def close(item: Item, twin: Item) -> None:
    torch.testing.assert_close(item.param.cpu(), twin.param.cpu())


@pytest.mark.parametrize("strange", ["expanded", "contiguous", "strided"])
def test_gradients_of_other_strides(strange, device):
    """A plan that was made for channels-last tensors, and a gradient that is not."""
    results = []
    for backend in ("gpu", "reference"):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator).to(device, memory_format=LAST))
        optimizer = SelectiveUpdate(torch.optim.AdamW([p], lr=1e-2), policy=CautiousMGUP())
        for number in range(3):
            g = torch.randn(4, 3, 5, 5, generator=generator).to(device)
            if number < 2:
                g = g.contiguous(memory_format=LAST)
            elif strange == "expanded":
                g = g[:, :1, :1, :1].expand(4, 3, 5, 5)
            elif strange == "strided":
                g = torch.stack([g, g], -1)[..., 0]
            p.grad = g
            with use_backend(backend):
                optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_a_parameter_seen_from_another_side(device):
    item = made(ADAM, (8, 8))
    twin, item = copied(item, "cpu"), copied(item, device)
    kept, fresh = ItemList([item]), [twin]
    both(kept, fresh)
    for i in (item, twin):
        i.param = i.param.t()
    both(kept, fresh, selection=Selection("bernoulli"))
    close(item, twin)


@pytest.mark.parametrize("looks", [True, False], ids=["looks", "does not look"])
def test_a_gradient_seen_from_another_side(looks, device, monkeypatch):
    """In the third step, which knows the layouts of the second. A plan that does not look takes it as it was."""
    item = made(ADAM, (8, 8))
    twin, item = copied(item, "cpu"), copied(item, device)
    kept, fresh = ItemList([item]), [twin]
    both(kept, fresh)
    both(kept, fresh)
    if not looks:
        monkeypatch.setattr(Layouts, "are_of", lambda self, tensors: True)
    for i in (item, twin):
        i.grad = i.grad.t()
    both(kept, fresh)
    assert torch.allclose(item.param.cpu(), twin.param.cpu(), rtol=1.3e-6, atol=1e-5) is looks  # those of `close`


def test_an_update_that_shares_a_strided_parameter(device):
    def share() -> Item:
        p = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(device).t()
        return Item(p, torch.full_like(p, 0.1), {"update": p.detach(), "start": torch.ones_like(p)}, 0)

    item, twin = share(), share()
    both([item], [twin], rule=GivenRule())
    close(item, twin)


def test_a_kept_plan_sees_where_an_update_lies(device, monkeypatch):
    """One pass may settle what it left undecided only while the update outlives the write to the parameter."""
    few_samples(monkeypatch)
    from selective.kernels.gpu.launch import Step

    passes = []
    for name in ("_pass", "_count"):  # one that writes, and one that only counts
        method = getattr(Step, name)
        monkeypatch.setattr(Step, name, lambda self, *rest, method=method: passes.append(1) or method(self, *rest))
    how = {"rule": GivenRule(), "selection": Selection("top_k", fraction=0.3)}
    start = copied(made(GivenRule(), (40, 30)), device)
    kept, results = ItemList(), []
    for place in ("apart", "in the parameter", "apart", "apart, from a copy"):
        item = copied(start)
        if place == "in the parameter":
            item.param.copy_(item.state["update"])
            item.state["update"] = item.param.detach()
        elif place == "apart":
            item.state["start"] = item.param
        kept[:] = [item]
        passes.clear()
        both(kept, [copied(item, "cpu")], **how)
        results.append(item.param)
        assert len(passes) == (1 if place == "apart" else 2), place
    assert all(torch.equal(r, results[0]) for r in results)


def test_an_average_of_another_dtype_goes_to_the_reference(device):
    item = copied(made(ADAM, (64,)), device)
    item.policy_state["average"] = torch.ones((), dtype=torch.bfloat16, device=device)
    how = {"rule": ADAM, "selection": Selection("agreement"), "strength": Strength("alignment"), "draw": Draw(0, 0)}
    with pytest.raises(ValueError, match="its average is not one float32 number"):
        selective_step([item], backend="gpu", **how)


def test_a_step_that_failed_is_not_counted(device):
    item = made(ADAM, (64,))
    twin, item = copied(item, "cpu"), copied(item, device)
    kept, fresh = ItemList([item]), [twin]
    both(kept, fresh)
    with pytest.raises((ValueError, RuntimeError)):
        both(kept, [], rule=replace(ADAM, lr=torch.tensor([1.0, 2.0])))
    assert float(item.state["step"]) == float(twin.state["step"])
    both(kept, fresh)
    close(item, twin)


def test_zero_is_not_the_number_on_the_device(device):
    """A learning rate that was a tensor there, and is now the Python number 0."""
    kept = ItemList([copied(made(ADAM, (64,)), device)])
    selective_step(kept, backend="gpu", rule=ADAM, selection=Selection("agreement"), strength=Strength("fixed"),
                   draw=Draw(0, 0))  # fmt: skip
    groups = kept.cache["plan"].batches[0].groups
    (row,) = groups.uploads.uploaded["hyper"]
    groups.uploads.uploaded["hyper"] = [[None if i == 0 else v for i, v in enumerate(row)]]  # as a tensor leaves it
    groups._sources = [None]
    before = kept[0].param.clone()
    selective_step(kept, backend="gpu", rule=replace(ADAM, lr=0.0), selection=Selection("agreement"),
                   strength=Strength("fixed"), draw=Draw(0, 1))  # fmt: skip
    assert torch.equal(kept[0].param, before)


def test_refresh_knows_the_last_rule_and_only_its_kind(device):
    kept = ItemList([copied(made(ADAM, (64,)), device)])
    how = {"selection": Selection("top_k", fraction=0.25), "strength": Strength("fixed", 2.0, 0.5), "draw": Draw(0, 0)}
    selective_step(kept, rule=ADAM, backend="gpu", **how)
    selective_step(kept, rule=replace(ADAM, lr=5e-3), backend="gpu", **how)
    (batch,) = kept.cache["plan"].batches
    hyper, ranks = batch.groups.hyper[0], batch.tables.ranks
    kept.cache["upload_hyperparameters"](Selection("agreement"), Strength("fixed", 7.0, 0.5))
    assert 7.0 not in hyper
    kept.cache["upload_hyperparameters"](Selection("top_k", fraction=0.5), Strength("fixed", 7.0, 0.5))
    assert float(hyper[0]) == 5e-3
    assert 7.0 in hyper
    assert 32 in ranks


def test_a_buffer_that_was_set_to_none(device):
    rule = SGDRule(lr=0.1, momentum=0.9)
    item = made(rule, (8,), seed=1)
    twin, item = copied(item, "cpu"), copied(item, device)
    kept, fresh = ItemList([item]), [twin]
    both(kept, fresh, rule=rule)
    for i in (item, twin):
        i.state["momentum_buffer"] = None
    both(kept, fresh, rule=rule)
    close(item, twin)


def test_state_of_another_dtype_at_the_same_address(device):
    item = copied(made(ADAM, (64,)), device)
    kept = ItemList([item])
    both(kept, [])
    item.state["exp_avg"] = item.state["exp_avg"].view(torch.bfloat16)[:64]
    twin = copied(item, "cpu")
    both(kept, [twin])
    close(item, twin)


def test_a_clock_of_another_device_is_not_read(device):
    item = copied(made(ADAM, (64,)), device)
    twin = copied(item, "cpu")
    clock = torch.zeros(2, dtype=torch.int64, device="meta")
    both([item], [twin], selection=Selection("bernoulli"), draw=Draw(7, 3, clock=clock))
    close(item, twin)


def test_a_group_may_name_a_control():
    p = torch.nn.Parameter(torch.ones(4))
    groups = [{"params": [p], "policy": RandomMask.matching(MGUP())}]
    assert "MGUP" in SelectiveUpdate(torch.optim.AdamW(groups)).explain()
