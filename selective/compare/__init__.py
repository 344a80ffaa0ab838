"""Trains the same small GPT from the same start on the same batches under several optimizers: did selection help?

On the command line it is `selective compare`. From Python, under `if __name__ == "__main__":` because it starts
processes::

    from pathlib import Path
    from selective.compare import Comparison, build, summarise
    comparison = Comparison(build({"policies": ["MGUP"], "steps": 200}), Path("results/mine"))
    comparison.run(print)
    print(summarise(comparison.config, list(comparison.records.values())).verdicts)
"""

from selective.compare.config import CompareConfig, ConfigError, DataConfig, LoopConfig, ModelConfig, build
from selective.compare.runner import Comparison
from selective.compare.summary import Row, Summary, summarise

__all__ = [
    "CompareConfig", "Comparison", "ConfigError", "DataConfig", "LoopConfig", "ModelConfig", "Row", "Summary", "build",
    "summarise",
]  # fmt: skip
