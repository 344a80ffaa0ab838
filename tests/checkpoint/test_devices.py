"""The devices of a checkpoint's entries: torch loads a full state dict only if those with dimensions share one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from selective import MGUP, Eigenbasis, SelectiveUpdate
from selective.checkpoint.save import placed


def test_entries_with_dimensions_go_to_the_parameters_device_and_numbers_stay() -> None:
    with FakeTensorMode():  # knows devices that this machine may not have
        param = torch.empty(3, 2, device="cuda")
        text, count = torch.zeros(512, dtype=torch.uint8, device="cpu"), torch.zeros((), device="cpu")
        found = placed({"text": text, "count": count}, param)
    assert {key: value.device.type for key, value in found.items()} == {"text": "cuda", "count": "cpu"}


def test_texts_of_parameters_without_data_stay_readable() -> None:
    text = torch.ones(512, dtype=torch.uint8)
    assert torch.equal(placed({"text": text}, torch.empty(3, 2, device="meta"))["text"], text)


@pytest.mark.gpu  # on a CPU nothing is on another device
def test_a_full_state_dict_goes_back_into_a_run_on_a_gpu() -> None:
    def run() -> tuple[torch.nn.Module, SelectiveUpdate]:
        module = torch.nn.Linear(6, 4, device="cuda")
        return module, SelectiveUpdate(torch.optim.AdamW(module.parameters()), MGUP(), preconditioner=Eigenbasis())

    full = StateDictOptions(full_state_dict=True)
    (module, optimizer), (fresh, loaded) = run(), run()
    module(torch.ones(2, 6, device="cuda")).sum().backward()
    optimizer.step()
    set_optimizer_state_dict(fresh, loaded, get_optimizer_state_dict(module, optimizer, options=full), options=full)
    mine, theirs = loaded.state_dict()["state"], optimizer.state_dict()["state"]
    for index, entries in theirs.items():
        assert {value.device.type for value in entries.values() if value.dim() > 0} == {"cuda"}
        assert all(torch.equal(mine[index][key].cpu(), value.cpu()) for key, value in entries.items())
