"""Imports timm, also if torchvision's compiled operators don't fit torch: PyPI has builds for CUDA only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optional import missing

NAMES = ("nms", "qnms")  # torchvision describes them whether they exist or not
_declared: list[torch.library.Library] = []


def import_timm() -> Any:
    """Import timm, or skip. If torch is a CPU build, declare the operators that torchvision describes.

    None of them is called, because they find boxes in pictures. Undeclared, they make `import torchvision` raise.
    """
    if missing(["timm", "torchvision"]):
        pytest.skip("needs timm and torchvision", allow_module_level=True)
    if torch.version.cuda is None and not _declared:
        _declared.append(torch.library.Library("torchvision", "DEF"))
        for name in NAMES:
            if not hasattr(torch.ops.torchvision, name):
                _declared[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm.optim
    import timm.scheduler

    return timm
