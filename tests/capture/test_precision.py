"""Low precision and a capture that changes: the state of the base is what it makes of what it steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import optimi
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from whole_bytes import through_a_file

from selective import Dense, Policy, RandomMask, SelectiveUpdate, Soap, base_part

t = torch.optim
LOW = [torch.bfloat16, torch.float16]
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda params: t.AdamW(params, lr=1e-2, eps=1e-4, weight_decay=0.1),
    "adamw-amsgrad": lambda params: t.AdamW(params, lr=1e-2, eps=1e-4, amsgrad=True, foreach=False),
    "adafactor": lambda params: t.Adafactor(params, lr=1e-2),  # its factors are not shaped like the parameter
    "adagrad": lambda params: t.Adagrad(params, lr=1e-2),  # its state is there before the first step
    "nadam": lambda params: t.NAdam(params, lr=1e-2, eps=1e-4),  # has a product of its own, float32 in any case
    "sgd": lambda params: t.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
}


class Wide(Optimizer):
    """Keeps a float32 moment of any parameter, as many do; its update looks at the parameter."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            moment = self.state[p].setdefault("moment", torch.zeros_like(p, dtype=torch.float32))
            moment.lerp_(p.grad.float(), 0.1)
            p.sub_(self.param_groups[0]["lr"] * moment * p.float().norm())


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (6,))]


def wrapped(base: Callable[[Any], Optimizer], dtype: torch.dtype, **options: Any) -> SelectiveUpdate:
    options = {"policy": RandomMask(), "capture": "delta", **options}
    return SelectiveUpdate(base(parameters(dtype)), **options)


def params_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Any, steps: Iterable[int]) -> Any:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return optimizer


def switch(optimizer: SelectiveUpdate, policy: Policy) -> SelectiveUpdate:
    optimizer.policy_groups[0].policy = policy
    return optimizer


def go_the_same_way(one: Optimizer, other: Optimizer) -> bool:
    return all(map(torch.equal, params_of(one), params_of(other)))


def take_over(source: Optimizer, target: Optimizer) -> None:
    with torch.no_grad():
        for p, value in zip(params_of(target), params_of(source), strict=True):
            p.copy_(value)


def dtypes(optimizer: Any, key: str) -> set[torch.dtype]:
    base: Optimizer = getattr(optimizer, "base", optimizer)
    return {entries[key].dtype for entries in base.state.values() if isinstance(entries.get(key), Tensor)}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_dense_goes_on_as_the_plain_base_does_that_loads_the_checkpoint(base: str, dtype: torch.dtype) -> None:
    optimizer = switch(train(wrapped(BASES[base], dtype), range(2)), Dense())
    plain = BASES[base](parameters(dtype))
    take_over(optimizer, plain)
    plain.load_state_dict(copy.deepcopy(base_part(optimizer.state_dict())))
    for step in range(2, 5):
        train(optimizer, [step]), train(plain, [step])
        assert go_the_same_way(optimizer, plain), step


@pytest.mark.parametrize("base", BASES)
def test_back_to_a_mask_and_through_checkpoints_at_every_step(base: str) -> None:
    """Each checkpoint, also one between a switch and the step that follows it, goes on as the run that wrote it."""
    optimizer = wrapped(BASES[base], torch.bfloat16)
    for step in range(8):
        if step in (2, 6):
            switch(optimizer, Dense())
        if step == 4:
            switch(optimizer, RandomMask())
        state = through_a_file(optimizer.state_dict())
        other = switch(wrapped(BASES[base], torch.bfloat16), optimizer.policy_groups[0].policy)
        take_over(optimizer, other)
        other.load_state_dict(state)
        train(optimizer, [step]), train(other, [step])
        assert go_the_same_way(optimizer, other), step


def test_the_precision_by_capture() -> None:
    """Of a matrix's factors, which are not shaped like it, and of a vector's moment."""
    optimizer = wrapped(BASES["adafactor"], torch.bfloat16)
    for step, policy in enumerate([RandomMask(), Dense(), RandomMask()]):
        train(switch(optimizer, policy), [step])
        wanted = torch.bfloat16 if isinstance(policy, Dense) else torch.float32
        assert dtypes(optimizer, "row_var") == dtypes(optimizer, "col_var") == dtypes(optimizer, "variance") == {wanted}
        assert dtypes(optimizer, "step") == {torch.float32}


