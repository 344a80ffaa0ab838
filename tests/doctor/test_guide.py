"""docs/guides/doctor.md shows what is printed, but for the times."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from selective import Cautious, SelectiveUpdate
from selective.compare import ModelConfig
from selective.compare.model import GPT
from selective.doctor import doctor

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "doctor.md"


def without_times(text: str) -> str:
    shorter = re.sub(r"^  steps .*?^  CUDA", "  CUDA", text, flags=re.MULTILINE | re.DOTALL)
    assert shorter != text
    return shorter


def test_the_guide_shows_what_is_printed() -> None:
    model = GPT(ModelConfig(), 0)
    optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=2e-3), policy=Cautious())
    shown = re.search(r"```text\n(SelectiveUpdate over .*?)\n```", GUIDE.read_text(), flags=re.DOTALL)
    assert shown is not None
    printed = without_times(str(doctor(optimizer, model=model)))
    assert printed == without_times(shown[1])
    assert max(map(len, printed.splitlines())) <= 80
