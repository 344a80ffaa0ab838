"""Random programs: whatever is wrapped and whatever is done with it in whichever order, the promises hold."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from programs import NOT_COPIED, Made, Running, added, beginnings, give, params_of, programs, switched
from whole_bytes import bytes_of, difference, model_bytes

from selective import Dense, Fixed, Policy, RandomMask, SelectiveUpdate, Soap, TopK

SEEN = {"programs": 0, "steps": 0, "twins": 0, "plain": 0, "top-k": 0}


def globals_of_torch() -> Any:
    return (
        bytes_of(torch.get_rng_state()), random.getstate(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


class Program:
    """Runs the operations on the optimizer, its twins that were loaded or copied on the way, and a plain base."""

    def __init__(self, made: Made) -> None:
        self.made, self.steps = made, 0
        self.all = [Running(made, made.make())]
        dense = all(isinstance(policy, Dense) for policy in made.policies) and made.preconditioner is None
        rounded = made.options.get("stochastic_rounding", False)
        self.plain = made.plain() if dense and not rounded else None

    def do(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    def step(self, missing: int) -> None:
        for one in self.all:
            before = [(p.data_ptr(), bytes_of(p)) for p in params_of(one.optimizer)]
            give(one.optimizer, self.steps, missing)
            one.optimizer.step()
            self.check(one.optimizer, before)
        if self.plain is not None:
            give(self.plain, self.steps, missing)
            self.plain.step()
        self.steps += 1
        self.compare()

    def check(self, optimizer: SelectiveUpdate, before: list[Any]) -> None:
        for p, (address, old) in zip(params_of(optimizer), before, strict=True):
            assert p.data_ptr() == address
            assert p.grad is not None or bytes_of(p) == old, "moved without a gradient"
            assert bool(p.isfinite().all()), "not finite"
            assert not any(str(key).startswith("selective") for key in optimizer.base.state.get(p, {}))
        if self.made.options["statistics"]:
            self.check_top_k(optimizer)

    def check_top_k(self, optimizer: SelectiveUpdate) -> None:
        """K = int(fraction · n) coordinates of every tensor that stepped, to the element, where K is not 0."""
        found = optimizer.statistics()
        for number, (group, policy) in enumerate(zip(optimizer.param_groups, optimizer.policy_groups, strict=True)):
            selection = (policy.policy.parts() or (None,))[0]
            if not isinstance(selection, TopK) or selection.quantile != "exact":
                continue
            for index, p in enumerate(group["params"]):
                count, name = int(selection.fraction * p.numel()), f"param_groups[{number}][{index}]"
                if p.grad is not None and count and "share" in found[name]:  # Soap's first step only observes
                    assert round(found[name]["share"].item() * p.numel()) == count, name
                    SEEN["top-k"] += 1

    def compare(self) -> None:
        first, *others = (one.optimizer for one in self.all)
        for other in others:
            assert model_bytes(other) == model_bytes(first), "a copy went another way"
        if self.plain is not None:
            assert model_bytes(first) == model_bytes(self.plain), "Dense() is not the base"  # type: ignore[arg-type]

    def reload(self) -> None:
        self.join(self.all[-1].reloaded())

    def copy(self, way: str) -> None:
        if self.made.base in NOT_COPIED:
            return
        self.join(self.all[-1].copied(way))

    def join(self, twin: Running) -> None:
        """The twin goes on beside the original; its state is the same, to the byte."""
        ours, theirs = (bytes_of(one.optimizer.state_dict()) for one in (self.all[-1], twin))
        assert difference(ours, theirs) is None
        self.all = [*self.all[:1], twin]
        SEEN["twins"] += 1

    def add(self, shape: tuple[int, ...], policy: Any) -> None:
        if len(self.all[0].optimizer.param_groups) < 4 and self.takes(policy):
            for one in self.all:
                one.restructure(added(shape, self.made.dtypes[0], policy))
            self.plain = None

    def switch(self, number: int, policy: Any) -> None:
        low = any(dtype in (torch.bfloat16, torch.float16) for dtype in self.made.dtypes)
        if self.takes(policy) and not (low and isinstance(policy, Dense)):  # see the test at the end
            for one in self.all:
                one.restructure(switched(number, policy))
            self.plain = None

    def takes(self, policy: Any) -> bool:
        """Not one that reads a momentum, where there is no `momentum_beta`: the base may have none.

        Nor any where all groups were dense until now: nothing of ours was saved then, the count of steps neither.
        """
        if not self.all[0].optimizer._own and len(self.all) > 1:
            return False
        return not policy.needs() & {"momentum", "previous_momentum"} or "momentum_beta" in self.made.options

    def edit(self, factor: float) -> None:
        for one in self.optimizers():
            for group in one.param_groups:
                group["lr"] = group["lr"] * factor

    def schedule(self) -> None:
        for one in self.optimizers():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
                torch.optim.lr_scheduler.ExponentialLR(one, 0.9).step()

    def zero_grad(self, to_none: bool) -> None:
        for one in self.optimizers():
            one.zero_grad(set_to_none=to_none)

    def read(self) -> None:
        """What only looks changes nothing: the comparison with twins and base goes on."""
        optimizer = self.all[0].optimizer
        optimizer.explain()
        optimizer.state_dict()
        repr(optimizer), repr(optimizer.state)
        if self.made.options["statistics"]:
            optimizer.statistics()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [*(one.optimizer for one in self.all), *([] if self.plain is None else [self.plain])]


def run(made: Made, program: list[Any]) -> None:
    before = globals_of_torch()
    running = Program(made)
    for name, *arguments in program:
        running.do(name, *arguments)
    running.do("reload")
    running.do("copy", "pickle")
    for _ in range(2):
        running.do("step", 0)
    assert globals_of_torch() == before, "a global generator or flag was moved"
    SEEN["programs"] += 1
    SEEN["steps"] += running.steps
    SEEN["plain"] += running.plain is not None


NO_DEADLINE = [HealthCheck.too_slow, HealthCheck.data_too_large]


@given(made=beginnings(), program=programs)
@settings(max_examples=100, suppress_health_check=NO_DEADLINE)
def test_programs(made: Made, program: list[Any]) -> None:
    run(made, program)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(made=beginnings(), program=programs)
@settings(max_examples=2500, suppress_health_check=NO_DEADLINE)
def test_programs_at_length(made: Made, program: list[Any]) -> None:
    run(made, program)


def test_programs_reach_what_they_are_for() -> None:
    """Twins and top-K are compared indeed."""
    made = Made(
        [(4, 3), (6,)], [torch.float32] * 2, [True, False], "adamw",
        [RandomMask(), Policy(selection=TopK(), strength=Fixed())], 1,
        Soap(refresh_every=2), {"statistics": True, "seed": 7},
    )  # fmt: skip
    program: list[Any] = [("step", 0), ("step", 2), ("reload",), ("schedule",), ("step", 0), ("copy", "deepcopy")]
    before = dict(SEEN)
    run(made, program)
    assert SEEN["twins"] == before["twins"] + 4
    assert SEEN["top-k"] > before["top-k"]


def forgets_the_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("selective.checkpoint.check_entries", lambda ours, order: {})


def forgets_the_basis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("selective.checkpoint.own_tensors", lambda entries, p: {})


def moves_all(patch: pytest.MonkeyPatch) -> None:
    step = SelectiveUpdate.step

    def moved(self: SelectiveUpdate, closure: Any = None) -> Any:
        with torch.no_grad():
            params_of(self)[-1].add_(1e-3)
        return step(self, closure)

    patch.setattr(SelectiveUpdate, "step", moved)


def draws_globally(patch: pytest.MonkeyPatch) -> None:
    explain = SelectiveUpdate.explain
    patch.setattr(SelectiveUpdate, "explain", lambda self: f"{explain(self)}{torch.rand(1)}")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (forgets_the_step, "step"),
        (forgets_the_basis, "selective"),
        (moves_all, "moved without a gradient"),
        (draws_globally, "global generator"),
    ],
)
def test_what_breaks_a_promise_is_noticed(spoil: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(
        [(4, 3), (6,)], [torch.float32] * 2, [True, False], "adamw", [RandomMask(), Dense()], 1,
        Soap(refresh_every=2), {"statistics": True, "seed": 7},
    )  # fmt: skip
    state = torch.get_rng_state()
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        run(made, [("step", 0), ("step", 2), ("reload",), ("read",), ("step", 0)])
    torch.set_rng_state(state)


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="delta capture has made the base's state float32")
@pytest.mark.parametrize("base", ["adamw", "adafactor", "optimi-adamw"])
def test_from_a_mask_to_dense_in_low_precision(base: str) -> None:
    """Known, and found by these programs: the plain base does not step a bfloat16 parameter on float32 state."""
    options = {"momentum_beta": 0.9, "capture": "delta"}
    made = Made([(4, 3)], [torch.bfloat16], [False], base, [RandomMask(), Dense()], 1, None, options)
    optimizer = made.make()
    for step in range(2):
        give(optimizer, step, 0)
        optimizer.step()
        optimizer.policy_groups[0].policy = Dense()
