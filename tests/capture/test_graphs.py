"""Steps that are replayed as CUDA graphs, against steps whose launches are made one by one: the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graph_twins import BASES, DEVICE, REPLAYED, assert_equal_runs, assert_same, make_params, run, schedule, wrapped
from torch import nn
from torch.optim import AdamW, Muon

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousDecay,
    CautiousMGUP,
    Magma,
    RandomMask,
    SelectiveUpdate,
    Soap,
    watch,
)

pytestmark = pytest.mark.gpu

POLICIES = {
    "Cautious": Cautious(), "MGUP": MGUP(), "MGUP, sampled": MGUP(quantile="sampled"), "CautiousMGUP": CautiousMGUP(),
    "AlphaConsistency": AlphaConsistency(), "RandomMask": RandomMask(), "Magma": Magma(),
    "control of Cautious": RandomMask.matching(Cautious()), "control of MGUP": RandomMask.matching(MGUP()),
}  # fmt: skip


def nothing(params: Any, optimizer: SelectiveUpdate, number: int) -> None: ...


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str) -> None:
    assert_equal_runs(lambda graph: wrapped(policy=POLICIES[policy], seed=3, graph=graph))


@pytest.mark.parametrize("base", BASES)
def test_every_base(base: str) -> None:
    for policy in (MGUP(), Cautious()):
        assert_equal_runs(lambda graph, policy=policy: wrapped(base, policy, graph=graph))


def test_lion() -> None:
    optimizers = pytest.importorskip("pytorch_optimizer")

    def make(graph: Any) -> Any:
        params = make_params()
        return params, SelectiveUpdate(optimizers.Lion(params, lr=1e-3, weight_decay=0.1), policy="MGUP", graph=graph)

    assert_equal_runs(make)


@pytest.mark.parametrize("policy", [MGUP(), Cautious()], ids=repr)
def test_muon(policy: Any) -> None:
    """Its update is made by products before the launches that are replayed."""

    def make(graph: Any) -> Any:
        params = make_params(((64, 48), (48, 64), (64, 48)))
        return params, SelectiveUpdate(Muon(params, lr=1e-2, weight_decay=0.1), policy=policy, graph=graph)

    assert_equal_runs(make)


@pytest.mark.parametrize("way", ["scratch", "delta"])
@pytest.mark.parametrize("policy", [MGUP(), AlphaConsistency()], ids=repr)
def test_updates_that_the_base_has_made(policy: Any, way: str) -> None:
    """They lie at other addresses in every step."""
    assert_equal_runs(lambda graph: wrapped("AdamW, fused", policy, capture=way, graph=graph))


@pytest.mark.parametrize("policy", [MGUP(), Cautious()], ids=repr)
def test_rotated_parameters_between_refreshes(policy: Any) -> None:
    """The rule and the write to the parameters are replayed. Their buffers come from torch's allocator in each step."""
    from selective.kernels.gpu.graphs import BUDGET

    graphs: list[int] = []

    def make(graph: Any) -> Any:
        graphs.append(len(BUDGET))
        params = make_params(((64, 48), (48, 64), (64, 48), (130, 96)))
        base = AdamW(params, lr=1e-2)
        return params, SelectiveUpdate(base, policy, preconditioner=Soap(refresh_every=4), graph=graph)

    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        schedule(params, optimizer, number)
        if number == 10 and optimizer.options.graph == "auto":
            graphs.append(len(BUDGET))

    (ours, replayed, mine), (theirs, eager, their) = run(make, change, 13)
    assert graphs[1] >= graphs[0] + 2
    assert_same(ours, theirs)
    assert_same(mine, their)
    assert_same(replayed.state_dict(), eager.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_stochastic_rounding(dtype: torch.dtype) -> None:
    def make(graph: Any) -> Any:
        return wrapped("AdamW", MGUP(), make_params(dtype=dtype), stochastic_rounding=True, graph=graph)

    assert_equal_runs(make)


def test_selective_decay_and_no_statistics() -> None:
    assert_equal_runs(lambda graph: wrapped("AdamW", MGUP(), decay=CautiousDecay(), statistics=False, graph=graph))


@pytest.mark.parametrize("missing", [[1], [2, 3], [3]], ids=str)
def test_missing_gradients_that_come_and_go(missing: list[int]) -> None:
    """Those of a whole group as well: then each set of parameters has a plan, and a graph, of its own."""

    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        schedule(params, optimizer, number)
        if number % 2:
            for index in missing:
                params[index].grad = None

    assert_equal_runs(lambda graph: wrapped("AdamW", MGUP(), graph=graph), change, steps=15)


def test_gradients_of_other_strides_dtypes_and_alignment() -> None:
    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        grad = params[0].grad
        if number in (6, 7):
            params[0].grad = grad.t().contiguous().t()
        if number == 9:
            for p in params:
                memory = torch.empty(p.numel() + 1, device=p.device)
                memory[1:].copy_(p.grad.flatten())
                p.grad = memory[1:].view(p.shape)

    assert_equal_runs(lambda graph: wrapped("AdamW", MGUP(), graph=graph), change, steps=14)


def test_a_policy_of_another_kind_and_another_state() -> None:
    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        if number == 5:
            optimizer.policy_groups[0].policy = Cautious()
        if number == 9:
            state = optimizer.state[params[2]]
            state["exp_avg"] = state["exp_avg"] * 0.5
        if number == 11:
            params[3].data = params[3].data.clone()

    assert_equal_runs(lambda graph: wrapped("AdamW", MGUP(), graph=graph), change, steps=16)


def test_statistics_that_are_read_later_are_those_of_their_step() -> None:
    """`statistics()` of a step is not changed by the replays after it, and `watch` gets every step's own."""
    taken: list[Any] = []

    def make(graph: Any) -> Any:
        params, optimizer = wrapped("AdamW", MGUP(), graph=graph)
        samples: list[Any] = []
        taken.append((samples, [], watch(optimizer, samples.append, every=2)))
        return params, optimizer

    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        if number:
            taken[-1][1].append(optimizer.statistics())  # of the step before; compared at the end

    assert_equal_runs(make, change, steps=10)
    for _, _, watched in taken:
        watched.close()
    (our_samples, ours, _), (their_samples, theirs, _) = taken
    assert_same(ours, theirs)
    assert len(our_samples) == 5
    assert [(x.step, x.values) for x in our_samples] == [(x.step, x.values) for x in their_samples]
    assert len({str(sample.values) for sample in our_samples}) == 5


def trained(graph: Any, steps: int = 12) -> Any:
    """A small model under a loss scaler, with accumulation and clipping; one gradient is infinite on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 8)).to(DEVICE)
    optimizer = SelectiveUpdate(AdamW(model.parameters(), lr=1e-2), policy=MGUP(), graph=graph)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(2 * steps):
        data = torch.randn(16, 64, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        scaler.scale(model(data).square().mean()).backward()
        if number % 2 == 0:
            continue
        if number == 11:
            for grad in [p.grad for p in model.parameters() if p.grad is not None]:
                grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad(set_to_none=number % 3 == 0)
    return [*model.parameters()], optimizer


def test_loss_scaling_clipping_accumulation_and_a_scheduler() -> None:
    (ours, replayed), (theirs, eager) = trained("auto"), trained(False)
    assert REPLAYED in replayed.explain()
    assert_same(ours, theirs)
    assert_same(replayed.state_dict(), eager.state_dict())


@pytest.mark.parametrize("base", ["AdamW", "AdamW, capturable"])
def test_resuming_in_the_middle(base: str) -> None:
    """A checkpoint after replays is that of a run without; it is loaded into the same optimizer and into a new one."""
    checkpoints: list[Any] = []

    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        schedule(params, optimizer, number)
        if number == 6:
            checkpoints.append(copy.deepcopy(optimizer.state_dict()))
        if number == 8:
            optimizer.load_state_dict(copy.deepcopy(checkpoints[-1]))

    replayed = assert_equal_runs(lambda graph: wrapped(base, MGUP(), graph=graph), change, steps=14)
    assert_same(*checkpoints)
    _, other = wrapped(base, MGUP(), make_params(seed=1))
    other.load_state_dict(copy.deepcopy(replayed.state_dict()))
    assert_same(other.state_dict()["state"], replayed.state_dict()["state"])
