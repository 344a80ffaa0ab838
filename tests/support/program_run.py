"""Runs random programs, and checks an optimizer's promises after each of their steps."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from programs import NOT_COPIED, Made, Running, added, give, params_of, switched
from whole_bytes import bytes_of, difference, model_bytes

from selective import Dense, SelectiveUpdate, TopK

SEEN = {"programs": 0, "steps": 0, "twins": 0, "plain": 0, "top-k": 0}


def globals_of_torch() -> Any:
    return (
        bytes_of(torch.get_rng_state()), random.getstate(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


class Program:
    """Runs the operations on the optimizer, on twins that were loaded or copied meanwhile, and on a plain base."""

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
        """Require exactly K = int(fraction · n) selected coordinates of every tensor that stepped, if K is not 0."""
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
        """Let the twin go on beside the original. Its state must be the same, to the byte."""
        ours, theirs = (bytes_of(one.optimizer.state_dict()) for one in (self.all[-1], twin))
        found = difference(ours, theirs)
        assert found is None, found
        self.all = [*self.all[:1], twin]
        SEEN["twins"] += 1

    def add(self, shape: tuple[int, ...], policy: Any) -> None:
        if len(self.all[0].optimizer.param_groups) < 4 and self.takes(policy):
            for one in self.all:
                one.restructure(added(shape, self.made.dtypes[0], policy))
            self.plain = None

    def switch(self, number: int, policy: Any) -> None:
        if self.takes(policy):
            for one in self.all:
                one.restructure(switched(number, policy))
            self.plain = None

    def takes(self, policy: Any) -> bool:
        """True if the policy can be set now.

        It can't if it reads a momentum without `momentum_beta`, because the base may have none; nor if all groups were
        dense until now, because then nothing of ours was saved, not even the count of steps.
        """
        if not self.all[0].optimizer.store.table and len(self.all) > 1:
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
        """Read what can be read. That changes nothing: the comparison with twins and base goes on."""
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
