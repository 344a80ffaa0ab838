"""What torch's own optimizers got wrong in versions that we support."""

from __future__ import annotations

import torch

# Seen with torch 2.11, mended by 2.13: Adagrad made its state in the constructor only, Adafactor's copies lacked a key.
FAULTS_OF_OLDER_TORCH = {
    "adagrad": {"add_param_group_reaches_the_base", "parameters_may_be_swapped"},
    "adafactor": {"copies_step_as_the_original"},
}


def faults_of_older_torch(base: str) -> set[str]:
    """Conformance checks that this base fails by itself with the torch that is installed."""
    older = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
    return FAULTS_OF_OLDER_TORCH.get(base, set()) if older else set()
