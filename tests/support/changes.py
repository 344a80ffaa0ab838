"""An optimizer with two groups, and all changes that somebody may make to it between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from selective import MGUP, CautiousDecay, Magma, RandomMask, SelectiveUpdate

Params = list[torch.nn.Parameter]
SHAPES = ((4, 3), (5,), (2, 2, 2), ())


def numbers(shape: Any, seed: int, like: torch.Tensor | None = None) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values if like is None else values.to(like.dtype)


def build(policy: Any = None) -> SelectiveUpdate:
    params = [torch.nn.Parameter(numbers(shape, i)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    return SelectiveUpdate(torch.optim.AdamW(groups, lr=0.1), policy=policy or Magma())


def members(optimizer: SelectiveUpdate) -> Params:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: SelectiveUpdate, number: int) -> None:
    for index, p in enumerate(members(optimizer)):
        p.grad = numbers(p.shape, 100 * number + index, p)
    optimizer.step()


def other_state(optimizer: SelectiveUpdate) -> None:
    for p in members(optimizer):
        entries = optimizer.base.state[p]
        optimizer.base.state[p] = {**entries, "exp_avg": torch.ones_like(entries["exp_avg"])}


def other_checkpoint(optimizer: SelectiveUpdate) -> None:
    other = build()
    step(other, 50)
    optimizer.load_state_dict(other.state_dict())


def base_checkpoint(optimizer: SelectiveUpdate) -> None:
    other = build()
    step(other, 50)
    optimizer.base.load_state_dict(other.base.state_dict())


def no_state(optimizer: SelectiveUpdate) -> None:
    optimizer.base.state[members(optimizer)[0]].clear()


def deleted_state(optimizer: SelectiveUpdate) -> None:
    del optimizer.base.state[members(optimizer)[1]]


def state_in_another_order(optimizer: SelectiveUpdate) -> None:
    table = optimizer.base.state
    swapped = {p: table[p] for p in reversed(list(table))}
    first, last = members(optimizer)[0], members(optimizer)[2]
    swapped[first] = {**swapped[first], "exp_avg": swapped[first]["exp_avg"] * -1.0}
    swapped[last].update(exp_avg=torch.ones_like(last))
    table.clear()
    table.update(swapped)


def state_is_another_table(optimizer: SelectiveUpdate) -> None:
    optimizer.base.state = {p: {**entries, "step": entries["step"] + 5} for p, entries in optimizer.base.state.items()}  # type: ignore[assignment]


def other_policy(optimizer: SelectiveUpdate) -> None:
    optimizer.policy_groups[0].policy = RandomMask()


def fresh_average(optimizer: SelectiveUpdate) -> None:
    optimizer.policy_groups[0].policy = MGUP()
    step(optimizer, 20)
    optimizer.policy_groups[0].policy = Magma()  # whose average starts anew


def hyper_parameter(optimizer: SelectiveUpdate) -> None:
    optimizer.policy_groups[1]["smoothing"] = 0.2


def new_group(optimizer: SelectiveUpdate) -> None:
    optimizer.base.add_param_group({"params": [torch.nn.Parameter(numbers(7, 7))]})


def fewer_parameters(optimizer: SelectiveUpdate) -> None:
    del optimizer.param_groups[0]["params"][0]  # the addresses of all others change


def removed_group(optimizer: SelectiveUpdate) -> None:
    del optimizer.param_groups[0], optimizer.policy_groups[0]


def other_parameter(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(numbers(5, 9))


def other_order(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0]["params"].reverse()


def other_data(optimizer: SelectiveUpdate) -> None:
    for p in members(optimizer):
        p.data = numbers(p.shape, 10)


def other_shape(optimizer: SelectiveUpdate) -> None:
    p = members(optimizer)[0]
    p.grad = None
    p.data = numbers((6, 2, 1), 10)
    optimizer.base.state[p].clear()


def other_dtype(optimizer: SelectiveUpdate) -> None:
    for p in members(optimizer):
        p.grad = None
        p.data = p.data.bfloat16()


def swapped_tensors(optimizer: SelectiveUpdate) -> None:
    p = members(optimizer)[0]
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(numbers(p.shape, 11)))


def other_shape_in_the_same_memory(optimizer: SelectiveUpdate) -> None:
    p = members(optimizer)[0]
    p.grad = None
    p.data = p.data.view(6, 2)
    optimizer.base.state[p].clear()


def other_group_object(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.02}


def betas_in_place(optimizer: SelectiveUpdate) -> None:
    betas = [0.8, 0.9]
    optimizer.param_groups[0]["betas"] = betas
    step(optimizer, 40)
    betas[0] = 0.3


def decay_begins(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


def selective_decay(optimizer: SelectiveUpdate) -> None:
    optimizer.decay_groups[1].decay = CautiousDecay()


def other_names(optimizer: SelectiveUpdate) -> None:
    for number, group in enumerate(optimizer.param_groups):
        group["param_names"] = [f"{number}.{i}" for i in range(len(group["params"]))]


def a_flag(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0]["maximize"] = True


def missing_gradients(optimizer: SelectiveUpdate) -> None:
    for missing in (0, 0, 1, 2):
        for index, p in enumerate(members(optimizer)):
            p.grad = None if index == missing else numbers(p.shape, 30 + index)
        optimizer.step()


def a_hook(optimizer: SelectiveUpdate) -> None:
    def hook(base: Any, args: Any, kwargs: Any) -> None:
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = p.grad * -2.0

    optimizer.base.register_step_pre_hook(hook)


def a_hook_that_replaces_state(optimizer: SelectiveUpdate) -> None:
    def hook(base: Any, args: Any, kwargs: Any) -> None:
        for p, entries in base.state.items():
            base.state[p] = {**entries, "exp_avg": torch.ones_like(p)}

    optimizer.base.register_step_pre_hook(hook)


CHANGES: list[Callable[[SelectiveUpdate], None]] = [
    other_state, other_checkpoint, base_checkpoint, no_state, other_policy, fresh_average, hyper_parameter, new_group,
    fewer_parameters, removed_group, other_parameter, other_order, other_data, other_shape, other_dtype,
    swapped_tensors, a_flag, missing_gradients, a_hook, deleted_state, state_in_another_order, state_is_another_table,
    other_shape_in_the_same_memory, other_group_object, betas_in_place, decay_begins, selective_decay, other_names,
    a_hook_that_replaces_state,
]  # fmt: skip
