"""Trainer, which does runs: the model, the loop, and the record of a run."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evidence.prototypes.stepper import Finishes, Stepper
from evidence.runs import Record, Run
from selective.compare.config import LoopConfig
from selective.compare.task import Batches, evaluated, facts_of, start_of, to_device
from selective.compare.train import fingerprint, schedule

LOOP = LoopConfig(warmup=0.1, final_lr=0.1, clip=1.0)  # pyright: ignore[reportCallIssue]
UNTIMED_STEPS = 12  # of a setup's first run on a GPU: kernels are compiled, and Soap refreshes its bases once


class Trainer:
    """One task's model on a device. All runs share the model, so that it is compiled once.

    Args:
        task: a task of `selective compare`. A batch is a tensor, or a tuple of tensors, with an example in each row.
            A `micro_batch` says how many examples are put through the model at once; without it, all are. What
            `measures(model)` returns, a number by name, is in the record; it is called after the last step.
        optimizer_of: makes the optimizer of a run over the model, for a number of steps.
        steps: the steps of a whole run.
        evaluate_every: steps from one evaluation to the next.
        device: "cuda" or "cpu".
    """

    def __init__(
        self,
        task: Any,
        optimizer_of: Callable[[Run, nn.Module, int], Stepper],
        steps: int,
        evaluate_every: int,
        device: str,
    ) -> None:
        self.task = task.to(device) if callable(getattr(task, "to", None)) else task
        self.optimizer_of, self.steps, self.evaluate_every = optimizer_of, steps, evaluate_every
        self.micro_batch, self.device = getattr(task, "micro_batch", None), device
        self._facts = hashlib.sha256(json.dumps(facts_of(task), sort_keys=True).encode()).hexdigest()
        self._starts: dict[int, dict[str, Tensor]] = {}
        self.model = start_of(task, 0).to(device)
        self._warm: set[str] = set()

    def go(self, run: Run) -> Record:
        """Do a run: train from its seed's start on its seed's batches, to the end or until it diverges."""
        self._warm_up(run)
        self._restart(run.seed)
        steps = round(self.steps * run.part)
        optimizer = self.optimizer_of(run, self.model, steps)
        rates = [group["lr"] for group in optimizer.param_groups]
        multiplier, batches = schedule(LOOP, steps), Batches(self.task, run.seed)
        record = self._new_record(run, steps)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = since = time.perf_counter()
        trained = 0.0
        for step in range(steps + 1):
            if step == steps and isinstance(optimizer, Finishes):
                optimizer.finish()
            if step % self.evaluate_every == 0 or step == steps:
                self._synchronize()
                trained += time.perf_counter() - since
                self._evaluate(record, step, trained)
                since = time.perf_counter()
            if step == steps or record["diverged"]:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * multiplier(step)
            self._step(optimizer, batches.at(step))
        record["seconds"] = round(time.perf_counter() - begun, 3)
        if not record["diverged"]:
            record["measures"] = self._measures()
        if self.device == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated()
        record["parameters_sha256"] = fingerprint(self.model)
        for p in self.model.parameters():
            p.grad = None
        return record

    def _new_record(self, run: Run, steps: int) -> Record:
        on_gpu = self.device == "cuda"
        return {
            "task": run.task, "setup": run.setup, "lr": run.lr, "rest_lr": run.rest_lr, "seed": run.seed,
            "part": run.part, "steps": steps, "diverged": False,
            "validation": {"step": [], "loss": []},
            "seconds_to_validation": [],  # of training until then, without evaluations and without compiling
            "task_sha256": self._facts, "micro_batch": self.micro_batch, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu", "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    def _evaluate(self, record: Record, step: int, seconds: float) -> None:
        """Add the loss as it is now, unless it is not finite: the run has diverged then."""
        value = evaluated(self.task, self.model, record["seed"])
        if not math.isfinite(value):
            record["diverged"] = True
            return
        record["validation"]["step"].append(step)
        record["validation"]["loss"].append(value)
        record["seconds_to_validation"].append(round(seconds, 4))

    def _measures(self) -> dict[str, float]:
        """The task's measures of the final model besides the loss, such as accuracy, by name."""
        measures = getattr(self.task, "measures", None)
        if measures is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            found = measures(self.model)
        self.model.train()
        return {name: float(value) for name, value in found.items()}

    def _step(self, optimizer: Stepper, batch: Any) -> None:
        """One step. The host waits for nothing."""
        optimizer.zero_grad()
        for part, share in self._parts(to_device(batch, self.device)):
            (self.task.loss(self.model, part) * share).backward()
        assert LOOP.clip is not None
        nn.utils.clip_grad_norm_(self.model.parameters(), LOOP.clip)
        optimizer.step()

    def _parts(self, batch: Any) -> list[tuple[Any, float]]:
        """The batch in parts of `micro_batch` examples, each with its share of the batch."""
        tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        count = len(tensors[0])
        split = zip(*(tensor.split(self.micro_batch or count) for tensor in tensors), strict=True)
        return [(part[0] if isinstance(batch, Tensor) else part, len(part[0]) / count) for part in split]

    def _restart(self, seed: int) -> None:
        """Put the model at the start that the seed fixes."""
        if seed not in self._starts:
            start = start_of(self.task, seed).state_dict()
            self._starts[seed] = {name: tensor.to(self.device) for name, tensor in start.items()}
        self.model.load_state_dict(self._starts[seed])

    def _warm_up(self, run: Run) -> None:
        """Compile what a setup needs on a GPU, once, so that no run's time has it."""
        if self.device == "cpu" or run.setup in self._warm:
            return
        self._restart(run.seed)
        optimizer, batches = self.optimizer_of(run, self.model, self.steps), Batches(self.task, run.seed)
        for step in range(UNTIMED_STEPS):
            self._step(optimizer, batches.at(step))
        evaluated(self.task, self.model, run.seed)
        self._synchronize()
        self._warm.add(run.setup)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
