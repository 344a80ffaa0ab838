"""Row 16: the step inside of accelerate, Lightning and Hugging Face's `Trainer`, against the plain loop."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selective.testing.harness import Skipped, build, require_same_values, train, values
from selective.testing.report import stack_checks
from selective.testing.subject import Subject

_STEPS = 6
_OTHER_RUN = "the same script trains something else there, or does not start."


def _needed(*names: str) -> list[Any]:
    """Import the modules. Raises Skipped if one can't be imported."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise Skipped(f"{name} can't be imported ({error})") from error
    return modules


@contextmanager
def _quiet() -> Iterator[str]:
    """Silence the stacks' own warnings and hints. Yields a folder that they can write to."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield folder
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _expected(subject: Subject) -> dict[str, Tensor]:
    model, wrapper = build(subject)
    train(model, wrapper, range(_STEPS))
    return values(model)


@stack_checks.register(16, _OTHER_RUN)
def accelerate_prepares_it(subject: Subject) -> None:
    """The optimizer that accelerate's `prepare` returns steps as the plain loop does, bit for bit."""
    (accelerate,) = _needed("accelerate")
    expected = _expected(subject)
    state = accelerate.state
    with _quiet():
        try:
            model, wrapper = build(subject)
            accelerator = accelerate.Accelerator(cpu=True)
            prepared, optimizer = accelerator.prepare(model, wrapper)
            for step in range(_STEPS):
                optimizer.zero_grad()
                accelerator.backward(prepared(step))
                optimizer.step()
        finally:  # accelerate keeps one state for each process
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
    require_same_values(values(model), expected, f"under accelerate, after {_STEPS} steps")


@stack_checks.register(16, _OTHER_RUN)
def lightning_trains_with_it(subject: Subject) -> None:
    """Lightning's automatic optimization steps as the plain loop, bit for bit."""
    (lightning,) = _needed("lightning.pytorch")
    expected = _expected(subject)
    model, wrapper = build(subject)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.model(batch)

        def configure_optimizers(self) -> Any:
            return wrapper

    with _quiet() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=_STEPS, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(torch.arange(_STEPS), batch_size=1))  # type: ignore[arg-type]
    require_same_values(values(model), expected, f"under Lightning, after {_STEPS} steps")


class _ForTrainer(nn.Module):
    """A model as the `Trainer` calls it: by the names of the batch's entries, with a loss in what it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, step: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(step)}


@stack_checks.register(16, _OTHER_RUN)
def huggingface_trainer_trains_with_it(subject: Subject) -> None:
    """Hugging Face's `Trainer`, given an instance, steps as the plain loop, bit for bit."""
    transformers, _ = _needed("transformers", "accelerate")
    try:
        kind, arguments = transformers.Trainer, transformers.TrainingArguments
    except ImportError as error:  # transformers imports its Trainer on first use
        raise Skipped(f"transformers.Trainer can't be imported ({error})") from error

    class InOrder(kind):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    expected = _expected(subject)
    model, wrapper = build(subject)
    with _quiet() as folder:
        options = arguments(
            output_dir=folder, max_steps=_STEPS, per_device_train_batch_size=1, max_grad_norm=0.0, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no", lr_scheduler_type="constant",
            dataloader_pin_memory=False,
        )  # fmt: skip
        steps = [{"step": torch.tensor(step)} for step in range(_STEPS)]
        trainer = InOrder(_ForTrainer(model), options, train_dataset=steps, optimizers=(wrapper, None))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    require_same_values(values(model), expected, f"under the Trainer, after {_STEPS} steps")
