"""Compiled models, and schedules of torch and transformers around them, against the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stack_loops import CASES, assert_same, batch, by_hand, differences, net, plain, train, wrap
from torch.optim import lr_scheduler as rates

from selective import MGUP, ChainedOptimizer, SelectiveUpdate, Soap

BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def _forget_compiled() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_trains_as_the_plain_one_and_resumes(case: str, backend: str) -> None:
    model = net()
    compiled: Any = torch.compile(model, backend=backend)
    optimizer = wrap(compiled, case)
    train(compiled, optimizer, range(3))
    saved = {"model": compiled.state_dict(), "optimizer": optimizer.state_dict()}  # not stepped until they are loaded
    resumed: Any = torch.compile(net(1), backend=backend)
    resumed.load_state_dict(saved["model"])
    again = wrap(resumed, case)
    again.load_state_dict({**saved["optimizer"], "state": cloned(saved["optimizer"]["state"])})
    for one, its in ((compiled, optimizer), (resumed, again)):
        train(one, its, range(3, 6))
    assert_same((model, optimizer), by_hand(case, 6))
    assert_same((resumed._orig_mod, again), (model, optimizer))


def cloned(state: Any) -> Any:
    return {index: {key: value.clone() for key, value in entry.items()} for index, entry in state.items()}


@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_a_compiled_train_step(case: str) -> None:
    """Forward and backward in one compiled function, the step outside of it."""
    model = net()
    optimizer = wrap(model, case)

    @torch.compile(backend="eager")
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(x), y)

    for step in range(4):
        forward(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same((model, optimizer), by_hand(case, 4))


def _transformers(name: str) -> Callable[[Any], Any]:
    def make(optimizer: Any) -> Any:
        transformers = pytest.importorskip("transformers")
        return transformers.get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=8)

    return make


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda o: rates.LinearLR(o, 0.1, total_iters=4),
    "cosine-restarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: rates.LambdaLR(o, lambda step: 1 / (1 + step)),
    "chained": lambda o: rates.ChainedScheduler([rates.ConstantLR(o, 0.5, 2), rates.ExponentialLR(o, 0.9)]),
    "one-cycle": lambda o: rates.OneCycleLR(o, 0.02, total_steps=10),  # moves beta1 as well
    "transformers-linear": _transformers("linear"),
    "transformers-cosine": _transformers("cosine"),
    "transformers-inverse-sqrt": _transformers("inverse_sqrt"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_a_schedule_moves_the_base_and_resumes(case: str, name: str) -> None:
    model, twin = net(), net(1)
    optimizer, resumed = wrap(model, case), wrap(twin, case)
    schedule, again = SCHEDULES[name](optimizer), SCHEDULES[name](resumed)
    alone = torch.optim.AdamW(net().parameters(), lr=0.01)
    expected = SCHEDULES[name](alone)
    for step in range(4):
        train(model, optimizer, [step], schedule=schedule)
        alone.step()
        expected.step()
        assert optimizer.base.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
        assert optimizer.base.param_groups[0]["betas"] == alone.param_groups[0]["betas"]
    twin.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    resumed.load_state_dict({**saved, "state": cloned(saved["state"])})
    again.load_state_dict(schedule.state_dict())
    train(model, optimizer, range(4, 7), schedule=schedule)
    train(twin, resumed, range(4, 7), schedule=again)
    assert_same((twin, plain(resumed)), (model, optimizer))
    assert differences((model, optimizer), by_hand(case, 7))  # the schedule had an effect


SAYS_SO = pytest.mark.filterwarnings("ignore:SelectiveUpdate. step.. runs outside of the graphs:UserWarning")


@SAYS_SO
@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_a_compiled_step_runs_outside_of_the_graphs(case: str) -> None:
    model, graphs = net(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    optimizer = wrap(model, case)
    step: Any = torch.compile(optimizer.step, backend=backend)
    for number in range(3):
        torch.nn.functional.mse_loss(model(batch(number)[0]), batch(number)[1]).backward()
        step()
        optimizer.zero_grad()
    assert_same((model, optimizer), by_hand(case, 3))
    assert graphs == []
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))  # the failing twin
    assert len(graphs) == 1


def test_a_compiled_step_says_so() -> None:
    model = net()
    optimizer = wrap(model, "mgup")
    torch.nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.warns(UserWarning, match=r"step\(\) runs outside of the graphs of torch\.compile.*leave the step out"):
        torch.compile(optimizer.step, backend="eager")()


@SAYS_SO
def test_a_whole_train_step_may_be_compiled() -> None:
    model = net()
    optimizer = wrap(model, "mgup")

    @torch.compile(backend="eager")
    def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(model(x), y)
        value = loss.detach()  # torch looks up the `grad` of a loss that is returned, and warns of itself
        loss.backward()
        optimizer.step()
        return value

    for number in range(3):
        train_step(*batch(number))
        optimizer.zero_grad()
    assert_same((model, optimizer), by_hand("mgup", 3))


def _with_rate(params: Any) -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW(params, lr=torch.tensor(0.01)), policy=MGUP())


def _rotated(params: Any) -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW(params, lr=0.01), policy=MGUP(), preconditioner=Soap())


def _chained(params: Any) -> ChainedOptimizer:
    first, *rest = params
    return ChainedOptimizer([_with_rate([first]), torch.optim.SGD(rest, lr=0.1)])


WRAPPED: dict[str, Callable[[Any], Any]] = {"rate-tensor": _with_rate, "rotated": _rotated, "chained": _chained}


def _closure(model: Any, optimizer: Any, number: int) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(batch(number)[0]), batch(number)[1])
        value = loss.detach()  # torch looks up the `grad` of a loss that is returned, and warns of itself
        loss.backward()
        return value

    return closure


# Inductor imports a part of torch that calls what torch has deprecated.
INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")]


@SAYS_SO
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_a_compiled_step_with_a_closure_is_the_step(make: Callable[[Any], Any], backend: str) -> None:
    """Compiled by itself, and inside of a function."""
    models = [net() for _ in range(3)]
    eager, alone, inside = (make(list(model.parameters())) for model in models)
    step: Any = torch.compile(alone.step, backend=backend)

    @torch.compile(backend=backend)
    def whole(closure: Callable[[], torch.Tensor]) -> Any:
        return inside.step(closure)

    for number in range(2):
        calls = zip((eager.step, step, whole), models, (eager, alone, inside), strict=True)
        first, *others = [call(_closure(model, optimizer, number)) for call, model, optimizer in calls]
        assert all(torch.equal(loss, first) for loss in others)
    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a function"])
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_one_full_graph_is_refused_with_the_reason(make: Callable[[Any], Any], inside: bool) -> None:
    model = net()
    optimizer = make(list(model.parameters()))
    torch.nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    before = [p.detach().clone() for p in model.parameters()]

    def train() -> None:
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(Exception, match="compile the model, or forward and backward, and leave the step out"):
        torch.compile(train if inside else optimizer.step, backend="eager", fullgraph=True)()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
