"""Trains the same model from the same start on the same batches under several optimizers: did it help?

On the command line it is `selective compare`. From Python it is `compare`, on a `Task` of yours or the built-in GPT::

    from selective import Cautious
    from selective.compare import compare
    print(compare(contenders=[Cautious()], steps=200, out="results/mine").summary.verdicts)
"""

from selective.compare.config import CompareConfig, ConfigError, DataConfig, LoopConfig, ModelConfig, build
from selective.compare.extras import MissingExtra
from selective.compare.gpt_task import GPTTask
from selective.compare.in_python import compare
from selective.compare.runner import Comparison
from selective.compare.summary import Row, Summary, summarise
from selective.compare.task import Task
from selective.compare.workers import WorkerFailed

__all__ = [
    "CompareConfig", "Comparison", "ConfigError", "DataConfig", "GPTTask", "LoopConfig", "MissingExtra", "ModelConfig",
    "Row", "Summary", "Task", "WorkerFailed", "build", "compare", "summarise",
]  # fmt: skip