def test_looking_changes_nothing() -> None:
    """A switch that is taken back before a step has not cost the state its precision, whatever was read meanwhile."""
    optimizer, twin = (train(wrapped(BASES["adamw"], torch.bfloat16), range(2)) for _ in range(2))
    switch(optimizer, Dense())
    optimizer.explain(), optimizer.state_dict(), dict(optimizer.state)
    switch(optimizer, RandomMask())
    assert dtypes(optimizer, "exp_avg") == {torch.float32}
    train(optimizer, range(2, 4)), train(twin, range(2, 4))
    assert go_the_same_way(optimizer, twin)


@pytest.mark.parametrize("policy", [Dense(), RandomMask()], ids=str)
def test_a_checkpoint_of_a_float32_copy_in_another_capture(policy: Policy) -> None:
    """Dense, and scratch (NAdam has no fused rule): the base's part of delta's checkpoint is stepped by the base."""
    state = base_part(train(wrapped(BASES["nadam"], torch.bfloat16), range(2)).state_dict())
    optimizer = wrapped(BASES["nadam"], torch.bfloat16, policy=policy, capture="auto")
    optimizer.load_state_dict(state)
    assert dtypes(optimizer, "exp_avg") == {torch.float32}
    train(optimizer, range(2, 4))
    assert dtypes(optimizer, "exp_avg") == {torch.bfloat16}


def test_a_base_that_was_stepped_on_copies_is_wrapped_again() -> None:
    base = train(wrapped(BASES["adamw"], torch.bfloat16), range(2)).base
    train(SelectiveUpdate(base, policy=Dense()), [2])
    assert dtypes(base, "exp_avg") == {torch.bfloat16}


def test_rotated_parameters_have_the_precision_of_their_own_capture() -> None:
    """Dense, and yet the matrix goes on under delta capture, because its update has to be rotated back."""
    optimizer = train(wrapped(BASES["adamw"], torch.bfloat16, preconditioner=Soap()), range(3))
    train(switch(optimizer, Dense()), range(3, 5))
    found = [optimizer.base.state[p]["exp_avg"].dtype for p in params_of(optimizer)]
    assert found == [torch.float32, torch.bfloat16]


def test_what_a_base_keeps_in_float32_by_itself_stays() -> None:
    """Precision is not guessed from the parameter's: the moments are the same tensors before and after."""
    optimizer = train(wrapped(Wide, torch.bfloat16), range(2))
    plain = Wide(parameters(torch.bfloat16))
    take_over(optimizer, plain)
    for p, q in zip(params_of(optimizer), params_of(plain), strict=True):
        plain.state[q]["moment"] = optimizer.base.state[p]["moment"].clone()
    before = [entries["moment"] for entries in optimizer.base.state.values()]
    train(switch(optimizer, Dense()), range(2, 4)), train(plain, range(2, 4))
    assert all(entries["moment"] is one for entries, one in zip(optimizer.base.state.values(), before, strict=True))
    assert go_the_same_way(optimizer, plain)


def test_a_base_that_keeps_the_rounding_residue_keeps_it_again() -> None:
    optimizer = train(wrapped(lambda params: optimi.AdamW(params, lr=1e-4), torch.bfloat16), range(2))
    assert dtypes(optimizer, "kahan_comp") == set()
    plain = optimi.AdamW(parameters(torch.bfloat16), lr=1e-4)
    take_over(optimizer, plain)
    plain.load_state_dict(copy.deepcopy(base_part(optimizer.state_dict())))
    plain.param_groups[0]["kahan_sum"] = True  # as it would be, had the base made its state of these parameters
    for p in params_of(plain):
        plain.state[p]["kahan_comp"] = torch.zeros_like(p)
    train(switch(optimizer, Dense()), range(2, 5)), train(plain, range(2, 5))
    assert go_the_same_way(optimizer, plain)
    kept = [entries["kahan_comp"] for entries in optimizer.base.state.values()]
    assert all(bool(one.any()) for one in kept), "nothing was kept of what rounding took"
    train(switch(optimizer, RandomMask()), range(5, 7))
    assert dtypes(optimizer, "kahan_comp") == set()


def test_without_it_the_base_refuses_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing twin: why all of this is there."""
    monkeypatch.setattr("selective.step.run.fit_states", lambda *arguments: False)
    optimizer = switch(train(wrapped(BASES["adamw"], torch.bfloat16), range(2)), Dense())
    with pytest.raises(RuntimeError, match="dtype"):
        train(optimizer, [2])
