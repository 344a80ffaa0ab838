"""The plan of a matched random control: its programs, and the lists of coordinates that lie close to its limit."""

from __future__ import annotations

import math

import torch

from .configure import forms_update_again
from .device.config import Config
from .tables import cdiv, upload, work

LOOK_BLOCK = 1024  # elements of a program that looks at what is selected
# Registers of a thread in those programs: seven on a multiprocessor. Without a limit they take 56 to 96; it spills 32
# bytes at most.
LOOK_REGISTERS = 72
# Entries of a list, or rows of sums, that a tensor's program looks at together to find the limit.
LIMIT_BLOCK, LIMIT_WARPS = 4096, 16
# False: scores are ranked first, and then looked at a second time to draw.
RANK_AND_DRAW = True
WIDTH = 6.0  # half the bracket, in standard deviations of the limit's rank: misses once in 10^8 tensors


def room_of(numel: int) -> int:
    """The length of a tensor's list: a third more than a bracket holds on average, and 256 more for small tensors."""
    return min(numel, math.ceil(8 * math.sqrt(numel)) + 256)


class ControlPlan:
    """The pieces into which a batch's tensors are cut for a control, and the places of their lists."""

    def __init__(self, numels: list[int], cfg: Config, device: torch.device) -> None:
        counts = [cdiv(n, LOOK_BLOCK) for n in numels]
        self.work, first = work(counts, device)
        self.programs = self.work.shape[0]
        rows, self.room = [], 0
        for at, count, numel in zip(first, counts, numels, strict=True):
            rows.append([at, count, self.room, room_of(numel)])  # the columns ROWS_AT to ROOM
            self.room += room_of(numel)
        self.table = upload(rows, torch.int64, device)
        # The moments are stored when the policy's coordinates are counted, if the update can be formed from them again:
        # that of Adam, from moments that were not rounded.
        self.moves = forms_update_again(cfg) and cfg.control_norm
        # The policy's coordinates are counted, and the control's drawn, in one launch if the count is known before.
        self.at_once = cfg.selection == "top_k" and cfg.quantile == "exact" and not cfg.still
        # All of that in the pass that counts the scores, if the policy's sums can be completed when they are settled.
        self.ranks_and_draws = self.at_once and self.moves and cfg.block == LOOK_BLOCK and RANK_AND_DRAW
