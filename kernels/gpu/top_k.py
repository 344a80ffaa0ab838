"""`top_k` of one tensor of scores: the kernels of a step, and one that writes the selected as bools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import Draw, Item, Selection, StepSpec, Strength
from .batch import Batch
from .configure import BLOCK
from .device import config
from .device.config import DTYPES, FIRST, Config
from .device.elements import read
from .device.scores import key_of
from .device.selections import by_rank
from .launch import Step, on, run
from .tables import cdiv


@dataclass(frozen=True)
class ScoreRule:
    """The place of a rule where there is none: the state's `score` is ranked as it is."""

    lr: float = 0.0
    weight_decay: float = 0.0
    state_names: ClassVar[tuple[str, ...]] = ("score",)


def ranks(score: Tensor) -> bool:
    """True if the kernels can rank this tensor."""
    return type(score) in (Tensor, torch.nn.Parameter) and score.dtype in DTYPES and score.numel() < 1 << 31


@triton.jit
def chosen_kernel(out_ptr, pointers_ptr, ranks_ptr, numel, CFG: tl.constexpr, BLOCK: tl.constexpr):
    """Writes 1 where a score is selected and 0 elsewhere. Reads every score once, writes a byte for each."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score = read(pointers_ptr, offs, offs < numel, FIRST, CFG.first, False)
    chosen, _ = by_rank(offs, key_of(score), ranks_ptr)
    tl.store(out_ptr + offs, chosen.to(tl.int8), mask=offs < numel)


@torch.no_grad()
def top_k(score: Tensor, k: int) -> Tensor:
    """See `selective.kernels.top_k`. A fixed number of launches; the host does not wait."""
    numel = score.numel()
    chosen = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if k <= 0 or numel == 0:
        return chosen
    flat = score.detach().contiguous()
    dtype = DTYPES[score.dtype]
    cfg = Config(rule="score", param=dtype, grad=None, first=dtype, second=None, third=None, fourth=None, block=BLOCK,
                 selection="top_k", writes=False)  # fmt: skip
    item, rule = Item(flat, flat, {"score": flat}, 0), cast(Any, ScoreRule())
    spec = StepSpec(rule, Selection("top_k", fraction=1.0), Strength("fixed"), Draw(0, 0))
    with on(score.device):
        batch = Batch(cfg, [item], [0], [spec])
        batch.groups.update([spec])
        batch.update([item], [spec])
        assert batch.top_k is not None
        rows = batch.top_k.rank_rows(batch.numels, [spec.selection])
        rows[0][config.WANTED.value] = min(k, numel)
        batch.tables.uploads.fill("ranks", batch.tables.ranks, rows)
        Step(batch).find_thresholds()
        run(chosen_kernel, cdiv(numel, BLOCK), chosen.view(torch.int8), batch.tables.pointers, batch.tables.ranks,
            numel, CFG=cfg, BLOCK=BLOCK)  # fmt: skip
    return chosen
