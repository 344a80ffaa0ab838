"""Callbacks that watch a run in Lightning and in Hugging Face's `Trainer`, which are imported when one is made."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from selective.watching import Sample, Watch, Writer, selective_inside, watch


def lightning_callback(*writers: Writer, every: int = 100, each: bool = False) -> Any:
    """A Lightning callback that watches every `SelectiveUpdate` of the run, in every `every`-th step.

    `writers` are those of `watch`. Without any, the trainer's loggers get "selective/share" and the like; with `each`,
    they get the numbers of every parameter, too. A run without a `SelectiveUpdate` raises TypeError when it starts.
    """
    # Both names of the package are in use, and each has classes of its own.
    name = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
    callback: Any = importlib.import_module(name).Callback

    class WatchSelection(callback):
        def __init__(self) -> None:
            self.watches: list[Watch] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def log(sample: Sample) -> None:
                metrics = {f"selective/{key}": value for key, value in sample.scalars(each).items()}
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=sample.step)

            wrapped = [optimizer for optimizer in trainer.optimizers if _is_selective(optimizer)]
            if not wrapped:
                kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
                raise TypeError(f"lightning_callback: no optimizer of this run is a SelectiveUpdate; found {kinds}")
            self.watches = [
                watch(optimizer, *(writers or (log,)), every=every, model=pl_module) for optimizer in wrapped
            ]

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._close()

        def _close(self) -> None:
            for watched in self.watches:
                watched.close()
            self.watches = []

    return WatchSelection()


def trainer_callback(*writers: Writer, every: int = 100, each: bool = False) -> Any:
    """A `transformers.TrainerCallback` that watches every `every`-th step of the run, on the process that logs.

    `writers` are those of `watch`. Without any, `trainer.state.log_history`, which the Trainer saves with its
    checkpoints, gets "selective/share" and the like; with `each`, it gets the numbers of every parameter, too.
    """
    callback: Any = importlib.import_module("transformers").TrainerCallback

    class WatchSelection(callback):
        def __init__(self) -> None:
            self.watched: Watch | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            def log(sample: Sample) -> None:
                metrics = {f"selective/{key}": value for key, value in sample.scalars(each).items()}
                state.log_history.append({"step": sample.step, **metrics})

            if state.is_world_process_zero:
                optimizer, model = found["optimizer"], found["model"]
                self.watched = watch(optimizer, *(writers or (log,)), every=every, model=model)

        def on_train_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            if self.watched is not None:
                self.watched.close()
            self.watched = None

    return WatchSelection()


def _is_selective(optimizer: Any) -> bool:
    try:
        selective_inside(optimizer)
    except TypeError:
        return False
    return True
