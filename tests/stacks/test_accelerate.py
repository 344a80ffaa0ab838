"""accelerate: `prepare`, gradient accumulation, clipping, save_state and load_state, against the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stack_loops import BATCH, CASES, assert_same, by_hand, data, differences, net, plain, wrap
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _forget() -> Any:
    """accelerate keeps one state a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """A run as a user of accelerate writes it. `schedule`: the learning rate falls by a tenth every step."""

    def __init__(self, case: str, accumulate: int = 1, schedule: bool = False) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = net()
        optimizer = wrap(model, case)
        loader = DataLoader(data(), batch_size=BATCH)
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if schedule else None
        prepared = self.accelerator.prepare(model, optimizer, loader, *([rates] if schedule else []))
        self.model, self.optimizer, self.loader = prepared[:3]
        self.schedule = prepared[3] if schedule else None

    def train(self, first: int, last: int, clip: float | None = None) -> None:
        """Batches first to last - 1."""
        for number, (x, y) in enumerate(self.loader):
            if not first <= number < last:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(torch.nn.functional.mse_loss(self.model(x), y))
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                if self.schedule is not None:
                    self.schedule.step()
                self.optimizer.zero_grad()

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.accelerator.unwrap_model(self.model), self.optimizer


@pytest.mark.parametrize("case", CASES)
def test_prepared_steps_are_those_of_the_plain_loop(case: str) -> None:
    run = Run(case)
    run.train(0, 6)
    assert plain(run.optimizer).count.steps == 6
    assert_same(run.pair, by_hand(case, 6))


@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_accumulation_with_clipping(case: str) -> None:
    run = Run(case, accumulate=2)
    run.train(0, 8, clip=0.1)
    assert_same(run.pair, by_hand(case, 4, accumulate=2, clip=0.1))
    assert differences(run.pair, by_hand(case, 4, accumulate=2))  # without clipping it is another run


@pytest.mark.parametrize("case", CASES)
def test_a_saved_state_goes_on_bit_for_bit(case: str, tmp_path: Path) -> None:
    run = Run(case, schedule=True)
    run.train(0, 3)
    run.accelerator.save_state(str(tmp_path / "at-3"))
    run.train(3, 7)
    resumed = Run(case, schedule=True)
    resumed.accelerator.load_state(str(tmp_path / "at-3"))
    resumed.train(3, 7)
    assert_same(resumed.pair, run.pair)
    cold = Run(case, schedule=True)
    cold.train(3, 7)
    assert differences(cold.pair, run.pair)


def test_a_prepared_schedule_moves_the_learning_rate_of_the_base() -> None:
    run = Run("mgup", schedule=True)
    run.train(0, 4)
    assert plain(run.optimizer).base.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**4)
