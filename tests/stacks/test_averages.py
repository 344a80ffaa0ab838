"""`torch.optim.swa_utils`: averages of the weights, `SWALR`, batch statistics, and a resume of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_loops import BATCH, CASES, assert_same, by_hand, data, differences, loss_of, net, wrap
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader

AVERAGES: dict[str, Any] = {
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "swa": lambda model: AveragedModel(model),
}
START = 3  # the first step that is averaged, and the first with SWALR's rate


class Run:
    def __init__(self, case: str, kind: str) -> None:
        self.model = net()
        self.average = AVERAGES[kind](self.model)
        self.optimizer = wrap(self.model, case)
        self.rates = SWALR(self.optimizer, swa_lr=0.002, anneal_epochs=2)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            loss_of(self.model, step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step >= START:
                self.average.update_parameters(self.model)
                self.rates.step()

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer, "rates": self.rates}


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("case", CASES)
def test_averages_go_on_bit_for_bit(case: str, kind: str, tmp_path: Any) -> None:
    run = Run(case, kind)
    run.train(0, 5)
    torch.save({name: part.state_dict() for name, part in run.parts.items()}, tmp_path / "at-5.pt")
    run.train(5, 9)
    # torch 2.9 keeps SWALR's function in its state, by name
    with torch.serialization.safe_globals([getattr, SWALR]):
        saved = torch.load(tmp_path / "at-5.pt", weights_only=True)
    resumed = Run(case, kind)
    for name, part in resumed.parts.items():
        part.load_state_dict(saved[name])
    assert differences((resumed.average, resumed.optimizer), (run.average, run.optimizer))
    resumed.train(5, 9)
    assert_same((resumed.average, resumed.optimizer), (run.average, run.optimizer))
    assert_same((resumed.model, resumed.optimizer), (run.model, run.optimizer))


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_that_of_the_trajectory(case: str) -> None:
    run = Run(case, "swa")
    run.rates.step = lambda: None  # as the plain loop, which has no schedule
    for group in run.optimizer.param_groups:
        group["lr"] = 0.01
    run.train(0, 6)
    assert_same((run.model, run.optimizer), by_hand(case, 6))
    points = [dict(by_hand(case, steps)[0].named_parameters()) for steps in range(START + 1, 7)]
    for name, value in run.average.module.named_parameters():
        mean = torch.stack([point[name].detach().double() for point in points]).mean(0)
        # three running averages, each rounded about three times
        torch.testing.assert_close(value.detach().double(), mean, rtol=9 * 2**-24, atol=9 * 2**-24 * 1.0)


def test_swalr_reaches_the_base() -> None:
    run = Run("mgup", "swa")
    run.train(0, START + 4)
    assert run.optimizer.base.param_groups[0]["lr"] == pytest.approx(0.002)


@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_batch_statistics_of_the_average(case: str) -> None:
    """`update_bn` runs the averaged model over the data; the optimizer and the trained model stay as they are."""
    model = nn.Sequential(*net(), nn.BatchNorm1d(2))
    optimizer = wrap(model, case)
    average = AveragedModel(model)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    update_bn(DataLoader(data(), batch_size=BATCH), average)
    assert not torch.equal(average.module[3].running_mean, model[3].running_mean)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
